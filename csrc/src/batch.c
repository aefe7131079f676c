// SPDX-License-Identifier: Apache-2.0
/* batch.c - a batch's memory, and what can be said of it without touching a socket. */
#include <stdlib.h>

#include "internal.h"

struct ms_tcp_batch *ms_batch_new(size_t n)
{
	struct ms_tcp_batch *b;

	if (n > (SIZE_MAX - sizeof(*b)) / sizeof(b->flows[0]))
		return NULL;
	b = calloc(1, sizeof(*b) + n * sizeof(b->flows[0]));
	if (b)
		b->n = n;
	return b;
}

uint8_t *ms_arena_reserve(struct ms_tcp_batch *b, size_t size, size_t chunk)
{
	struct chunk *c = b->chunks;
	size_t want = size > chunk ? size : chunk;

	if (c && c->size - c->used >= size)
		return c->bytes + c->used;
	c = malloc(sizeof(*c) + want); /* untouched pages cost nothing: slack is free */
	if (!c)
		return NULL;
	c->next = b->chunks;
	c->size = want;
	c->used = 0;
	b->chunks = c;
	return c->bytes;
}

void ms_arena_commit(struct ms_tcp_batch *b, size_t size)
{
	b->chunks->used += size;
}

void ms_tcp_batch_free(ms_tcp_batch *b)
{
	if (!b)
		return;
	for (struct chunk *c = b->chunks, *next; c; c = next) {
		next = c->next;
		free(c);
	}
	free(b);
}

size_t ms_tcp_batch_len(const ms_tcp_batch *b)
{
	return b->n;
}

int ms_tcp_families(const ms_tcp_batch *b, uint8_t *families)
{
	for (size_t i = 0; i < b->n; i++)
		families[i] = b->flows[i].family;
	return 0;
}

int ms_tcp_flow_ctl(const ms_tcp_batch *b, uint32_t state, struct ms_flow_key *keys,
		    struct ms_flow_ctl *ctls)
{
	for (size_t i = 0; i < b->n; i++) {
		const struct flow *f = &b->flows[i];

		keys[i] = f->key;
		ctls[i] = (struct ms_flow_ctl){
		    .state = state,
		    .flags = f->tcpi_options & TCPI_OPT_TIMESTAMPS ? MS_CTL_TIMESTAMPS : 0,
		    .snd_nxt = f->write_seq - f->nsd,
		    .rcv_nxt = f->rcv_nxt,
		    .tsval = f->tsval,
		};
	}
	return 0;
}

int ms_tcp_summaries(const ms_tcp_batch *b, struct ms_tcp_summary *out)
{
	for (size_t i = 0; i < b->n; i++) {
		const struct flow *f = &b->flows[i];
		uint32_t unsent = f->nsd && ms_fin_out(f) ? f->nsd - 1 : f->nsd;

		out[i] = (struct ms_tcp_summary){
		    .key = f->key,
		    .family = f->family,
		    .state = f->state,
		    .options = f->tcpi_options,
		    .wscale = (uint8_t)(f->snd_wscale | f->rcv_wscale << 4),
		    .snd_una = ms_una(f),
		    .snd_nxt = f->write_seq - f->nsd,
		    .write_seq = f->write_seq,
		    .rcv_nxt = f->rcv_nxt,
		    .tsval = f->tsval,
		    .send_bytes = f->send_len,
		    .unsent_bytes = unsent,
		    .recv_bytes = f->recv_len,
		    .mss = f->mss,
		    .snd_wnd = f->win.snd_wnd,
		    .rcv_wnd = f->win.rcv_wnd,
		    .min_rtt_us = f->min_rtt_us,
		    .rounds = f->rounds,
		};
	}
	return 0;
}
