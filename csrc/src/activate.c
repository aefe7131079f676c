// SPDX-License-Identifier: Apache-2.0
/*
 * activate.c - from held to live, at the target and, after a rollback, at the source.
 *
 * Why in this order: see ACTIVATE in midstream_tcp.h. begin ends with sockets that
 * are out of repair mode and have emitted nothing; finish lets them speak.
 */
#include "internal.h"

#define INIT_CWND 10     /* TCP_INIT_CWND: what a fresh socket may have in flight */
#define MSS_SMALL 536    /* RFC 9293, 3.7.1 */
#define PADDING_MAX 2048 /* segments, some 3 MB at an MTU of 1500 */
#define NEARBY_RTT_US 5000
#define ROOM_MAX (1u << 30)

typedef int (*flow_fn)(int fd, struct flow *f, const struct ms_flow_note *note);

static int each(const int *fds, size_t n, struct ms_tcp_batch *b, const struct ms_flow_note *notes,
		int *err, flow_fn fn)
{
	int failed = 0;

	if (n != b->n)
		return -EINVAL;
	for (size_t i = 0; i < n; i++) {
		err[i] = b->flows[i].error ? 0 : fn(fds[i], &b->flows[i], notes ? &notes[i] : NULL);
		failed += !!err[i];
	}
	return failed;
}

static int in_repair(int fd)
{
	int on, err = ms_getint(fd, IPPROTO_TCP, TCP_REPAIR, &on);

	return err ? err : on != 0;
}

/* Ends repair without a window probe: nothing may be emitted before the client's segment is played.
 */
static int leave_repair(int fd, const struct flow *f)
{
	int err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP);

	return err ? err : ms_opts_apply(fd, f, PHASE_LIVE); /* repair left SO_REUSEADDR 0 */
}

static bool fin_acked(const struct flow *f)
{
	return ms_fin_out(f) && f->una == f->write_seq;
}

static uint32_t segment_bytes(const struct flow *f)
{
	uint32_t options = f->tcpi_options & TCPI_OPT_TIMESTAMPS ? 12 : 0;

	return f->mss > MSS_SMALL + options ? f->mss - options : MSS_SMALL;
}

/*
 * What the client may have although its ack did not come in time must be in the
 * queue as sent, or leave at once as new data: an ack beyond snd_nxt is dropped,
 * for ever if nothing more is sent. New data has no retransmit timer to wait for,
 * but only whole segments are sure to leave: INIT_CWND of them, and within the
 * window, whose last bytes the old socket may have used with a part of one (a part
 * alone is a send of its own: send_into_window). Of more, the last segment is new,
 * and its SACK starts the recovery. Returns the end of what is queued as sent.
 */
static uint32_t in_flight_end(const struct flow *f, uint32_t snd_wnd)
{
	uint32_t end = ms_sent_end(f), segment = segment_bytes(f), segments;

	if (fin_acked(f) || ms_before(end, f->una))
		return ms_seat_of(f, f->una);
	segments = (end - f->una + segment - 1) / segment;
	/* The window has shrunk below what is in flight: nothing new may leave. */
	if (end - f->una > snd_wnd)
		return end;
	if (segments <= 1 || (segments <= INIT_CWND && segments * segment <= snd_wnd))
		return ms_seat_of(f, f->una);
	return end - segment;
}

/*
 * A fresh socket has a window of INIT_CWND segments, so with more than that queued
 * as sent the new segment would have to wait for a timer (1 s). Therefore bytes that
 * the client has acknowledged long ago are queued before them, one a segment, for
 * PRIME to acknowledge: slow start then grows the window by as many. Should one ever
 * be sent, the client drops it as old. The price is an RTT sample of microseconds,
 * which a client nearby hardly notices, and for one far away would mislead BBR for
 * ten seconds; but there acks are still on their way when the hold ends, and open
 * the window by themselves.
 */
static uint32_t padding(const struct flow *f, uint32_t snd_wnd)
{
	uint32_t segments = (in_flight_end(f, snd_wnd) - ms_seat_of(f, f->una)) / segment_bytes(f);

	if (segments + 2 <= INIT_CWND || segments > PADDING_MAX || f->min_rtt_us > NEARBY_RTT_US)
		return 0;
	return segments + 2 - INIT_CWND;
}

static int queue_padding(int fd, uint32_t count)
{
	static uint8_t byte;
	struct iovec iov = {&byte, 1};
	struct mmsghdr messages[64] = {0};

	for (int i = 0; i < 64; i++)
		messages[i].msg_hdr = (struct msghdr){.msg_iov = &iov, .msg_iovlen = 1};
	while (count) {
		int sent =
		    sendmmsg(fd, messages, count < 64 ? count : 64, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (sent <= 0)
			return errno == EAGAIN ? -ENOBUFS : -errno;
		count -= (uint32_t)sent;
	}
	return 0;
}

/* Room for it all whatever the socket had, and a congestion control without a memory for RTTs. */
static int prepare_padding(int fd, struct flow *f)
{
	int room = (int)(ms_sndbuf_wanted(f) + f->pad * 2048);
	int err = ms_setint(fd, SOL_SOCKET, SO_SNDBUFFORCE, room);

	if (err)
		err = ms_setint(fd, SOL_SOCKET, SO_SNDBUF, room);
	if (!err && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4))
		err = -errno;
	return err;
}

/* Puts the padding and the bytes up to `end` into the send queue as sent, without sending them. */
static int queue_as_sent(int fd, struct flow *f, uint32_t end)
{
	const uint8_t *data = f->send + (f->una - ms_data_start(f));
	size_t len = end - ms_seat_of(f, f->una);
	int err = 0;

	if (f->pad)
		err = prepare_padding(fd, f);
	if (!err)
		err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
	if (!err)
		err = queue_padding(fd, f->pad);
	if (!err)
		err = ms_queue_send(fd, &data, &len);
	f->queued = end - (uint32_t)len;
	if (!err && fin_acked(f) && shutdown(fd, SHUT_WR))
		err = -errno;
	if (!err)
		err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE);
	return err;
}

static int queue_in_flight(int fd, struct flow *f)
{
	uint32_t end = in_flight_end(f, f->snd_wnd);

	f->queued = ms_seat_of(f, f->una);
	if (end == f->queued && !fin_acked(f))
		return 0;
	return queue_as_sent(fd, f, end);
}

/* Back to the buffer and the congestion control that the socket had. */
static int settle(int fd, struct flow *f)
{
	socklen_t len = (socklen_t)strlen(f->congestion);
	bool grown = f->pad || ms_sndbuf_wanted(f) != (uint32_t)f->opts[OPT_SNDBUF];

	if (f->pad && len && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, f->congestion, len))
		return -errno;
	f->pad = 0;
	return grown ? ms_reset_sndbuf(fd, f) : 0;
}

static int send_some(int fd, struct flow *f, uint32_t end)
{
	const uint8_t *data = f->send + (f->queued - ms_data_start(f));
	size_t len = end - f->queued;
	bool grown = false;
	uint32_t room;
	int err;

	if (!ms_before(f->queued, end))
		return 0;
	err = ms_queue_send(fd, &data, &len);
	/* The socket once had room for it, packed otherwise; of small segments most is overhead. */
	for (room = ms_sndbuf_wanted(f) + f->send_len; err == -ENOBUFS && room < ROOM_MAX;
	     room *= 2) {
		if (ms_setint(fd, SOL_SOCKET, SO_SNDBUFFORCE, (int)room))
			break;
		err = ms_queue_send(fd, &data, &len);
		grown = true;
	}
	if (grown)
		ms_reset_sndbuf(fd, f);
	f->queued = end - (uint32_t)len;
	return err;
}

/*
 * A segment that is larger than the client's window waits for the probe timer, a second
 * or three of a fresh socket. So what such a window takes is a send, and thereby a
 * segment, of its own.
 */
static int send_into_window(int fd, struct flow *f, uint32_t end)
{
	if (f->snd_wnd >= segment_bytes(f) || fin_acked(f))
		return 0;
	return send_some(fd, f, end - f->una > f->snd_wnd ? f->una + f->snd_wnd : end);
}

/* The rest of the queue as new data: Nagle is off for what was in flight already (else: 956 ms). */
static int send_rest(int fd, struct flow *f)
{
	bool nagle = !f->opts[OPT_NODELAY], corked = f->opts[OPT_CORK],
	     open = ms_fin_out(f) && !fin_acked(f);
	uint32_t first = corked ? ms_sent_end(f) : ms_data_end(f);
	int err = 0;

	if (nagle && f->queued != ms_data_end(f))
		err = ms_setint(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	if (!err)
		err = send_into_window(fd, f, first);
	if (!err)
		err = send_some(fd, f, first);
	if (!err && corked)
		err = ms_opt_set(fd, f, OPT_CORK);
	if (!err && corked)
		err = send_some(fd, f, ms_data_end(f));
	if (!err && open && shutdown(fd, SHUT_WR))
		err = -errno;
	if (nagle && !ms_setint(fd, IPPROTO_TCP, TCP_NODELAY, 0))
		return err;
	return err;
}

static int seat_again(int fd, struct flow *f, uint32_t snd_wnd)
{
	int err = ms_disconnect(fd);

	return err ? err : ms_seat(fd, f, ms_seat_of(f, f->una) - f->pad, snd_wnd);
}

/* From here on the socket's place in the stream is right; what is in flight comes next. */
static int go_live(int fd, struct flow *f)
{
	int err = f->phase == PH_DEAD ? 0 : queue_in_flight(fd, f);

	if (!err)
		err = ms_opts_apply(fd, f, PHASE_BEGIN);
	if (!err)
		err = leave_repair(fd, f);
	return err;
}

static struct note_view take_note(struct flow *f, const struct ms_flow_note *note,
				  uint32_t *snd_wnd)
{
	struct note_view v = ms_note_view(f, note);

	f->una = v.ack;
	f->phase = v.rst ? PH_DEAD : PH_SEATED;
	*snd_wnd = v.segment ? v.window << f->snd_wscale : f->win.snd_wnd;
	f->pad = v.rst ? 0 : padding(f, *snd_wnd);
	return v;
}

static int activate_begin(int fd, struct flow *f, const struct ms_flow_note *note)
{
	uint32_t snd_wnd;
	int err = in_repair(fd);

	if (err < 0)
		return err;
	take_note(f, note, &snd_wnd);
	if (!err) {
		f->phase = f->phase == PH_DEAD ? PH_DEAD : PH_LIVE_ALREADY;
		return 0;
	}
	if (!f->seat_known || f->seat != ms_seat_of(f, f->una) - f->pad)
		err = seat_again(fd, f, snd_wnd);
	else
		err = snd_wnd == f->snd_wnd ? 0 : ms_set_window(fd, f, snd_wnd);
	f->snd_wnd = snd_wnd;
	/*
	 * The hold answered with the dumped value, so the clock goes on from there: ahead of what
	 * the client saw, and not by the length of the hold, which the client's echo would turn
	 * into an RTT of seconds. + 2, as the lowest bit says whether the clock ticks in
	 * microseconds.
	 */
	if (!err)
		err = ms_setint(fd, IPPROTO_TCP, TCP_TIMESTAMP, (int)(f->tsval + 2));
	return err < 0 ? err : go_live(fd, f);
}

/*
 * May the frozen socket just go on? Not with bytes in flight: those were lost at the
 * gate, their acks absorbed, its timers have backed off, and the hold's length would
 * become its RTT. Not if it timed out meanwhile.
 */
static bool can_stay(int fd, const struct flow *f)
{
	struct tcp_info info;
	socklen_t len = sizeof(info);
	int outq = 0, nsd = 0;

	if (f->disturbed || f->outq != f->nsd)
		return false;
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) || info.tcpi_state != f->state)
		return false;
	if (f->outq && (ioctl(fd, SIOCOUTQ, &outq) || ioctl(fd, SIOCOUTQNSD, &nsd)))
		return false;
	return outq == (int)f->outq && nsd == (int)f->nsd;
}

static int thaw_begin(int fd, struct flow *f, const struct ms_flow_note *note)
{
	uint32_t snd_wnd;
	int err = in_repair(fd);

	if (err < 0)
		return err;
	take_note(f, note, &snd_wnd);
	if (!err) {
		f->phase = f->phase == PH_DEAD ? PH_DEAD : PH_LIVE_ALREADY;
		return 0;
	}
	if (can_stay(fd, f)) {
		f->phase = f->phase == PH_DEAD ? PH_DEAD : PH_IN_PLACE;
		return leave_repair(fd, f);
	}
	err = seat_again(fd, f,
			 snd_wnd); /* its clock ran on and is ahead of all that the client saw */
	return err ? err : go_live(fd, f);
}

/* Bytes that were waiting in the socket all the time: setting TCP_NODELAY pushes them. */
static int push(int fd, const struct flow *f)
{
	int err;

	if (!f->nsd)
		return 0;
	err = ms_setint(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	if (!err && !f->opts[OPT_NODELAY])
		err = ms_setint(fd, IPPROTO_TCP, TCP_NODELAY, 0);
	return err;
}

/* An earlier process got this far and died: has all of the send queue been queued? */
static int catch_up(int fd, struct flow *f)
{
	uint32_t seq = 0;
	int err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON), off;

	if (err)
		return err;
	err = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
	if (!err)
		err = ms_getint(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, (int *)&seq);
	off = ms_setint(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE);
	if (!off)
		off = leave_repair(fd, f);
	if (err || off)
		return err ? err : off;
	if (ms_before(seq, ms_una(f)) ||
	    !ms_before(seq, ms_data_end(f) + (ms_fin_out(f) && !fin_acked(f))))
		return 0;
	f->queued = seq;
	return send_rest(fd, f);
}

static int finish(int fd, struct flow *f, const struct ms_flow_note *note)
{
	int err = 0, off;

	(void)note;
	switch (f->phase) {
	case PH_NONE:
		return -ESTALE;
	case PH_DEAD: /* a send would take the ECONNRESET that is the application's */
		return 0;
	case PH_IN_PLACE:
		return push(fd, f);
	case PH_LIVE_ALREADY:
		return catch_up(fd, f);
	case PH_SEATED: /* CLOSING becomes LAST_ACK: the client's FIN was played before ours is sent
			 */
		err = send_rest(fd, f);
		off = settle(fd, f);
		return err ? err : off;
	}
	return -EINVAL;
}

int ms_tcp_activate_begin(const int *fds, size_t n, ms_tcp_batch *b,
			  const struct ms_flow_note *notes, int *err)
{
	return each(fds, n, b, notes, err, activate_begin);
}

int ms_tcp_activate_finish(const int *fds, size_t n, ms_tcp_batch *b,
			   const struct ms_flow_note *notes, int *err)
{
	return each(fds, n, b, notes, err, finish);
}

int ms_tcp_thaw_begin(const int *fds, size_t n, ms_tcp_batch *b, const struct ms_flow_note *notes,
		      int *err)
{
	return each(fds, n, b, notes, err, thaw_begin);
}

int ms_tcp_thaw_finish(const int *fds, size_t n, ms_tcp_batch *b, const struct ms_flow_note *notes,
		       int *err)
{
	return each(fds, n, b, notes, err, finish);
}
