// SPDX-License-Identifier: Apache-2.0
/*
 * bare_tcp.c - checkpoint and restore of N sockets, by the library and by a bare loop of
 * the same system calls, in turns; bench_tcp.py compiles and runs it.
 *
 *   bare_tcp time N ROUNDS    a line for each round and way:
 *                             way checkpoint_us restore_us encode_us decode_us (a socket)
 *   bare_tcp library|bare N   one round of one way, for strace -c
 *
 * The bare loop knows what it will meet, checks nothing but failure and keeps only what
 * its own restore needs: it is the least that a program can do that makes these calls.
 * Each round has new connections over loopback: 200 bytes unread, 300 bytes in flight
 * (a filter drops them, see bench_tcp.py), a dozen options that are no defaults.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <linux/sockios.h>
#include <linux/tcp.h>

#include "midstream_tcp.h"

#define PORT 7777
#define UNREAD 200
#define IN_FLIGHT 300
#define PEEK_SLACK 65536
#define BUF_LOCK 72

static void must(bool truth, const char *what)
{
	if (truth)
		return;
	perror(what);
	exit(1);
}

static double now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec * 1e6 + (double)ts.tv_nsec / 1e3;
}

/* -- options: what is read, and what of it is set ------------------------------- */

#define SOL SOL_SOCKET
#define TCP IPPROTO_TCP
#define IP IPPROTO_IP

static const struct option {
	int level, name;
	socklen_t size;
	bool set; /* by restore, in this order */
} options[] = {
    {SOL, SO_SNDBUF, 4, false},
    {SOL, SO_RCVBUF, 4, false},
    {SOL, BUF_LOCK, 4, false},
    {SOL, SO_REUSEADDR, 4, false},
    {SOL, SO_REUSEPORT, 4, false},
    {SOL, SO_KEEPALIVE, 4, false}, /* at activation */
    {SOL, SO_OOBINLINE, 4, false},
    {SOL, SO_LINGER, 8, true},
    {SOL, SO_MARK, 4, true},
    {SOL, SO_RCVLOWAT, 4, false},
    {SOL, SO_MAX_PACING_RATE, 8, false},
    {SOL, SO_RCVTIMEO, 16, true},
    {SOL, SO_SNDTIMEO, 16, true},
    {IP, IP_TOS, 4, true},
    {IP, IP_TTL, 4, true},
    {SOL, SO_PRIORITY, 4, true},
    {TCP, TCP_NODELAY, 4, true},
    {TCP, TCP_CORK, 4, false},
    {TCP, TCP_KEEPIDLE, 4, true},
    {TCP, TCP_KEEPINTVL, 4, true},
    {TCP, TCP_KEEPCNT, 4, true},
    {TCP, TCP_USER_TIMEOUT, 4, true},
    {TCP, TCP_NOTSENT_LOWAT, 4, true},
    {TCP, TCP_LINGER2, 4, true},
    {TCP, TCP_WINDOW_CLAMP, 4, false},
    {TCP, TCP_INQ, 4, false},
};
#define OPTIONS (sizeof(options) / sizeof(options[0]))
enum { SNDBUF = 0, RCVBUF = 1, LOCK = 2, CLAMP = 24 };

static void set_int(int fd, int level, int name, int value)
{
	must(!setsockopt(fd, level, name, &value, sizeof(value)), "setsockopt");
}

static void set_options(int fd)
{
	struct linger linger = {1, 9};
	struct timeval tv = {12, 500000};

	set_int(fd, SOL, SO_KEEPALIVE, 1);
	set_int(fd, SOL, SO_MARK, 7);
	set_int(fd, IP, IP_TOS, 0x48);
	set_int(fd, SOL, SO_PRIORITY, 5);
	set_int(fd, TCP, TCP_NODELAY, 1);
	set_int(fd, TCP, TCP_KEEPIDLE, 33);
	set_int(fd, TCP, TCP_KEEPINTVL, 7);
	set_int(fd, TCP, TCP_KEEPCNT, 4);
	set_int(fd, TCP, TCP_USER_TIMEOUT, 90000);
	set_int(fd, TCP, TCP_NOTSENT_LOWAT, 16384);
	must(!setsockopt(fd, SOL, SO_LINGER, &linger, sizeof(linger)), "SO_LINGER");
	must(!setsockopt(fd, SOL, SO_RCVTIMEO, &tv, sizeof(tv)), "SO_RCVTIMEO");
	must(!setsockopt(fd, SOL, SO_SNDTIMEO, &tv, sizeof(tv)), "SO_SNDTIMEO");
	must(!setsockopt(fd, TCP, TCP_CONGESTION, "reno", 4), "TCP_CONGESTION");
}

/* -- the connections of a round ------------------------------------------------- */

struct round {
	size_t n;
	int *clients, *servers, *blanks, *errors;
};

static int listener(void)
{
	struct sockaddr_in at = {.sin_family = AF_INET,
				 .sin_port = htons(PORT),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	must(fd >= 0, "socket");
	set_int(fd, SOL, SO_REUSEADDR, 1);
	must(!bind(fd, (struct sockaddr *)&at, sizeof(at)) && !listen(fd, 4096), "listen");
	return fd;
}

static void connect_all(struct round *r)
{
	static const uint8_t bytes[IN_FLIGHT];
	struct sockaddr_in at;
	socklen_t len = sizeof(at);
	int from = listener(), queued;

	must(!getsockname(from, (struct sockaddr *)&at, &len), "getsockname");
	for (size_t i = 0; i < r->n; i++) {
		r->clients[i] = socket(AF_INET, SOCK_STREAM, 0);
		must(!connect(r->clients[i], (struct sockaddr *)&at, len), "connect");
		r->servers[i] = accept(from, NULL, NULL);
		must(r->servers[i] >= 0, "accept");
		set_options(r->servers[i]);
		must(send(r->clients[i], bytes, UNREAD, 0) == UNREAD, "send");
		must(send(r->servers[i], bytes, IN_FLIGHT, 0) == IN_FLIGHT, "send");
		r->blanks[i] = socket(AF_INET, SOCK_STREAM, 0);
		must(r->blanks[i] >= 0, "socket");
	}
	close(from);
	for (size_t i = 0; i < r->n; i++) {
		must(!ioctl(r->servers[i], SIOCOUTQ, &queued) && queued == IN_FLIGHT, "in flight");
		must(!ioctl(r->servers[i], SIOCINQ, &queued) && queued == UNREAD, "unread");
	}
}

static void close_all(int *fds, size_t n)
{
	for (size_t i = 0; i < n; i++)
		close(fds[i]);
}

/* Clients vanish without a word: in repair mode a close is silent. */
static void drop_clients(struct round *r)
{
	for (size_t i = 0; i < r->n; i++)
		set_int(r->clients[i], TCP, TCP_REPAIR, 1);
	close_all(r->clients, r->n);
}

/* -- by the library ------------------------------------------------------------- */

struct times {
	double checkpoint, restore, encode, decode;
};

static struct times by_library(struct round *r)
{
	ms_tcp_batch *batch, *arrived;
	struct times t;
	uint8_t *bytes;
	size_t len;

	t.checkpoint = -now_us();
	must(!ms_tcp_checkpoint(r->servers, r->n, &batch, r->errors), "ms_tcp_checkpoint");
	t.checkpoint += now_us();
	t.encode = -now_us();
	must(!ms_tcp_encode(batch, NULL, 0, &len), "ms_tcp_encode");
	bytes = malloc(len);
	must(bytes && !ms_tcp_encode(batch, bytes, len, &len), "ms_tcp_encode");
	t.encode += now_us();
	ms_tcp_batch_free(batch);
	close_all(r->servers, r->n);
	t.decode = -now_us();
	must(!ms_tcp_decode(bytes, len, &arrived), "ms_tcp_decode");
	t.decode += now_us();
	free(bytes);
	t.restore = -now_us();
	must(!ms_tcp_restore(r->blanks, r->n, arrived, r->errors), "ms_tcp_restore");
	t.restore += now_us();
	ms_tcp_batch_free(arrived);
	return t;
}

/* -- by a bare loop --------------------------------------------------------------- */

struct bare {
	struct sockaddr_storage local, remote;
	uint8_t values[OPTIONS][16];
	char congestion[16], device[16];
	int outq, nsd, inq, mss;
	uint32_t write_seq, rcv_nxt, tsval;
	struct tcp_info info;
	struct tcp_repair_window win;
	uint8_t *send, *recv;
};

#define GET(fd, level, name, to)                                                                   \
	do {                                                                                       \
		socklen_t get_len = sizeof(to);                                                    \
		must(!getsockopt(fd, level, name, &(to), &get_len), #name);                        \
	} while (0)

static void bare_checkpoint(int fd, struct bare *b, uint8_t **arena)
{
	socklen_t local = sizeof(b->local), remote = sizeof(b->remote), len = 16;
	int protocol, domain, again, outq, nsd;
	char ulp[16], byte;

	GET(fd, SOL, SO_PROTOCOL, protocol);
	GET(fd, SOL, SO_DOMAIN, domain);
	must(!getsockname(fd, (struct sockaddr *)&b->local, &local), "getsockname");
	must(!getpeername(fd, (struct sockaddr *)&b->remote, &remote), "getpeername");
	GET(fd, TCP, TCP_ULP, ulp);
	must(recv(fd, &byte, 1, MSG_OOB | MSG_PEEK | MSG_DONTWAIT) < 0, "urgent data");
	for (size_t i = 0; i < OPTIONS; i++) {
		socklen_t size = options[i].size;

		must(!getsockopt(fd, options[i].level, options[i].name, b->values[i], &size),
		     "getsockopt");
	}
	GET(fd, TCP, TCP_CONGESTION, b->congestion);
	must(!getsockopt(fd, SOL, SO_BINDTODEVICE, b->device, &len), "SO_BINDTODEVICE");
	set_int(fd, TCP, TCP_REPAIR, TCP_REPAIR_ON);
	must(!ioctl(fd, SIOCOUTQNSD, &b->nsd) && !ioctl(fd, SIOCOUTQ, &b->outq), "SIOCOUTQ");
	set_int(fd, TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
	GET(fd, TCP, TCP_QUEUE_SEQ, b->write_seq);
	b->send = *arena;
	must(recv(fd, b->send, (size_t)b->outq + PEEK_SLACK, MSG_PEEK | MSG_DONTWAIT) == b->outq,
	     "peek");
	*arena += b->outq;
	set_int(fd, TCP, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE);
	GET(fd, TCP, TCP_QUEUE_SEQ, b->rcv_nxt);
	GET(fd, TCP, TCP_INFO, b->info);
	GET(fd, TCP, TCP_REPAIR_WINDOW, b->win);
	must(!ioctl(fd, SIOCINQ, &b->inq), "SIOCINQ");
	b->recv = *arena;
	must(recv(fd, b->recv, (size_t)b->inq, MSG_PEEK | MSG_DONTWAIT) == b->inq, "peek");
	*arena += b->inq;
	GET(fd, TCP, TCP_QUEUE_SEQ, again);
	set_int(fd, TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE);
	must(!ioctl(fd, SIOCOUTQ, &outq) && !ioctl(fd, SIOCOUTQNSD, &nsd), "SIOCOUTQ");
	GET(fd, TCP, TCP_TIMESTAMP, b->tsval);
	GET(fd, TCP, TCP_MAXSEG, b->mss);
}

static int int_of(const struct bare *b, int option)
{
	int value;

	memcpy(&value, b->values[option], sizeof(value));
	return value;
}

static void bare_restore(int fd, const struct bare *b)
{
	struct tcp_repair_opt agreed[4] = {
	    {2, (uint32_t)b->mss},
	    {3, b->info.tcpi_snd_wscale | (uint32_t)b->info.tcpi_rcv_wscale << 16},
	    {4, 0},
	    {8, 0},
	};
	int protocol, domain, sndbuf = int_of(b, SNDBUF), rcvbuf = int_of(b, RCVBUF);

	GET(fd, SOL, SO_PROTOCOL, protocol);
	GET(fd, SOL, SO_DOMAIN, domain);
	set_int(fd, TCP, TCP_REPAIR, TCP_REPAIR_ON);
	set_int(fd, SOL, sndbuf > 2 * 212992 ? SO_SNDBUFFORCE : SO_SNDBUF, sndbuf / 2);
	set_int(fd, SOL, rcvbuf > 2 * 212992 ? SO_RCVBUFFORCE : SO_RCVBUF, rcvbuf / 2);
	must(!setsockopt(fd, TCP, TCP_CONGESTION, b->congestion, 4), "TCP_CONGESTION");
	for (size_t i = 0; i < OPTIONS; i++)
		if (options[i].set)
			must(!setsockopt(fd, options[i].level, options[i].name, b->values[i],
					 options[i].size),
			     "setsockopt");
	set_int(fd, TCP, TCP_MAXSEG, b->mss);
	set_int(fd, TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
	set_int(fd, TCP, TCP_QUEUE_SEQ, (int)(b->write_seq - (uint32_t)b->outq));
	set_int(fd, TCP, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE);
	set_int(fd, TCP, TCP_QUEUE_SEQ, (int)(b->rcv_nxt - (uint32_t)b->inq));
	must(!bind(fd, (const struct sockaddr *)&b->local, sizeof(struct sockaddr_in)), "bind");
	must(!connect(fd, (const struct sockaddr *)&b->remote, sizeof(struct sockaddr_in)),
	     "connect");
	must(!setsockopt(fd, TCP, TCP_REPAIR_OPTIONS, agreed, sizeof(agreed)),
	     "TCP_REPAIR_OPTIONS");
	must(send(fd, b->recv, (size_t)b->inq, MSG_DONTWAIT | MSG_NOSIGNAL) == b->inq, "send");
	set_int(fd, TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE);
	must(!setsockopt(fd, TCP, TCP_REPAIR_WINDOW, &b->win, sizeof(b->win)), "TCP_REPAIR_WINDOW");
	set_int(fd, TCP, TCP_WINDOW_CLAMP, int_of(b, CLAMP));
	set_int(fd, SOL, BUF_LOCK, int_of(b, LOCK));
}

static struct times by_bare_loop(struct round *r)
{
	size_t all_len = r->n * sizeof(struct bare);
	size_t bytes_len = r->n * (UNREAD + IN_FLIGHT) + PEEK_SLACK + IN_FLIGHT;
	struct bare *all = malloc(all_len);
	uint8_t *bytes = malloc(bytes_len), *arena = bytes;
	struct times t = {0};

	must(all && bytes, "malloc");
	memset(all, 0, all_len); /* no page fault in the loop's time */
	memset(bytes, 0, bytes_len);
	t.checkpoint = -now_us();
	for (size_t i = 0; i < r->n; i++)
		bare_checkpoint(r->servers[i], &all[i], &arena);
	t.checkpoint += now_us();
	close_all(r->servers, r->n);
	t.restore = -now_us();
	for (size_t i = 0; i < r->n; i++)
		bare_restore(r->blanks[i], &all[i]);
	t.restore += now_us();
	free(all);
	free(bytes);
	return t;
}

/* -- rounds --------------------------------------------------------------------- */

static struct times run(struct round *r, bool library)
{
	struct times t;

	connect_all(r);
	t = library ? by_library(r) : by_bare_loop(r);
	close_all(r->blanks, r->n);
	drop_clients(r);
	return t;
}

static void report(const struct round *r, const char *way, struct times t)
{
	double n = (double)r->n;

	printf("%s %.4f %.4f %.4f %.4f\n", way, t.checkpoint / n, t.restore / n, t.encode / n,
	       t.decode / n);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	struct round r = {0};
	bool timed = argc == 4 && !strcmp(argv[1], "time");

	if (!timed && !(argc == 3 && (!strcmp(argv[1], "library") || !strcmp(argv[1], "bare")))) {
		fprintf(stderr, "usage: %s time N ROUNDS | library N | bare N\n", argv[0]);
		return 2;
	}
	r.n = strtoul(argv[2], NULL, 10);
	r.clients = calloc(r.n, sizeof(int));
	r.servers = calloc(r.n, sizeof(int));
	r.blanks = calloc(r.n, sizeof(int));
	r.errors = calloc(r.n, sizeof(int));
	must(r.clients && r.servers && r.blanks && r.errors, "calloc");
	if (!timed) {
		run(&r, argv[1][0] == 'l');
		return 0;
	}
	for (unsigned long i = strtoul(argv[3], NULL, 10); i; i--)
		for (unsigned long turn = 0; turn < 2; turn++) {
			bool library = (i + turn) % 2;

			report(&r, library ? "library" : "bare", run(&r, library));
		}
	return 0;
}
