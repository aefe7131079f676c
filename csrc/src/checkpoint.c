// SPDX-License-Identifier: Apache-2.0
/*
 * checkpoint.c - freezing sockets and reading them.
 *
 * A dump takes several system calls and is not atomic: under load the receive
 * queue changed between TCP_QUEUE_SEQ and the peek in 1 of 5,000 uploads, the
 * send queue in 1 of 5,000 downloads, which shifts the stream in silence. So
 * everything is read between two equal readings of what can change.
 */
#include "internal.h"

#define ROUNDS_MAX 16
#define CHUNK_BYTES ((size_t)1 << 20)
#define PEEK_SLACK 65536 /* the head of the send queue may begin before snd_una, by one segment */

/* What a round read, before it is known to be stable. */
struct dump {
	uint32_t write_seq, rcv_nxt;
	int outq, nsd, inq;
	ssize_t sent, received; /* bytes that the peeks returned */
	const uint8_t *send, *recv;
	struct tcp_info info;
	struct tcp_repair_window win;
};

static int get_u32(int fd, int name, uint32_t *value)
{
	return ms_getint(fd, IPPROTO_TCP, name, (int *)value);
}

static int select_queue(int fd, int queue)
{
	return ms_setint(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue);
}

/* Returns bytes peeked into the arena, or -errno. */
static ssize_t peek(int fd, struct ms_tcp_batch *b, size_t room, const uint8_t **bytes)
{
	uint8_t *p = ms_arena_reserve(b, room, CHUNK_BYTES);
	ssize_t got;

	if (!p)
		return -ENOMEM;
	got = recv(fd, p, room, MSG_PEEK | MSG_DONTWAIT);
	if (got < 0)
		return errno == EAGAIN ? 0 : -errno;
	ms_arena_commit(b, (size_t)got);
	*bytes = p;
	return got;
}

/*
 * While the queue is SEND, any attempt of the kernel to transmit (a late ACK, TSQ,
 * pacing) marks all unsent bytes as sent without sending them. So the split is
 * read before, and the queue is SEND for three calls.
 */
static int read_send_queue(int fd, struct ms_tcp_batch *b, struct dump *d)
{
	int err;

	d->sent = 0;
	if (ioctl(fd, SIOCOUTQNSD, &d->nsd) || ioctl(fd, SIOCOUTQ, &d->outq))
		return -errno;
	err = select_queue(fd, TCP_SEND_QUEUE);
	if (!err)
		err = get_u32(fd, TCP_QUEUE_SEQ, &d->write_seq);
	if (!err && d->outq)
		d->sent = peek(fd, b, (size_t)d->outq + PEEK_SLACK, &d->send);
	return err ? err : d->sent < 0 ? (int)d->sent : 0;
}

/* The state and the windows are read in here, too: what brackets the queue brackets them. */
static int read_recv_queue(int fd, struct ms_tcp_batch *b, struct dump *d)
{
	socklen_t info_len = sizeof(d->info), win_len = sizeof(d->win);
	uint32_t again;
	int err;

	d->received = 0;
	err = select_queue(fd, TCP_RECV_QUEUE);
	if (!err)
		err = get_u32(fd, TCP_QUEUE_SEQ, &d->rcv_nxt);
	if (err)
		return err;
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &d->info, &info_len) ||
	    getsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &d->win, &win_len) ||
	    ioctl(fd, SIOCINQ, &d->inq))
		return -errno;
	if (d->inq)
		d->received = peek(fd, b, (size_t)d->inq, &d->recv);
	if (d->received < 0)
		return (int)d->received;
	err = get_u32(fd, TCP_QUEUE_SEQ, &again);
	if (err)
		return err;
	return again == d->rcv_nxt ? 0 : -EAGAIN;
}

/* Takes a stable round over into the flow. -EAGAIN: not stable after all. */
static int accept_dump(struct flow *f, const struct dump *d, int first_nsd, int outq, int nsd)
{
	const struct tcp_info *info = &d->info;
	uint32_t fin, want;
	int err;

	if (outq != d->outq)
		return -EAGAIN;
	err = ms_state_refusal(info->tcpi_state);
	if (err)
		return err;
	f->state = info->tcpi_state;
	fin = ms_fin_out(f) && f->state != ST_FIN_WAIT2;
	if (d->outq < (int)fin)
		return -EAGAIN;
	want = (uint32_t)d->outq - fin;
	if (d->sent < (ssize_t)want)
		return -EAGAIN;
	if (d->received != d->inq) /* a peek ends where urgent data begins */
		return -EBUSY;
	f->write_seq = d->write_seq;
	f->outq = (uint32_t)d->outq;
	/* The first reading: the split may have been disturbed since, by us. */
	f->nsd = (uint32_t)(first_nsd < d->outq ? first_nsd : d->outq);
	f->disturbed = nsd != (int)f->nsd;
	f->rcv_nxt = d->rcv_nxt;
	f->win = d->win;
	f->send = d->send + (d->sent - (ssize_t)want); /* the tail: its end is write_seq */
	f->send_len = want;
	f->recv = d->recv;
	f->recv_len = (uint32_t)d->received;
	f->tcpi_options =
	    info->tcpi_options & (TCPI_OPT_TIMESTAMPS | TCPI_OPT_SACK | TCPI_OPT_WSCALE);
	f->snd_wscale = info->tcpi_snd_wscale;
	f->rcv_wscale = info->tcpi_rcv_wscale;
	f->advmss = info->tcpi_advmss;
	f->min_rtt_us = info->tcpi_min_rtt;
	return 0;
}

static int read_queues(int fd, struct ms_tcp_batch *b, struct flow *f)
{
	int first_nsd = -1, outq, nsd, err;
	struct dump d = {0};

	for (f->rounds = 1; f->rounds <= ROUNDS_MAX; f->rounds++) {
		err = read_send_queue(fd, b, &d);
		if (first_nsd < 0)
			first_nsd = d.nsd;
		if (!err)
			err = read_recv_queue(fd, b, &d);
		if (select_queue(fd, TCP_NO_QUEUE))
			return -errno;
		if (!err && (ioctl(fd, SIOCOUTQ, &outq) || ioctl(fd, SIOCOUTQNSD, &nsd)))
			return -errno;
		if (!err)
			err = accept_dump(f, &d, first_nsd, outq, nsd);
		if (err != -EAGAIN)
			return err;
	}
	return -EAGAIN;
}

static int read_frozen(int fd, struct ms_tcp_batch *b, struct flow *f)
{
	int err = read_queues(fd, b, f);

	if (!err)
		err = get_u32(fd, TCP_TIMESTAMP, &f->tsval);
	if (!err)
		err = get_u32(fd, TCP_MAXSEG,
			      &f->mss); /* in repair mode: mss_clamp, not the current mss */
	return err;
}

/* A failed call says little about why: let the state say it. */
static int refine(int fd, int err)
{
	struct tcp_info info;
	socklen_t len = sizeof(info);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0 &&
	    ms_state_refusal(info.tcpi_state))
		return ms_state_refusal(info.tcpi_state);
	return err;
}

static int checkpoint_one(int fd, struct ms_tcp_batch *b, struct flow *f)
{
	int domain, err;

	err = ms_check_socket(fd, &domain);
	if (err)
		return err;
	f->family = domain == AF_INET ? 4 : 6;
	err = ms_flow_key_of(fd, &f->key);
	if (!err)
		err = ms_check_pending(fd);
	if (!err)
		err = ms_opts_read(fd, f);
	if (err)
		return refine(fd, err);
	/* Frozen already (SK_FORCE_REUSE): what it was is not known; accepted sockets inherit 1. */
	if (f->opts[OPT_REUSEADDR] > 1)
		f->opts[OPT_REUSEADDR] = 1;
	err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON);
	if (err)
		return refine(fd, err);
	err = read_frozen(fd, b, f);
	if (err && !ms_setint(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP))
		ms_opt_set(fd, f, OPT_REUSEADDR);
	return err;
}

int ms_tcp_checkpoint(const int *fds, size_t n, ms_tcp_batch **out, int *err)
{
	struct ms_tcp_batch *b = ms_batch_new(n);
	int failed = 0;

	*out = b;
	if (!b)
		return -ENOMEM;
	for (size_t i = 0; i < n; i++) {
		struct flow *f = &b->flows[i];

		err[i] = checkpoint_one(fds[i], b, f);
		f->error = err[i];
		ms_flow_reset(f);
		failed += !!err[i];
	}
	return failed;
}
