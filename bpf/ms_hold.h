/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ms_hold.h - the worker behind every entry point: what happens to a packet,
 * by the state of its flow. midstream_maps.h has the table.
 */
#ifndef MS_HOLD_H
#define MS_HOLD_H

#include "ms_answer.h"
#include "ms_checksum.h"
#include "ms_kernel.h"
#include "ms_note.h"
#include "ms_parse.h"

#define MS_INGRESS 0
#define MS_EGRESS 1

/*
 * A copy of the flow's entry; -1: none. An update by the agent replaces the
 * element, and the old one may at once become another flow's: a copy counts
 * only if the element is still this flow's afterwards.
 */
MS_INLINE int ms_flow(const struct ms_flow_key *key, struct ms_flow_ctl *ctl)
{
	for (int i = 0; i < 4; i++) {
		struct ms_flow_ctl *e = ms_lookup(MS_FD_FLOWS, key);

		if (!e)
			return -1;
		*ctl = *e;
		asm volatile("" ::: "memory");
		if (ms_lookup(MS_FD_FLOWS, key) == e)
			return 0;
	}
	ctl->state = MS_FLOW_FROZEN; /* changing at every look: silence is always right */
	return 0;
}

/* Writes down what the segment says. Returns the note's flags. */
MS_INLINE u32 ms_note(struct __sk_buff *skb, const struct ms_pkt *p, const struct ms_flow_ctl *ctl,
		      int *answer)
{
	struct ms_flow_note *note = ms_lookup(MS_FD_NOTES, &p->key);
	u64 locked;
	u32 flags;

	if (!note) {
		ms_count(MS_R_NOTE_MISSING);
		return 0;
	}
	if (ms_note_lock(note, &locked)) {
		ms_count(MS_R_NOTE_BUSY);
		return *(volatile u32 *)&note->flags;
	}
	flags = ms_note_update(skb, note, locked >> 32, p, ctl);
	if (flags & MS_NOTE_RST)
		*answer = 0;
	note->absorbed += 1;
	note->answered += !!*answer;
	ms_note_unlock(note, locked, flags);
	return flags;
}

MS_INLINE int ms_absorb(struct __sk_buff *skb, struct ms_pkt *p, const struct ms_flow_ctl *ctl)
{
	int held = ctl->state == MS_FLOW_HELD;
	int answer;

	if (p->fragment)
		return ms_drop(MS_R_FRAGMENT);
	if (ms_parse_tcp(skb, p))
		return ms_drop(MS_R_MALFORMED);
	if (!ms_checksum_ok(skb, p))
		return ms_drop(MS_R_BAD_CHECKSUM);
	answer = held && ms_wants_answer(p, ctl->rcv_nxt);
	if (ms_note(skb, p, ctl, &answer) & MS_NOTE_RST)
		return ms_drop(MS_R_DEAD_DROP);
	ms_count(held ? MS_R_ABSORB_HELD : MS_R_ABSORB_FROZEN);
	return answer ? ms_answer(skb, p, ctl) : MS_DROP;
}

/* A segment without an entry: passes, but for a new connection to an address that is leaving. */
MS_INLINE int ms_stranger(struct __sk_buff *skb, const struct ms_pkt *p)
{
	struct ms_addr_ctl *addr;
	u8 tail[2] = {0, 0}; /* data offset, flags */
	u8 flags;

	ms_load(skb, p->l4 + 12, tail, 2);
	flags = tail[1];
	if ((flags & (MS_TCP_SYN | MS_TCP_ACK)) != MS_TCP_SYN)
		return ms_pass(MS_R_PASS_UNKNOWN);
	addr = ms_lookup(MS_FD_ADDRS, p->key.local);
	if (addr && addr->state == MS_ADDR_LEAVING)
		return ms_drop(MS_R_SYN_LEAVING);
	return ms_pass(MS_R_PASS_UNKNOWN);
}

/* The mark proves nothing (CAP_NET_RAW may set it): only an answer as the hold makes it leaves. */
MS_INLINE int ms_is_answer(struct __sk_buff *skb, struct ms_pkt *p, const struct ms_flow_ctl *ctl)
{
	return skb->mark == MS_MARK_ANSWER && ctl->state == MS_FLOW_HELD && !ms_parse_tcp(skb, p) &&
	       p->flags == MS_TCP_ACK && p->len == 0 && p->window == 0 && p->seq == ctl->snd_nxt &&
	       p->ack == ctl->rcv_nxt;
}

MS_INLINE int ms_gate(struct __sk_buff *skb, struct ms_pkt *p, const struct ms_flow_ctl *ctl)
{
	if (!ms_is_answer(skb, p, ctl))
		return ms_drop(MS_R_GATE_DROP);
	skb->mark = 0;
	return ms_pass(MS_R_GATE_PASS_ANSWER);
}

/* `p` is the caller's memory: the stack has 512 bytes for everything. */
MS_INLINE int ms_work_in(struct __sk_buff *skb, struct ms_pkt *p, int direction)
{
	struct ms_flow_ctl ctl;

#ifdef MS_WITHOUT_HOLD
	return MS_PASS; /* the control of tests and demo: what happens without us */
#endif
	p->egress = direction;
	if (ms_parse_flow(skb, p))
		return ms_pass(MS_R_PASS_UNKNOWN);
	if (ms_flow(&p->key, &ctl))
		return direction == MS_INGRESS ? ms_stranger(skb, p) : ms_pass(MS_R_PASS_UNKNOWN);
	if (ctl.state == MS_FLOW_MOVED)
		return ms_drop(MS_R_MOVED_DROP);
	if (ctl.state != MS_FLOW_FROZEN && ctl.state != MS_FLOW_HELD)
		return ms_pass(MS_R_PASS_UNKNOWN);
	return direction == MS_INGRESS ? ms_absorb(skb, p, &ctl) : ms_gate(skb, p, &ctl);
}

MS_INLINE int ms_work(struct __sk_buff *skb, int direction)
{
	struct ms_pkt p = {};

	return ms_work_in(skb, &p, direction);
}

#endif
