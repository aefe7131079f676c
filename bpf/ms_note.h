/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ms_note.h - what is kept of an absorbed segment.
 *
 * Several CPUs may absorb segments of one flow, and the agent reads at any
 * time. A note's first eight bytes are {version, flags}; a writer locks by
 * changing them from even to odd version in one 64-bit compare-and-swap, and
 * unlocks by one 64-bit exchange that also publishes the new flags. (bcc 0.26
 * emits no 32-bit compare-and-swap, and a bpf_spin_lock forbids the helper that
 * copies the payload.) A reader takes a copy as good only if the version was
 * even and a second copy has the same.
 */
#ifndef MS_NOTE_H
#define MS_NOTE_H

#include "ms_kernel.h"
#include "ms_parse.h"

#define MS_LOCK_TRIES 256
#define MS_SEQ_SKEW_MAX (1u << 30) /* the largest window there is (RFC 7323) */

_Static_assert((MS_NOTE_DATA_MAX & (MS_NOTE_DATA_MAX - 1)) == 0, "used as a mask");

/* 0: locked, *flags are the note's. -1: another CPU holds it for longer than a note takes. */
MS_INLINE int ms_note_lock(struct ms_flow_note *note, u64 *locked)
{
	u64 *word = (u64 *)note;

	for (int i = 0; i < MS_LOCK_TRIES; i++) {
		u64 old = *(volatile u64 *)word;

		if (old & 1)
			continue;
		if (__sync_val_compare_and_swap(word, old, old | 1) == old) {
			*locked = old | 1;
			return 0;
		}
	}
	return -1;
}

/* The version goes from odd to the next even one; it must not carry into the flags. */
MS_INLINE void ms_note_unlock(struct ms_flow_note *note, u64 locked, u32 flags)
{
	u64 next = (u64)flags << 32 | (u32)(locked + 1);

	__sync_lock_test_and_set((u64 *)note, next);
}

/* Is the segment newer than the one whose ack, window and timestamp are kept? */
MS_INLINE int ms_note_newer(const struct ms_flow_note *note, u32 flags, const struct ms_pkt *p)
{
	if (!(flags & MS_NOTE_SEG))
		return 1;
	if (p->ack != note->ack)
		return ms_before(note->ack, p->ack);
	if (p->has_ts && (flags & MS_NOTE_TS) && p->tsval != note->tsval)
		return ms_before(note->tsval, p->tsval);
	return !ms_before(p->seq, note->seq);
}

MS_INLINE u32 ms_note_segment(struct ms_flow_note *note, u32 flags, const struct ms_pkt *p)
{
	if (!ms_note_newer(note, flags, p))
		return flags;
	note->seq = p->seq;
	note->ack = p->ack;
	note->window = p->window;
	if (!p->has_ts)
		return (flags | MS_NOTE_SEG) & ~MS_NOTE_TS;
	note->tsval = p->tsval;
	note->tsecr = p->tsecr;
	return flags | MS_NOTE_SEG | MS_NOTE_TS;
}

/* Keeps the payload without its first `skip` bytes; `fin`: the FIN follows the last of them. */
MS_INLINE u32 ms_note_store(struct __sk_buff *skb, struct ms_flow_note *note, u32 flags,
			    const struct ms_pkt *p, u32 skip, u32 fin)
{
	u64 last = p->len - skip - 1; /* the verifier wants 1..2048 in one expression */
	u32 kept = p->len - skip;

	flags &= ~(MS_NOTE_DATA | MS_NOTE_FIN);
	if (kept > MS_NOTE_DATA_MAX) {
		last = MS_NOTE_DATA_MAX - 1;
		kept = MS_NOTE_DATA_MAX;
		fin = 0;
	}
	note->data_seq = p->seq + skip;
	note->data_len = 0;
	if (kept) {
		ms_opaque(last);
		last &= MS_NOTE_DATA_MAX - 1;
		if (bpf_skb_load_bytes(skb, p->payload + skip, note->data, last + 1) < 0)
			return flags;
		note->data_len = kept;
		flags |= MS_NOTE_DATA;
	}
	return fin ? flags | MS_NOTE_FIN : flags;
}

/* FROZEN: rcv_nxt is not known yet; the lowest seq is the best guess (see midstream_maps.h). */
MS_INLINE u32 ms_note_data_frozen(struct __sk_buff *skb, struct ms_flow_note *note, u32 flags,
				  const struct ms_pkt *p)
{
	u32 fin = p->flags & MS_TCP_FIN;
	u32 kept = note->data_len + !!(flags & MS_NOTE_FIN);

	if (flags & (MS_NOTE_DATA | MS_NOTE_FIN)) {
		if (ms_before(note->data_seq, p->seq))
			return flags;
		if (note->data_seq == p->seq && p->len + fin <= kept)
			return flags;
	}
	return ms_note_store(skb, note, flags, p, 0, fin);
}

/* HELD: only what continues the stream at rcv_nxt, and only if it is more than is kept already. */
MS_INLINE u32 ms_note_data_held(struct __sk_buff *skb, struct ms_flow_note *note, u32 flags,
				const struct ms_pkt *p, u32 rcv_nxt)
{
	u32 fin = p->flags & MS_TCP_FIN;
	u32 skip = rcv_nxt - p->seq;
	u32 kept;

	if (ms_before(rcv_nxt, p->seq) || skip > p->len || (skip == p->len && !fin))
		return flags;
	if ((flags & (MS_NOTE_DATA | MS_NOTE_FIN)) && !ms_before(rcv_nxt, note->data_seq)) {
		kept = note->data_seq + note->data_len + !!(flags & MS_NOTE_FIN);
		if (!ms_before(kept, rcv_nxt + (p->len - skip) + fin))
			return flags;
	}
	return ms_note_store(skb, note, flags, p, skip, fin);
}

/* Could the peer of this connection have sent it? (Reset and SYN have rules of their own.) */
MS_INLINE int ms_plausible(const struct ms_pkt *p, const struct ms_flow_ctl *ctl)
{
	if (!(p->flags & MS_TCP_ACK))
		return 0;
	if (ctl->state != MS_FLOW_HELD)
		return 1;
	return !ms_before(ctl->snd_nxt, p->ack) &&
	       p->seq - ctl->rcv_nxt + MS_SEQ_SKEW_MAX <= 2 * MS_SEQ_SKEW_MAX;
}

/* An RST counts only at exactly rcv_nxt (RFC 5961, 3.2); until that is known, keep its seq. */
MS_INLINE u32 ms_note_reset(struct ms_flow_note *note, u32 flags, const struct ms_pkt *p,
			    const struct ms_flow_ctl *ctl)
{
	if (ctl->state == MS_FLOW_HELD)
		return p->seq == ctl->rcv_nxt ? flags | MS_NOTE_RST : flags;
	note->rst_seq = p->seq;
	return flags | MS_NOTE_RST_SEEN;
}

/* The note's part under its lock; returns the new flags. */
MS_INLINE u32 ms_note_update(struct __sk_buff *skb, struct ms_flow_note *note, u32 flags,
			     const struct ms_pkt *p, const struct ms_flow_ctl *ctl)
{
	if (ctl->state == MS_FLOW_HELD && (flags & MS_NOTE_RST_SEEN)) {
		flags &= ~MS_NOTE_RST_SEEN;
		if (note->rst_seq == ctl->rcv_nxt)
			flags |= MS_NOTE_RST;
	}
	if (flags & MS_NOTE_RST)
		return flags;
	if (p->flags & MS_TCP_RST)
		return ms_note_reset(note, flags, p, ctl);
	if (p->flags & MS_TCP_SYN)
		return flags;
	if (!ms_plausible(p, ctl)) {
		ms_count(MS_R_SKEWED);
		return flags;
	}
	flags = ms_note_segment(note, flags, p);
	if (p->len == 0 && !(p->flags & MS_TCP_FIN))
		return flags;
	if (ctl->state == MS_FLOW_HELD)
		return ms_note_data_held(skb, note, flags, p, ctl->rcv_nxt);
	return ms_note_data_frozen(skb, note, flags, p);
}

#endif
