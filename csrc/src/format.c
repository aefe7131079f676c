// SPDX-License-Identifier: Apache-2.0
/*
 * format.c - checkpoints as bytes; docs/checkpoint-format.md is the layout.
 *
 * The reader trusts nothing: every length is checked before use, every value
 * against the others, and what is not known is refused, not skipped, since a
 * field that a reader skips is state that a stream loses.
 */
#include "internal.h"

#define MAGIC "MSTCPCKP"
#define VERSION 1
#define HEADER_BYTES 24
#define TRAILER_BYTES 8
#define FLOW_BYTES 96
#define OPTION_BYTES 12
#define RECORD_BYTES_MIN (4 + 8 + FLOW_BYTES)
#define MSS_MIN 88 /* TCP_MIN_MSS */

enum tag { TAG_FLOW = 1, TAG_OPTIONS, TAG_CONGESTION, TAG_DEVICE, TAG_SEND, TAG_RECV, TAG_END };

/* -- little-endian writing ---------------------------------------------------- */

static uint8_t *put(uint8_t *p, uint64_t v, int bytes)
{
	for (int i = 0; i < bytes; i++)
		*p++ = (uint8_t)(v >> 8 * i);
	return p;
}

static uint8_t *put_bytes(uint8_t *p, const void *from, size_t len)
{
	if (len)
		memcpy(p, from, len);
	return p + len;
}

static uint8_t *put_section(uint8_t *p, enum tag tag, size_t len)
{
	return put(put(put(p, tag, 2), 0, 2), len, 4);
}

static size_t sections_size(const struct flow *f)
{
	size_t options = (size_t)__builtin_popcount(f->opts_present) * OPTION_BYTES;

	return 6 * 8 + FLOW_BYTES + options + strlen(f->congestion) + strlen(f->device) +
	       f->send_len + f->recv_len;
}

static uint8_t *put_flow(uint8_t *p, const struct flow *f)
{
	const uint32_t numbers[] = {
	    f->write_seq,   f->outq,           f->nsd,
	    f->rcv_nxt,     f->tsval,          f->mss,
	    f->advmss,      f->min_rtt_us,     f->win.snd_wl1,
	    f->win.snd_wnd, f->win.max_window, f->win.rcv_wnd,
	    f->win.rcv_wup,
	};

	p = put_section(p, TAG_FLOW, FLOW_BYTES);
	p = put(p, f->family, 1);
	p = put(p, f->state, 1);
	p = put(p, f->tcpi_options, 1);
	p = put(p, f->snd_wscale, 1);
	p = put(p, f->rcv_wscale, 1);
	p = put(p, 0, 3);
	p = put_bytes(p, f->key.local, 16);
	p = put_bytes(p, f->key.remote, 16);
	p = put_bytes(p, &f->key.local_port, 2);
	p = put_bytes(p, &f->key.remote_port, 2);
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
		p = put(p, numbers[i], 4);
	return p;
}

static uint8_t *put_options(uint8_t *p, const struct flow *f)
{
	p = put_section(p, TAG_OPTIONS, (size_t)__builtin_popcount(f->opts_present) * OPTION_BYTES);
	for (int i = 0; i < OPT_COUNT; i++)
		if (f->opts_present & 1u << i)
			p = put(put(p, ms_opts[i].id, 4), f->opts[i], 8);
	return p;
}

static uint8_t *put_record(uint8_t *p, const struct flow *f)
{
	p = put(p, sections_size(f), 4);
	p = put_options(put_flow(p, f), f);
	p = put_section(p, TAG_CONGESTION, strlen(f->congestion));
	p = put_bytes(p, f->congestion, strlen(f->congestion));
	p = put_section(p, TAG_DEVICE, strlen(f->device));
	p = put_bytes(p, f->device, strlen(f->device));
	p = put_section(p, TAG_SEND, f->send_len);
	p = put_bytes(p, f->send, f->send_len);
	p = put_section(p, TAG_RECV, f->recv_len);
	return put_bytes(p, f->recv, f->recv_len);
}

int ms_tcp_encode(const ms_tcp_batch *b, uint8_t *buf, size_t cap, size_t *len)
{
	uint8_t *p = buf;
	size_t total = HEADER_BYTES + TRAILER_BYTES;

	for (size_t i = 0; i < b->n; i++) {
		if (b->flows[i].error)
			return -EINVAL;
		total += 4 + sections_size(&b->flows[i]);
	}
	*len = total;
	if (!buf)
		return 0;
	if (cap < total)
		return -ENOSPC;
	p = put_bytes(p, MAGIC, 8);
	p = put(put(put(put(p, VERSION, 2), 0, 2), b->n, 4), total, 8);
	for (size_t i = 0; i < b->n; i++)
		p = put_record(p, &b->flows[i]);
	put(p, ms_xxh64(buf, total - TRAILER_BYTES), 8);
	return 0;
}

/* -- reading ---------------------------------------------------------------- */

struct reader {
	const uint8_t *p, *end;
};

static uint64_t get(struct reader *r, int bytes)
{
	uint64_t v = 0;

	for (int i = 0; i < bytes; i++)
		v |= (uint64_t)*r->p++ << 8 * i;
	return v;
}

static void get_bytes(struct reader *r, void *to, size_t len)
{
	memcpy(to, r->p, len);
	r->p += len;
}

static size_t left(const struct reader *r)
{
	return (size_t)(r->end - r->p);
}

static int read_flow(struct flow *f, struct reader r)
{
	uint32_t *numbers[] = {
	    &f->write_seq,   &f->outq,           &f->nsd,
	    &f->rcv_nxt,     &f->tsval,          &f->mss,
	    &f->advmss,      &f->min_rtt_us,     &f->win.snd_wl1,
	    &f->win.snd_wnd, &f->win.max_window, &f->win.rcv_wnd,
	    &f->win.rcv_wup,
	};

	if (left(&r) != FLOW_BYTES)
		return -EPROTO;
	f->family = (uint8_t)get(&r, 1);
	f->state = (uint8_t)get(&r, 1);
	f->tcpi_options = (uint8_t)get(&r, 1);
	f->snd_wscale = (uint8_t)get(&r, 1);
	f->rcv_wscale = (uint8_t)get(&r, 1);
	if (get(&r, 3))
		return -ENOPROTOOPT;
	get_bytes(&r, f->key.local, 16);
	get_bytes(&r, f->key.remote, 16);
	get_bytes(&r, &f->key.local_port, 2);
	get_bytes(&r, &f->key.remote_port, 2);
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
		*numbers[i] = (uint32_t)get(&r, 4);
	return 0;
}

static int option_index(uint32_t id)
{
	for (int i = 0; i < OPT_COUNT; i++)
		if (ms_opts[i].id == id)
			return i;
	return -ENOPROTOOPT;
}

static int read_options(struct flow *f, struct reader r)
{
	if (left(&r) % OPTION_BYTES)
		return -EPROTO;
	while (left(&r)) {
		int index = option_index((uint32_t)get(&r, 4));

		if (index < 0)
			return index;
		if (f->opts_present & 1u << index)
			return -EPROTO;
		f->opts_present |= 1u << index;
		f->opts[index] = get(&r, 8);
	}
	return 0;
}

/* A name of at most size - 1 bytes that could be a name. */
static int read_name(char *to, size_t size, struct reader r)
{
	if (left(&r) >= size)
		return -EPROTO;
	for (const uint8_t *p = r.p; p < r.end; p++)
		if (*p <= ' ' || *p > '~' || *p == '/')
			return -EPROTO;
	get_bytes(&r, to, left(&r));
	return 0;
}

static int read_section(struct flow *f, unsigned int tag, struct reader r)
{
	switch (tag) {
	case TAG_FLOW:
		return read_flow(f, r);
	case TAG_OPTIONS:
		return read_options(f, r);
	case TAG_CONGESTION:
		return read_name(f->congestion, MS_CC_MAX, r);
	case TAG_DEVICE:
		return read_name(f->device, MS_DEV_MAX, r);
	case TAG_SEND:
		f->send = r.p;
		f->send_len = (uint32_t)left(&r);
		return 0;
	case TAG_RECV:
		f->recv = r.p;
		f->recv_len = (uint32_t)left(&r);
		return 0;
	default:
		return -ENOPROTOOPT;
	}
}

/* Sections come in the order of their tags, each once. */
static int read_record(struct flow *f, struct reader r)
{
	for (unsigned int tag = TAG_FLOW; tag < TAG_END; tag++) {
		unsigned int found, flags;
		size_t len;
		int err;

		if (left(&r) < 8)
			return -EPROTO;
		found = (unsigned int)get(&r, 2);
		flags = (unsigned int)get(&r, 2);
		len = get(&r, 4);
		if (found >= TAG_END || flags)
			return -ENOPROTOOPT;
		if (found != tag || len > left(&r))
			return -EPROTO;
		err = read_section(f, tag, (struct reader){r.p, r.p + len});
		if (err)
			return err;
		r.p += len;
	}
	return left(&r) ? -ENOPROTOOPT : 0;
}

/* -- does what was read make sense? ----------------------------------------- */

static bool sane_options(const struct flow *f)
{
	const uint32_t needed = 1u << OPT_SNDBUF | 1u << OPT_RCVBUF | 1u << OPT_WINDOW_CLAMP;

	for (int i = 0; i < OPT_COUNT; i++) {
		int64_t value = (int64_t)f->opts[i];
		bool wide =
		    i == OPT_MAX_PACING_RATE || i == OPT_RCVTIMEO_US || i == OPT_SNDTIMEO_US;

		if (!wide && (value < INT32_MIN || value > INT32_MAX))
			return false;
	}
	return (f->opts_present & needed) == needed && (int64_t)f->opts[OPT_SNDBUF] > 0 &&
	       (int64_t)f->opts[OPT_RCVBUF] > 0;
}

static bool sane_key(const struct flow *f)
{
	static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
	bool local4 = !memcmp(f->key.local, mapped, 12), remote4 = ms_mapped(f);

	if (f->family != 4 && f->family != 6)
		return false;
	return local4 == remote4 && (f->family == 6 || local4) && f->key.local_port &&
	       f->key.remote_port;
}

/* What the kernel would refuse at TCP_REPAIR_WINDOW. */
static bool sane_window(const struct flow *f)
{
	return f->win.max_window >= f->win.snd_wnd && !ms_before(f->rcv_nxt, f->win.rcv_wup) &&
	       !ms_before(f->rcv_nxt + f->win.rcv_wnd, f->win.snd_wl1);
}

static int check(const struct flow *f)
{
	uint32_t fin;

	if (ms_state_refusal(f->state) || !sane_key(f) || !sane_options(f) || !sane_window(f))
		return -EPROTO;
	if (f->snd_wscale > 14 || f->rcv_wscale > 14 || f->mss < MSS_MIN || f->mss > 65535)
		return -EPROTO;
	if (f->tcpi_options & ~(TCPI_OPT_TIMESTAMPS | TCPI_OPT_SACK | TCPI_OPT_WSCALE))
		return -ENOPROTOOPT;
	fin = ms_fin_out(f) && f->state != ST_FIN_WAIT2;
	if (f->nsd > f->outq || (uint64_t)f->send_len + fin != f->outq)
		return -EPROTO;
	return 0;
}

static int read_header(struct reader *r, size_t len, size_t *count)
{
	if (len < HEADER_BYTES + TRAILER_BYTES || memcmp(r->p, MAGIC, 8))
		return -EBADMSG;
	r->p += 8;
	if (get(r, 2) != VERSION || get(r, 2))
		return -ENOPROTOOPT;
	*count = get(r, 4);
	if (get(r, 8) != len)
		return -EBADMSG;
	r->end -= TRAILER_BYTES;
	if (*count > left(r) / RECORD_BYTES_MIN)
		return -EPROTO;
	return 0;
}

static int read_records(struct ms_tcp_batch *b, struct reader r)
{
	for (size_t i = 0; i < b->n; i++) {
		struct flow *f = &b->flows[i];
		size_t len;
		int err;

		if (left(&r) < 4)
			return -EPROTO;
		len = get(&r, 4);
		if (len > left(&r))
			return -EPROTO;
		err = read_record(f, (struct reader){r.p, r.p + len});
		if (!err)
			err = check(f);
		if (err)
			return err;
		r.p += len;
		ms_flow_reset(f);
	}
	return left(&r) ? -EPROTO : 0;
}

int ms_tcp_decode(const uint8_t *buf, size_t len, ms_tcp_batch **out)
{
	struct reader r = {buf, buf + len};
	struct ms_tcp_batch *b;
	uint8_t *copy;
	size_t count;
	int err;

	*out = NULL;
	err = read_header(&r, len, &count);
	if (err)
		return err;
	if (get(&(struct reader){r.end, buf + len}, 8) != ms_xxh64(buf, len - TRAILER_BYTES))
		return -EBADMSG;
	b = ms_batch_new(count);
	copy = b ? ms_arena_reserve(b, len, 0) : NULL;
	if (!copy) {
		ms_tcp_batch_free(b);
		return -ENOMEM;
	}
	ms_arena_commit(b, len);
	memcpy(copy, buf, len);
	err = read_records(b, (struct reader){copy + (r.p - buf), copy + (r.end - buf)});
	if (err) {
		ms_tcp_batch_free(b);
		return err;
	}
	*out = b;
	return 0;
}
