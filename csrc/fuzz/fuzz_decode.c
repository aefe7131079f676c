// SPDX-License-Identifier: Apache-2.0
/*
 * fuzz_decode.c - libFuzzer target: bytes of a hostile peer into ms_tcp_decode(),
 * and, when they pass, into every call that works on a batch without a socket.
 *
 * A checkpoint has three nested lengths and a checksum. Blind mutation would never
 * get past them, so the mutator changes the inside and then mends the outside; a
 * part is left broken, as those refusals are the parser's first lines.
 */
#include <stdlib.h>

#include "internal.h"

#define HEADER_BYTES 24
#define TRAILER_BYTES 8
#define TOTAL_AT 16
#define SECTIONS 6
#define SECTION_HEADER_BYTES 8

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned int seed);

static void must(int truth)
{
	if (!truth)
		abort();
}

/* -- what is fuzzed ------------------------------------------------------------ */

/* Notes come from a peer, too: made of the input's bytes, but likely to fit the flow. */
static struct ms_flow_note *make_notes(const ms_tcp_batch *b, const uint8_t *data, size_t size)
{
	struct ms_flow_note *notes = calloc(b->n + 1, sizeof(*notes));

	must(notes != NULL);
	for (size_t i = 0; i < b->n; i++) {
		const struct flow *f = &b->flows[i];
		struct ms_flow_note *note = &notes[i];

		for (size_t at = 0; at < sizeof(*note); at++)
			((uint8_t *)note)[at] = data[(at * 7 + i) % size];
		note->ack = ms_una(f) + note->ack % (f->outq + 2);
		note->data_seq = ms_rcv_end(f) - note->data_seq % 4;
		if (note->seq % 8)
			note->data_len %= MS_NOTE_DATA_MAX + 1;
	}
	return notes;
}

static void make_packets(const ms_tcp_batch *b, const struct ms_flow_note *notes, int what)
{
	size_t cap = b->n * MS_TCP_PACKET_BYTES_MAX, count = 0, sum = 0;
	uint8_t *buf = malloc(cap + 1);
	uint32_t *lens = calloc(b->n * MS_TCP_PACKETS_MAX + 1, sizeof(*lens));

	must(buf && lens);
	must(!ms_tcp_client_packets(b, notes, what, buf, cap, lens, b->n * MS_TCP_PACKETS_MAX,
				    &count));
	for (size_t i = 0; i < count; i++)
		sum += lens[i];
	must(sum <= cap && count <= b->n * MS_TCP_PACKETS_MAX);
	free(buf);
	free(lens);
}

static void summarize(const ms_tcp_batch *b)
{
	struct ms_tcp_summary *summaries = calloc(b->n + 1, sizeof(*summaries));
	struct ms_flow_key *keys = calloc(b->n + 1, sizeof(*keys));
	struct ms_flow_ctl *ctls = calloc(b->n + 1, sizeof(*ctls));
	uint8_t *families = calloc(b->n + 1, 1);

	must(summaries && keys && ctls && families);
	must(!ms_tcp_summaries(b, summaries) && !ms_tcp_flow_ctl(b, MS_FLOW_HELD, keys, ctls) &&
	     !ms_tcp_families(b, families));
	for (size_t i = 0; i < b->n; i++)
		must((families[i] == 4 || families[i] == 6) &&
		     summaries[i].unsent_bytes <= summaries[i].send_bytes);
	free(summaries);
	free(keys);
	free(ctls);
	free(families);
}

/* What was read is written the same way again, but for the order of options. */
static void check_round_trip(const ms_tcp_batch *b, size_t size)
{
	uint8_t *first, *second;
	ms_tcp_batch *again;
	size_t len;

	must(!ms_tcp_encode(b, NULL, 0, &len) && len == size);
	first = malloc(len);
	second = malloc(len);
	must(first && second);
	must(ms_tcp_encode(b, first, len - 1, &len) == -ENOSPC);
	must(!ms_tcp_encode(b, first, len, &len));
	must(!ms_tcp_decode(first, len, &again));
	must(!ms_tcp_encode(again, second, len, &len) && !memcmp(first, second, len));
	ms_tcp_batch_free(again);
	free(first);
	free(second);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct ms_flow_note *notes;
	ms_tcp_batch *b;
	int err = ms_tcp_decode(data, size, &b);

	if (err) {
		must(!b && (err == -EBADMSG || err == -EPROTO || err == -ENOPROTOOPT));
		return 0;
	}
	notes = make_notes(b, data, size);
	summarize(b);
	make_packets(b, notes, MS_TCP_PRIME);
	make_packets(b, notes, MS_TCP_PLAY);
	check_round_trip(b, size);
	ms_tcp_batch_free(b);
	free(notes);
	return 0;
}

/* -- the mutator --------------------------------------------------------------- */

static uint32_t get32(const uint8_t *p)
{
	return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void put_le(uint8_t *p, uint64_t v, int bytes)
{
	for (int i = 0; i < bytes; i++)
		p[i] = (uint8_t)(v >> 8 * i);
}

static void mend_outside(uint8_t *data, size_t size)
{
	if (size < HEADER_BYTES + TRAILER_BYTES)
		return;
	memcpy(data, "MSTCPCKP\1\0\0", 12);
	put_le(data + TOTAL_AT, size, 8);
	put_le(data + size - TRAILER_BYTES, ms_xxh64(data, size - TRAILER_BYTES), 8);
}

struct place {
	size_t record, section,
	    end; /* of the record's length, of the section's header, of the section */
};

/* The n-th section, counted through all records; false where the structure ends before. */
static bool find_section(const uint8_t *data, size_t size, unsigned int n, struct place *at)
{
	size_t pos = HEADER_BYTES, body_end = size - TRAILER_BYTES;

	for (at->record = pos; pos + 4 + SECTION_HEADER_BYTES <= body_end; at->record = pos) {
		pos += 4;
		for (int tag = 1; tag <= SECTIONS; tag++, n--) {
			size_t len;

			if (body_end - pos < SECTION_HEADER_BYTES)
				return false;
			len = get32(data + pos + 4);
			if (len > body_end - pos - SECTION_HEADER_BYTES)
				return false;
			at->section = pos;
			at->end = pos + SECTION_HEADER_BYTES + len;
			if (!n)
				return true;
			pos = at->end;
		}
	}
	return false;
}

/* Changes what is inside of one section, and mends the lengths around it. */
static size_t mutate_section(uint8_t *data, size_t size, size_t max, unsigned int seed)
{
	static uint8_t inside[1 << 16];
	struct place at;
	size_t start, old, new, room = max - size;

	if (size < HEADER_BYTES + TRAILER_BYTES ||
	    !find_section(data, size, seed % (2 * SECTIONS), &at))
		return LLVMFuzzerMutate(data, size, max);
	start = at.section + SECTION_HEADER_BYTES;
	old = at.end - start;
	if (old + room > sizeof(inside))
		return LLVMFuzzerMutate(data, size, max);
	memcpy(inside, data + start, old);
	new = LLVMFuzzerMutate(inside, old, old + room);
	if (new > old + room) /* libFuzzer makes one byte of none even where there is no room */
		new = old;
	if (data[at.section] == 1 && seed & 64) /* FLOW has one size only */
		new = old;
	memmove(data + start + new, data + at.end, size - at.end);
	memcpy(data + start, inside, new);
	put_le(data + at.section + 4, new, 4);
	put_le(data + at.record, get32(data + at.record) + new - old, 4);
	return size + new - old;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned int seed)
{
	if (seed % 4)
		size = mutate_section(data, size, max, seed >> 4);
	else
		size = LLVMFuzzerMutate(data, size, max);
	if (seed / 4 % 16)
		mend_outside(data, size);
	return size;
}
