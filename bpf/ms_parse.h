/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ms_parse.h - from skb to flow key and TCP header.
 *
 * Reads work on non-linear skbs (GRO and jumbo frames) without pulling data
 * that a passing packet never needed: ms_load() looks into the linear part,
 * and asks bpf_skb_load_bytes for what lies outside it.
 *
 * Two steps, so that traffic that is not ours costs little: ms_parse_flow()
 * finds the addresses and ports; ms_parse_tcp() does the rest for flows that
 * have an entry.
 *
 * Decisions:
 *  - VLAN: up to two tags in the data are skipped (one more may be in
 *    skb->vlan_tci). A tag does not change whose connection it is, and a held
 *    flow must not leak through one; the answer keeps the tags.
 *  - Fragments: a first fragment holds the ports and is matched, but is no
 *    whole segment: absorbed, not noted, not answered. Later fragments hold no
 *    ports and pass; without their first they can only time out, silently
 *    (RFC 792: no "reassembly time exceeded" without fragment zero).
 *  - IPv6 extension headers: at most MS_EXT_MAX, then the packet passes.
 *  - IPv4 options are skipped.
 */
#ifndef MS_PARSE_H
#define MS_PARSE_H

#include "ms_kernel.h"

#define MS_EXT_MAX 8
#define MS_VLAN_MAX 2
#define MS_OPT_MAX 40
#define MS_LINEAR_MAX 128 /* offsets the verifier has to follow in the linear part */

#define MS_TCP_FIN 0x01
#define MS_TCP_SYN 0x02
#define MS_TCP_RST 0x04
#define MS_TCP_ACK 0x10

struct ms_pkt {
	struct ms_flow_key key;
	u32 l3;      /* offset of the IP header */
	u32 l4;      /* offset of the TCP header */
	u32 end;     /* offset of the first byte after the IP packet (Ethernet may pad) */
	u32 payload; /* offset of the payload */
	u32 len;     /* bytes of payload */
	u32 seq;
	u32 ack;
	u32 window; /* as on the wire */
	u32 tsval;
	u32 tsecr;
	u16 proto; /* ETH_P_IP or ETH_P_IPV6 */
	u8 flags;  /* MS_TCP_* */
	u8 has_ts;
	u8 fragment; /* first of several */
	u8 egress;   /* the packet leaves: its source is our end */
};

/*
 * Reads `len` bytes (constant, even) at `off`. By halfwords: a plain memcpy from the packet becomes
 * single bytes, as clang must assume any alignment; the verifier allows these where the CPU does.
 */
MS_INLINE int ms_load(struct __sk_buff *skb, u32 off, void *dst, u32 len)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;

	if (off > MS_LINEAR_MAX || data + off + len > end)
		return bpf_skb_load_bytes(skb, off, dst, len);
#pragma unroll
	for (u32 i = 0; i < len / 4; i++)
		((u32 *)dst)[i] = ((u32 *)(data + off))[i];
	if (len % 4)
		((u16 *)dst)[len / 2 - 1] = ((u16 *)(data + off))[len / 2 - 1];
	return 0;
}

MS_INLINE void ms_key_v4(u8 out[16], __be32 addr)
{
	u32 *w = (u32 *)out;

	w[0] = 0;
	w[1] = 0;
	w[2] = bpf_htonl(0xffff);
	w[3] = addr;
}

MS_INLINE void ms_key_v6(u8 out[16], const struct in6_addr *addr)
{
	__builtin_memcpy(out, addr, 16);
}

/* Ethertype behind up to MS_VLAN_MAX tags; *off moves to the L3 header. */
MS_INLINE u16 ms_ethertype(struct __sk_buff *skb, u32 *off)
{
	__be16 proto = 0;
	u32 at = ETH_HLEN;

	if (ms_load(skb, ETH_HLEN - 2, &proto, 2) < 0)
		return 0;
#pragma unroll
	for (int i = 0; i < MS_VLAN_MAX; i++) {
		if (proto != bpf_htons(ETH_P_8021Q) && proto != bpf_htons(ETH_P_8021AD))
			break;
		if (bpf_skb_load_bytes(skb, at + 2, &proto, 2) < 0)
			return 0;
		at += 4;
	}
	*off = at;
	return bpf_ntohs(proto);
}

/*
 * End of the IP packet; 0, which no segment fits into, if it claims more than
 * there is. A GSO packet too large for the field (BIG TCP) has 0 in it.
 */
MS_INLINE u32 ms_end(struct __sk_buff *skb, u32 start, u32 length)
{
	u32 end = start + length;

	if (length == 0 && skb->gso_segs > 1)
		return skb->len;
	return end > skb->len ? 0 : end;
}

MS_INLINE int ms_parse_v4(struct __sk_buff *skb, struct ms_pkt *p)
{
	struct iphdr ip;
	u32 frag;

	if (ms_load(skb, p->l3, &ip, sizeof(ip)) < 0)
		return -1;
	if (ip.version != 4 || ip.ihl < 5 || ip.protocol != IPPROTO_TCP)
		return -1;
	frag = bpf_ntohs(ip.frag_off);
	if (frag & 0x1fff)
		return -1;
	p->fragment = !!(frag & 0x2000);
	p->l4 = p->l3 + ip.ihl * 4;
	p->end = ms_end(skb, p->l3, bpf_ntohs(ip.tot_len));
	ms_key_v4(p->key.local, p->egress ? ip.saddr : ip.daddr);
	ms_key_v4(p->key.remote, p->egress ? ip.daddr : ip.saddr);
	return 0;
}

/* Walks the extension headers. -1: not TCP, or not TCP that an entry could match. */
MS_INLINE int ms_skip_extensions(struct __sk_buff *skb, struct ms_pkt *p, u32 next)
{
	struct {
		u8 next;
		u8 len;
		__be16 frag;
	} ext;
	u32 off = p->l4;

	for (int i = 0; i < MS_EXT_MAX; i++) {
		u32 size;

		if (next == IPPROTO_TCP) {
			p->l4 = off;
			return 0;
		}
		if (bpf_skb_load_bytes(skb, off, &ext, sizeof(ext)) < 0)
			return -1;
		if (next == IPPROTO_FRAGMENT) {
			if (ext.frag & bpf_htons(0xfff8))
				return -1;
			if (ext.frag & bpf_htons(1))
				p->fragment = 1; /* else an atomic fragment (RFC 6946) */
			size = 8;
		} else if (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING ||
			   next == IPPROTO_DSTOPTS) {
			size = (ext.len + 1) * 8;
		} else if (next == IPPROTO_AH) {
			size = (ext.len + 2) * 4;
		} else {
			return -1;
		}
		next = ext.next;
		off += size;
	}
	return -1;
}

MS_INLINE int ms_parse_v6(struct __sk_buff *skb, struct ms_pkt *p)
{
	struct ipv6hdr ip;

	if (ms_load(skb, p->l3, &ip, sizeof(ip)) < 0 || ip.version != 6)
		return -1;
	p->l4 = p->l3 + sizeof(ip);
	p->end = ms_end(skb, p->l4, bpf_ntohs(ip.payload_len));
	ms_key_v6(p->key.local, p->egress ? &ip.saddr : &ip.daddr);
	ms_key_v6(p->key.remote, p->egress ? &ip.daddr : &ip.saddr);
	return ms_skip_extensions(skb, p, ip.nexthdr);
}

/* 0: p->key is a TCP flow's; -1: nothing that an entry could match. */
MS_INLINE int ms_parse_flow(struct __sk_buff *skb, struct ms_pkt *p)
{
	struct {
		__be16 source;
		__be16 dest;
	} ports;
	int err;

	p->fragment = 0;
	p->proto = ms_ethertype(skb, &p->l3);
	if (p->proto == ETH_P_IP)
		err = ms_parse_v4(skb, p);
	else if (p->proto == ETH_P_IPV6)
		err = ms_parse_v6(skb, p);
	else
		err = -1;
	if (err || ms_load(skb, p->l4, &ports, sizeof(ports)) < 0)
		return -1;
	p->key.local_port = p->egress ? ports.source : ports.dest;
	p->key.remote_port = p->egress ? ports.dest : ports.source;
	return 0;
}

MS_INLINE int ms_set_ts(struct __sk_buff *skb, struct ms_pkt *p, u32 off)
{
	__be32 ts[2];

	if (bpf_skb_load_bytes(skb, off, ts, sizeof(ts)) < 0)
		return -1;
	p->tsval = bpf_ntohl(ts[0]);
	p->tsecr = bpf_ntohl(ts[1]);
	p->has_ts = 1;
	return 0;
}

/* Finds the timestamp option. Usual stacks put it first, behind two NOPs; the loop is for others.
 */
MS_INLINE int ms_parse_options(struct __sk_buff *skb, struct ms_pkt *p)
{
	u32 off = p->l4 + sizeof(struct tcphdr);
	__be32 first = 0;

	if (p->payload - off >= 12) {
		if (bpf_skb_load_bytes(skb, off, &first, 4) < 0)
			return -1;
		if (first == bpf_htonl(0x0101080a))
			return ms_set_ts(skb, p, off + 4);
	}
	for (int i = 0; i < MS_OPT_MAX; i++) {
		u8 opt[2] = {0, 0}; /* kind, length */

		if (off >= p->payload || bpf_skb_load_bytes(skb, off, opt, 1) < 0 || opt[0] == 0)
			return 0;
		if (opt[0] == 1) {
			off += 1;
			continue;
		}
		if (off + 2 > p->payload || bpf_skb_load_bytes(skb, off, opt, 2) < 0 ||
		    opt[1] < 2 || off + opt[1] > p->payload)
			return -1;
		if (opt[0] == 8 && opt[1] == 10)
			return ms_set_ts(skb, p, off + 2);
		off += opt[1];
	}
	return 0;
}

/* The segment behind the key. -1: malformed. */
MS_INLINE int ms_parse_tcp(struct __sk_buff *skb, struct ms_pkt *p)
{
	struct tcphdr tcp;
	u32 header;

	p->has_ts = 0;
	p->tsval = 0;
	p->tsecr = 0;
	if (p->l4 + sizeof(tcp) > p->end || bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(tcp)) < 0)
		return -1;
	header = tcp.doff * 4;
	if (header < sizeof(tcp) || p->l4 + header > p->end)
		return -1;
	p->payload = p->l4 + header;
	p->len = p->end - p->payload;
	p->seq = bpf_ntohl(tcp.seq);
	p->ack = bpf_ntohl(tcp.ack_seq);
	p->window = bpf_ntohs(tcp.window);
	p->flags = ((u8 *)&tcp)[13];
	return ms_parse_options(skb, p);
}

#endif
