// SPDX-License-Identifier: Apache-2.0
/*
 * packets.c - the client's side of an activation: packets to be played to the
 * server as if the client had sent them. What they are for: midstream_tcp.h.
 */
#include <arpa/inet.h>

#include "internal.h"

#define FLAG_FIN 0x01
#define FLAG_RST 0x04
#define FLAG_PSH 0x08
#define FLAG_ACK 0x10

#define TS_BYTES 12
#define CHUNK_MIN 512

struct writer {
	uint8_t *buf;
	size_t cap, used;
	uint32_t *lens;
	size_t lens_cap, count;
};

struct segment {
	uint32_t seq;
	uint8_t flags;
	const uint8_t *data;
	uint32_t len;
};

static void put16(uint8_t *p, uint32_t v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
}

static void put32(uint8_t *p, uint32_t v)
{
	put16(p, v >> 16);
	put16(p + 2, v & 0xffff);
}

/* The ones' complement sum of RFC 1071, not yet folded. */
static uint64_t sum_bytes(uint64_t sum, const uint8_t *p, size_t len)
{
	for (; len > 1; p += 2, len -= 2)
		sum += (uint64_t)(p[0] << 8 | p[1]);
	return len ? sum + (uint64_t)(p[0] << 8) : sum;
}

static uint16_t fold(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

/* The IP header, and the sum of its pseudo header. *addr_len: bytes of an address. */
static uint64_t put_ip(uint8_t *p, const struct flow *f, uint32_t tcp_len, size_t *header)
{
	uint64_t sum = IPPROTO_TCP + tcp_len;

	if (ms_mapped(f)) {
		memset(p, 0, 20);
		p[0] = 0x45;
		put16(p + 2, 20 + tcp_len);
		p[6] = 0x40; /* don't fragment */
		p[8] = 64;
		p[9] = IPPROTO_TCP;
		memcpy(p + 12, f->key.remote + 12, 4);
		memcpy(p + 16, f->key.local + 12, 4);
		put16(p + 10, fold(sum_bytes(0, p, 20)));
		*header = 20;
		return sum_bytes(sum, p + 12, 8);
	}
	memset(p, 0, 8);
	p[0] = 0x60;
	put16(p + 4, tcp_len);
	p[6] = IPPROTO_TCP;
	p[7] = 64;
	memcpy(p + 8, f->key.remote, 16);
	memcpy(p + 24, f->key.local, 16);
	*header = 40;
	return sum_bytes(sum, p + 8, 32);
}

static void put_tcp(uint8_t *p, const struct flow *f, const struct note_view *v,
		    const struct segment *s, uint32_t header)
{
	memset(p, 0, header);
	memcpy(p, &f->key.remote_port, 2);
	memcpy(p + 2, &f->key.local_port, 2);
	put32(p + 4, s->seq);
	put32(p + 8, v->ack);
	p[12] = (uint8_t)(header / 4 << 4);
	p[13] = s->flags;
	put16(p + 14, v->window);
	if (header > 20) {
		put32(p + 20, 0x0101080a); /* NOP, NOP, timestamps */
		put32(p + 24, v->tsval);
		put32(p + 28, v->tsecr);
	}
	if (s->len)
		memcpy(p + header, s->data, s->len);
}

static int add(struct writer *w, const struct flow *f, const struct note_view *v, struct segment s)
{
	uint32_t header = 20 + (v->timestamps ? TS_BYTES : 0), tcp_len = header + s.len;
	uint8_t *p = w->buf + w->used;
	size_t ip;
	uint64_t sum;

	if (w->cap - w->used < 40 + tcp_len || w->count == w->lens_cap)
		return -ENOSPC;
	sum = put_ip(p, f, tcp_len, &ip);
	put_tcp(p + ip, f, v, &s, header);
	put16(p + ip + 16, fold(sum_bytes(sum, p + ip, tcp_len)));
	w->lens[w->count++] = (uint32_t)(ip + tcp_len);
	w->used += ip + tcp_len;
	return 0;
}

/* The kept payload, in pieces that fit the path, the FIN on the last. */
static int add_data(struct writer *w, const struct flow *f, const struct note_view *v)
{
	uint32_t chunk = f->advmss > CHUNK_MIN + TS_BYTES ? f->advmss - TS_BYTES : CHUNK_MIN;
	int err = 0;

	for (uint32_t at = 0; !err && at < v->data_len; at += chunk) {
		uint32_t left = v->data_len - at, len = left < chunk ? left : chunk;
		uint8_t fin = v->fin && len == left ? FLAG_FIN : 0;

		err = add(w, f, v,
			  (struct segment){ms_rcv_end(f) + at, FLAG_ACK | FLAG_PSH | fin,
					   v->data + at, len});
	}
	return err;
}

/* Will finish make the socket emit something that carries its ack and window? */
static bool will_speak(const struct flow *f)
{
	if (f->phase != PH_SEATED || !ms_before(f->queued, ms_data_end(f)))
		return false;
	return ms_before(f->queued, f->una + f->snd_wnd);
}

static int add_play(struct writer *w, const struct flow *f, const struct note_view *v)
{
	static const uint8_t old_byte;
	bool known_fin = ms_fin_in(f) && f->phase != PH_IN_PLACE;
	int err = 0;

	if (known_fin)
		err = add(w, f, v, (struct segment){ms_rcv_end(f), FLAG_ACK | FLAG_FIN, NULL, 0});
	if (err || v->rst)
		return err ? err
			   : add(w, f, v,
				 (struct segment){f->rcv_nxt, FLAG_RST | FLAG_ACK, NULL, 0});
	if (v->data_len)
		err = add_data(w, f, v);
	else if (v->fin)
		err = add(w, f, v, (struct segment){ms_rcv_end(f), FLAG_ACK | FLAG_FIN, NULL, 0});
	if (err || known_fin || v->fin || will_speak(f))
		return err;
	/*
	 * One byte that was received long ago. It is in the window's reach for tcp_sequence(), so
	 * its ack and window count, and it is answered at once, without the rate limit of bare
	 * ACKs.
	 */
	return add(w, f, v, (struct segment){ms_rcv_end(f) - 1, FLAG_ACK | FLAG_PSH, &old_byte, 1});
}

/* In place, a FIN of the client is behind the socket already. */
static uint32_t next_seq(const struct flow *f)
{
	return f->phase == PH_IN_PLACE ? f->rcv_nxt : ms_rcv_end(f);
}

static int add_prime(struct writer *w, const struct flow *f, const struct note_view *v)
{
	return add(w, f, v, (struct segment){next_seq(f), FLAG_ACK, NULL, 0});
}

int ms_tcp_client_packets(const ms_tcp_batch *b, const struct ms_flow_note *notes, int what,
			  uint8_t *buf, size_t cap, uint32_t *lens, size_t lens_cap, size_t *count)
{
	struct writer w = {.buf = buf, .cap = cap, .lens = lens, .lens_cap = lens_cap};
	int err = what == MS_TCP_PRIME || what == MS_TCP_PLAY ? 0 : -EINVAL;

	for (size_t i = 0; !err && i < b->n; i++) {
		const struct flow *f = &b->flows[i];
		struct note_view v = ms_note_view(f, notes ? &notes[i] : NULL);

		if (!f->error)
			err = what == MS_TCP_PRIME ? add_prime(&w, f, &v) : add_play(&w, f, &v);
	}
	*count = w.count;
	return err;
}
