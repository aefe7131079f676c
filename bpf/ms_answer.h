/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ms_answer.h - an absorbed segment becomes the zero-window ACK that answers it.
 *
 * The packet is cut to its headers, rewritten, and redirected to the egress of
 * the interface it came in by; the mark lets it through the gate there.
 *
 * Checksums. An skb from a veth or from GRO may be CHECKSUM_PARTIAL: then the
 * field must hold the pseudo header's sum, and whoever sends it on adds the
 * rest; a full checksum there survives a plain veth and is wrong after a
 * software checksum. In every other state the field must hold the full one.
 * BPF cannot see the state, but bpf_l4_csum_replace does: with
 * BPF_F_PSEUDO_HDR it applies a difference always, without only when not
 * PARTIAL. So the field starts as 0xffff (zero, in both readings) and gets the
 * pseudo header's sum with the flag and the segment's sum without.
 * CHECKSUM_COMPLETE (some NICs) also wants skb->csum right: ms_fix_complete().
 */
#ifndef MS_ANSWER_H
#define MS_ANSWER_H

#include "ms_kernel.h"
#include "ms_parse.h"

#define MS_TTL 64

struct ms_answer_tcp {
	struct tcphdr tcp;
	__be32 ts_head; /* NOP NOP TS(10) */
	__be32 tsval;
	__be32 tsecr;
} __attribute__((packed));

struct ms_pseudo {
	u8 local[16];
	u8 remote[16];
	__be32 length; /* 32 bits wide with the protocol behind: same sum for v4 and v6 */
	__be32 protocol;
};

/*
 * RFC 9293, 3.10.7.4: an unacceptable segment is answered by an ACK. With a
 * window of zero that is everything with sequence space, and everything before
 * rcv_nxt (keepalives, window probes). Never a pure ACK in its place: two
 * holds, or a hold and a client, would answer each other for ever.
 */
MS_INLINE int ms_wants_answer(const struct ms_pkt *p, u32 rcv_nxt)
{
	if (p->flags & MS_TCP_RST)
		return 0;
	if (p->flags & MS_TCP_SYN)
		return 1; /* challenge ACK (RFC 5961, 4) */
	if (!(p->flags & MS_TCP_ACK))
		return 0;
	return p->len || (p->flags & MS_TCP_FIN) || ms_before(p->seq, rcv_nxt);
}

MS_INLINE u32 ms_tcp_header(struct ms_answer_tcp *h, const struct ms_pkt *p,
			    const struct ms_flow_ctl *ctl)
{
	u32 size = sizeof(struct tcphdr);

	__builtin_memset(h, 0, sizeof(*h));
	if (ctl->flags & MS_CTL_TIMESTAMPS) {
		size = sizeof(*h);
		h->ts_head = bpf_htonl(0x0101080a);
		h->tsval = bpf_htonl(ctl->tsval);
		h->tsecr = bpf_htonl(p->tsval);
	}
	h->tcp.source = p->key.local_port;
	h->tcp.dest = p->key.remote_port;
	h->tcp.seq = bpf_htonl(ctl->snd_nxt);
	h->tcp.ack_seq = bpf_htonl(ctl->rcv_nxt);
	h->tcp.doff = size / 4;
	h->tcp.ack = 1;
	return size;
}

MS_INLINE u32 ms_pseudo_sum(const struct ms_pkt *p, u32 length)
{
	struct ms_pseudo ph;

	__builtin_memcpy(ph.local, p->key.local, 16);
	__builtin_memcpy(ph.remote, p->key.remote, 16);
	ph.length = bpf_htonl(length);
	ph.protocol = bpf_htonl(IPPROTO_TCP);
	if (p->proto == ETH_P_IP) {
		/* the mapped prefix ::ffff: is not part of IPv4's pseudo header */
		((u32 *)ph.local)[2] = 0;
		((u32 *)ph.remote)[2] = 0;
	}
	return bpf_csum_diff(0, 0, (void *)&ph, sizeof(ph), 0);
}

MS_INLINE u16 ms_fold(u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Writes the L3 header; returns its sum (IPv4: 0, it carries a checksum), or an error. */
MS_INLINE s64 ms_write_l3(struct __sk_buff *skb, const struct ms_pkt *p, u32 tcp_size)
{
	if (p->proto == ETH_P_IP) {
		struct iphdr ip = {
		    .version = 4,
		    .ihl = 5,
		    .tot_len = bpf_htons(sizeof(ip) + tcp_size),
		    .frag_off = bpf_htons(0x4000), /* don't fragment */
		    .ttl = MS_TTL,
		    .protocol = IPPROTO_TCP,
		    .saddr = ((u32 *)p->key.local)[3],
		    .daddr = ((u32 *)p->key.remote)[3],
		};

		ip.check = ~ms_fold(bpf_csum_diff(0, 0, (void *)&ip, sizeof(ip), 0));
		return bpf_skb_store_bytes(skb, p->l3, &ip, sizeof(ip), 0);
	} else {
		struct ipv6hdr ip = {
		    .version = 6,
		    .payload_len = bpf_htons(tcp_size),
		    .nexthdr = IPPROTO_TCP,
		    .hop_limit = MS_TTL,
		};
		s64 err;

		__builtin_memcpy(&ip.saddr, p->key.local, 16);
		__builtin_memcpy(&ip.daddr, p->key.remote, 16);
		err = bpf_skb_store_bytes(skb, p->l3, &ip, sizeof(ip), 0);
		return err < 0 ? err : bpf_csum_diff(0, 0, (void *)&ip, sizeof(ip), 0) & 0xffffffff;
	}
}

MS_INLINE int ms_swap_macs(struct __sk_buff *skb)
{
	u8 in[2 * ETH_ALEN], out[2 * ETH_ALEN];

	if (bpf_skb_load_bytes(skb, 0, in, sizeof(in)) < 0)
		return -1;
	__builtin_memcpy(out, in + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(out + ETH_ALEN, in, ETH_ALEN);
	return bpf_skb_store_bytes(skb, 0, out, sizeof(out), 0);
}

/* bcc 0.26 declares it to return int, which makes half of all sums look like errors. */
static s64 (*ms_csum_update)(struct __sk_buff *skb, u32 sum) = (void *)BPF_FUNC_csum_update;

/* CHECKSUM_COMPLETE: skb->csum is the sum from L3 on; with a right checksum that is l3 - pseudo. */
MS_INLINE void ms_fix_complete(struct __sk_buff *skb, u32 l3_sum, u32 pseudo)
{
	s64 now = ms_csum_update(skb, 0); /* negative: not COMPLETE */

	if (now < 0)
		return;
	ms_csum_update(skb, ~(u32)now);
	ms_csum_update(skb, l3_sum);
	ms_csum_update(skb, ~pseudo);
}

/* Leaves `size` bytes of TCP directly behind a plain L3 header. */
MS_INLINE int ms_resize(struct __sk_buff *skb, struct ms_pkt *p, u32 size)
{
	u32 base = p->proto == ETH_P_IP ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	s32 extra = p->l4 - p->l3 - base; /* IP options, extension headers */

	if (bpf_skb_change_tail(skb, p->l4 + size, 0) < 0)
		return -1;
	if (extra > 0 && bpf_skb_adjust_room(skb, -extra, BPF_ADJ_ROOM_NET, 0) < 0)
		return -1; /* behind a VLAN tag in the data, for one */
	p->l4 = p->l3 + base;
	return 0;
}

/* 0: the packet is the answer now. */
MS_INLINE int ms_rewrite(struct __sk_buff *skb, struct ms_pkt *p, const struct ms_flow_ctl *ctl)
{
	struct ms_answer_tcp h;
	u32 size = ms_tcp_header(&h, p, ctl);
	u32 pseudo = ms_pseudo_sum(p, size);
	u32 sum = bpf_csum_diff(0, 0, (void *)&h, sizeof(h), 0); /* what is not sent is zero */
	u32 check;
	s64 l3_sum;

	if (ms_resize(skb, p, size) || ms_swap_macs(skb))
		return -1;
	l3_sum = ms_write_l3(skb, p, size);
	if (l3_sum < 0)
		return -1;
	h.tcp.check = 0xffff;
	if (size == sizeof(h) ? bpf_skb_store_bytes(skb, p->l4, &h, sizeof(h), 0)
			      : bpf_skb_store_bytes(skb, p->l4, &h, sizeof(h.tcp), 0))
		return -1;
	check = p->l4 + offsetof(struct tcphdr, check);
	if (bpf_l4_csum_replace(skb, check, 0, pseudo, BPF_F_PSEUDO_HDR) < 0 ||
	    bpf_l4_csum_replace(skb, check, 0, sum, 0) < 0)
		return -1;
	ms_fix_complete(skb, l3_sum, pseudo);
	return 0;
}

MS_INLINE int ms_answer(struct __sk_buff *skb, struct ms_pkt *p, const struct ms_flow_ctl *ctl)
{
	if (ms_rewrite(skb, p, ctl))
		return ms_drop(MS_R_ANSWER_FAILED);
	ms_count(MS_R_ANSWER_ZERO_WINDOW);
	skb->mark = MS_MARK_ANSWER;
	return bpf_redirect(skb->ifindex, 0);
}

#endif
