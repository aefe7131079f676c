// SPDX-License-Identifier: Apache-2.0
/*
 * restore.c - a checkpoint into a blank socket, without its send queue.
 *
 * The order is the kernel's: sequence numbers only in CLOSE, TCP_MAXSEG before
 * connect (afterwards snd_mss sticks near 536 and throughput falls to a third),
 * TCP_REPAIR_OPTIONS only before the first byte.
 */
#include <stdio.h>
#include <linux/in6.h>

#include "internal.h"

#define UNPRIVILEGED_BUF (2 * 212992) /* what SO_SNDBUF and SO_RCVBUF can set by default */
#define SMALL_QUEUE 65536
#define BUF_MAX (1u << 30)
#define MAXSEG_MIN 88 /* TCP_MIN_MSS */
#define TS_BYTES 12
#define MAXSEG_MAX 32767 /* MAX_TCP_WINDOW: TCP_MAXSEG takes no more (loopback has 65483) */

#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72
#endif

static socklen_t address(const struct flow *f, bool local, struct sockaddr_storage *ss)
{
	const uint8_t *addr = local ? f->key.local : f->key.remote;
	__be16 port = local ? f->key.local_port : f->key.remote_port;

	memset(ss, 0, sizeof(*ss));
	if (f->family == 6) {
		struct sockaddr_in6 *sin6 = (struct sockaddr_in6 *)ss;

		sin6->sin6_family = AF_INET6;
		sin6->sin6_port = port;
		memcpy(&sin6->sin6_addr, addr, 16);
		return sizeof(*sin6);
	}
	struct sockaddr_in *sin = (struct sockaddr_in *)ss;

	sin->sin_family = AF_INET;
	sin->sin_port = port;
	memcpy(&sin->sin_addr, addr + 12, 4);
	return sizeof(*sin);
}

static int set_transparent(int fd, const struct flow *f, int on)
{
	if (f->family == 6 && !ms_mapped(f))
		return ms_setint(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, on);
	return ms_setint(fd, IPPROTO_IP, IP_TRANSPARENT, on);
}

/* EINVAL: bound already, as a socket is that is seated again. */
static int bind_local(int fd, const struct flow *f)
{
	struct sockaddr_storage ss;
	socklen_t len = address(f, true, &ss);

	if (!bind(fd, (struct sockaddr *)&ss, len) || errno == EINVAL)
		return 0;
	return -errno;
}

static int connect_remote(int fd, const struct flow *f)
{
	struct sockaddr_storage ss;
	socklen_t len = address(f, false, &ss);

	return connect(fd, (struct sockaddr *)&ss, len) ? -errno : 0;
}

/* In repair mode connect() ends in ESTABLISHED at once and sends nothing. */
static int attach(int fd, const struct flow *f)
{
	int err = bind_local(fd, f);

	if (!err)
		err = connect_remote(fd, f);
	if (err != -EADDRNOTAVAIL && err != -ENETUNREACH)
		return err;
	/* The address is not here yet. IP_FREEBIND would bind, but not connect. */
	if (set_transparent(fd, f, 1))
		return err;
	err = bind_local(fd, f);
	if (!err)
		err = connect_remote(fd, f);
	set_transparent(fd, f, 0);
	return err;
}

int ms_disconnect(int fd)
{
	struct sockaddr sa = {.sa_family = AF_UNSPEC};

	return connect(fd, &sa, sizeof(sa)) ? -errno : 0;
}

static int set_seq(int fd, int queue, uint32_t seq)
{
	int err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue);

	return err ? err : ms_setint(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, (int)seq);
}

/* What the two ends agreed on in their SYNs. */
static int set_negotiated(int fd, const struct flow *f)
{
	struct tcp_repair_opt opts[4];
	unsigned int n = 0;

	opts[n++] = (struct tcp_repair_opt){2 /* TCPOPT_MSS */, f->mss};
	if (f->tcpi_options & TCPI_OPT_WSCALE)
		opts[n++] = (struct tcp_repair_opt){3 /* TCPOPT_WINDOW */,
						    f->snd_wscale | (uint32_t)f->rcv_wscale << 16};
	if (f->tcpi_options & TCPI_OPT_SACK)
		opts[n++] = (struct tcp_repair_opt){4 /* TCPOPT_SACK_PERM */, 0};
	if (f->tcpi_options & TCPI_OPT_TIMESTAMPS)
		opts[n++] = (struct tcp_repair_opt){8 /* TCPOPT_TIMESTAMP: a value is EINVAL */, 0};
	if (setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, opts, n * sizeof(opts[0])))
		return -errno;
	return 0;
}

/*
 * Appends to the queue that repair selected, or sends. Advances *data and *len, so
 * that the caller can go on after -ENOBUFS. A call takes at most about 70 kB.
 */
int ms_queue_send(int fd, const uint8_t **data, size_t *len)
{
	while (*len) {
		ssize_t done = send(fd, *data, *len, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			return errno == EAGAIN || errno == ENOMEM ? -ENOBUFS : -errno;
		*data += done;
		*len -= (size_t)done;
	}
	return 0;
}

/*
 * getsockopt() gives twice what setsockopt() takes. SO_*BUFFORCE only where the
 * unprivileged call would be capped: both lock autotuning, which SO_BUF_LOCK
 * undoes after the queues.
 */
static int set_buffer(int fd, int name, int force, uint32_t bytes)
{
	if (bytes > UNPRIVILEGED_BUF && !ms_setint(fd, SOL_SOCKET, force, (int)(bytes / 2)))
		return 0;
	return ms_setint(fd, SOL_SOCKET, name, (int)(bytes / 2));
}

/* A queue may exceed the buffer by a segment, and need more room when it is packed otherwise. */
static uint32_t with_slack(uint32_t queue)
{
	return queue > BUF_MAX / 2 ? BUF_MAX : queue + queue / 4 + SMALL_QUEUE;
}

/*
 * The old socket's buffer may have grown since its options were read: the peek itself
 * tunes it (tcp_rcv_space_adjust), and what came before the hold was complete fills it.
 */
static uint32_t rcvbuf_wanted(const struct flow *f)
{
	uint32_t dumped = (uint32_t)f->opts[OPT_RCVBUF];
	uint32_t wanted = f->recv_len ? with_slack(f->recv_len) : 0;

	return wanted > dumped ? wanted : dumped;
}

/* An older kernel has no SO_BUF_LOCK. */
static int restore_buf_lock(int fd, const struct flow *f)
{
	return f->opts_present & 1u << OPT_BUF_LOCK ? ms_opt_set(fd, f, OPT_BUF_LOCK) : 0;
}

static int fill_recv_queue(int fd, const struct flow *f)
{
	uint32_t dumped = (uint32_t)f->opts[OPT_RCVBUF], wanted = rcvbuf_wanted(f);
	const uint8_t *data = f->recv;
	size_t len = f->recv_len;
	int err = 0;

	if (wanted != dumped)
		err = set_buffer(fd, SO_RCVBUF, SO_RCVBUFFORCE, wanted);
	if (!err)
		err = ms_queue_send(fd, &data, &len);
	if (wanted == dumped || err)
		return err;
	err = set_buffer(fd, SO_RCVBUF, SO_RCVBUFFORCE, dumped);
	return err ? err : restore_buf_lock(fd, f);
}

/* A FIN that was received is not in the socket until it is played: rcv_nxt lies one lower. */
int ms_set_window(int fd, const struct flow *f, uint32_t snd_wnd)
{
	struct tcp_repair_window win = f->win;

	win.snd_wnd = snd_wnd;
	if (win.max_window < snd_wnd)
		win.max_window = snd_wnd;
	if (ms_fin_in(f)) {
		if (win.rcv_wup == f->rcv_nxt) {
			win.rcv_wup--;
			win.rcv_wnd++;
		}
		if (win.snd_wl1 == f->rcv_nxt)
			win.snd_wl1--;
	}
	return setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &win, sizeof(win)) ? -errno : 0;
}

/*
 * The kernel cuts segments to half of the largest window that the client ever showed
 * (tcp_bound_to_half_wnd), but reckons that anew only when an ack raises the largest window, and
 * connect() starts without one. A segment larger than the window would wait for the probe timer,
 * 200 ms for each window (measured: window 8192, MSS 8849, 13 s for 400 kB).
 */
static int maxseg_at_connect(const struct flow *f)
{
	uint32_t most = f->win.max_window / 2 + TS_BYTES, mss = f->mss;

	if (f->win.max_window && mss > most)
		mss = most > MAXSEG_MIN ? most : MAXSEG_MIN;
	return (int)(mss < MAXSEG_MAX ? mss : MAXSEG_MAX);
}

/*
 * Connects a closed socket in repair mode at the checkpoint's place in the stream,
 * with snd_una = snd_nxt = una, and fills its receive queue.
 */
int ms_seat(int fd, struct flow *f, uint32_t una, uint32_t snd_wnd)
{
	int err = ms_setint(fd, IPPROTO_TCP, TCP_MAXSEG, maxseg_at_connect(f));

	if (!err)
		err = set_seq(fd, TCP_SEND_QUEUE, una);
	if (err == -EPERM) /* only a closed socket takes them */
		return -EISCONN;
	if (!err)
		err = set_seq(fd, TCP_RECV_QUEUE, ms_rcv_end(f) - f->recv_len);
	if (!err)
		err = attach(fd, f);
	if (!err)
		err = set_negotiated(fd, f);
	if (!err)
		err = fill_recv_queue(fd, f);
	if (!err)
		err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE);
	if (!err)
		err = ms_set_window(fd, f, snd_wnd);
	if (!err) /* after the window: it lifts rcv_ssthresh to it */
		err = ms_opt_set(fd, f, OPT_WINDOW_CLAMP);
	f->seat = f->queued = una;
	f->seat_known = !err;
	f->snd_wnd = snd_wnd;
	return err;
}

uint32_t ms_sndbuf_wanted(const struct flow *f)
{
	uint32_t dumped = (uint32_t)f->opts[OPT_SNDBUF], queue = f->send_len;

	if (queue < SMALL_QUEUE)
		return dumped;
	queue = with_slack(queue);
	return queue > dumped ? queue : dumped;
}

/* Without CAP_NET_ADMIN in the first user namespace the kernel caps it: said before the commit. */
static int check_room(int fd, const struct flow *f)
{
	int bytes, err = ms_getint(fd, SOL_SOCKET, SO_SNDBUF, &bytes);

	return err ? err : bytes < (int)f->send_len ? -ENOBUFS : 0;
}

static int set_buffers(int fd, const struct flow *f)
{
	int err = set_buffer(fd, SO_SNDBUF, SO_SNDBUFFORCE, ms_sndbuf_wanted(f));

	if (!err)
		err = set_buffer(fd, SO_RCVBUF, SO_RCVBUFFORCE, (uint32_t)f->opts[OPT_RCVBUF]);
	return err || f->send_len < SMALL_QUEUE ? err : check_room(fd, f);
}

int ms_reset_sndbuf(int fd, const struct flow *f)
{
	int err = set_buffer(fd, SO_SNDBUF, SO_SNDBUFFORCE, (uint32_t)f->opts[OPT_SNDBUF]);

	return err ? err : restore_buf_lock(fd, f);
}

static int check_blank(int fd, const struct flow *f)
{
	int domain, err;

	err = ms_check_socket(fd, &domain);
	if (err)
		return err;
	return domain == (f->family == 4 ? AF_INET : AF_INET6) ? 0 : -EAFNOSUPPORT;
}

static int fill_blank(int fd, struct flow *f)
{
	socklen_t len;
	int err = set_buffers(fd, f);

	if (err)
		return err;
	len = (socklen_t)strlen(f->device);
	if (len && setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, f->device, len))
		return -errno;
	len = (socklen_t)strlen(f->congestion);
	if (len && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, f->congestion, len))
		return -errno;
	err = ms_opts_apply(fd, f, PHASE_RESTORE);
	if (!err)
		err = ms_seat(fd, f, ms_seat_of(f, f->una), f->win.snd_wnd);
	return err ? err : restore_buf_lock(fd, f);
}

static int restore_one(int fd, struct flow *f)
{
	int err = f->error;

	if (!err)
		err = check_blank(fd, f);
	if (!err)
		err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON);
	if (err)
		return err;
	err = fill_blank(fd, f);
	if (err == -EISCONN) /* somebody's live socket: at least not frozen */
		ms_setint(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP);
	return err;
}

int ms_tcp_restore(const int *blank_fds, size_t n, ms_tcp_batch *b, int *err)
{
	int failed = 0;

	if (n != b->n)
		return -EINVAL;
	for (size_t i = 0; i < n; i++) {
		err[i] = restore_one(blank_fds[i], &b->flows[i]);
		failed += !!err[i];
	}
	return failed;
}
