/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ms_checksum.h - is the checksum of an absorbed segment right?
 *
 * TC runs before the stack looks at it. What is kept is played to the
 * application under a new checksum: without this look, the hold would turn a
 * packet that was damaged on its way into valid bytes of the stream.
 */
#ifndef MS_CHECKSUM_H
#define MS_CHECKSUM_H

#include "ms_answer.h"
#include "ms_kernel.h"
#include "ms_parse.h"

#define MS_SUM_CHUNK 256 /* bpf_csum_diff took at most a BPF stack (512) before 6.13 */
#define MS_SUM_CHUNKS 40 /* 10 KB: a jumbo frame; more is a GRO packet, which GRO has checked */

/*
 * CHECKSUM_UNNECESSARY: the NIC has looked. CHECKSUM_PARTIAL: the packet was
 * made on this machine, or GRO looked; told from the rest by a change without
 * BPF_F_PSEUDO_HDR, which it ignores. The packet is absorbed: writing is fine.
 */
MS_INLINE int ms_checksum_known(struct __sk_buff *skb, const struct ms_pkt *p)
{
	u32 off = p->l4 + offsetof(struct tcphdr, check);
	u16 before = 0, after = 0;

	if (bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY) >= 0 || skb->gso_segs > 1)
		return 1;
	if (bpf_skb_load_bytes(skb, off, &before, 2) < 0 ||
	    bpf_l4_csum_replace(skb, off, 0, 1, 0) < 0 ||
	    bpf_skb_load_bytes(skb, off, &after, 2) < 0)
		return 0;
	if (before == after)
		return 1;
	bpf_skb_store_bytes(skb, off, &before, 2, 0);
	return 0;
}

/* Sum of the TCP segment, in pieces. */
MS_INLINE u32 ms_segment_sum(struct __sk_buff *skb, const struct ms_pkt *p, u32 sum)
{
	u8 chunk[MS_SUM_CHUNK];
	u32 off = p->l4;

	for (int i = 0; i < MS_SUM_CHUNKS; i++) {
		u32 left = p->end - off;
		u64 n = left;

		if (left >= MS_SUM_CHUNK) {
			if (bpf_skb_load_bytes(skb, off, chunk, MS_SUM_CHUNK) < 0)
				return 0;
			sum = bpf_csum_diff(0, 0, (void *)chunk, MS_SUM_CHUNK, sum);
			off += MS_SUM_CHUNK;
			continue;
		}
		if (left == 0)
			break;
		__builtin_memset(chunk, 0, sizeof(chunk)); /* pads the last piece */
		n -= 1;
		ms_opaque(n);
		n &= MS_SUM_CHUNK - 1;
		if (bpf_skb_load_bytes(skb, off, chunk, n + 1) < 0)
			return 0;
		return bpf_csum_diff(0, 0, (void *)chunk, MS_SUM_CHUNK, sum);
	}
	return sum;
}

MS_INLINE int ms_checksum_ok(struct __sk_buff *skb, const struct ms_pkt *p)
{
	u32 sum;

	if (ms_checksum_known(skb, p))
		return 1;
	sum = ms_segment_sum(skb, p, ms_pseudo_sum(p, p->end - p->l4));
	return ms_fold(sum) == 0xffff;
}

#endif
