/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ms_steer.h - packets go to the node on which their flow lives.
 *
 *         client            node A (source)                    node B (target)
 *           |                                                        pod
 *           v          +--> ms_nic_ingress ---+  VXLAN  ms_tunnel_ingress --> host's
 *      the network ----+                      +========>      |      routing --> ms_route_egress
 * --> pod ^          +--- emitted by the <--+         ms_nic_egress
 * <------------------------------- pod |               NIC               +<========      |
 *           +-------------------------------------------------+  (directly, once the path is
 * proved)
 *
 * Four places, one table (midstream_maps.h). The NIC's ingress takes what the
 * network brings and goes into the tunnel without the host's routing: its
 * conntrack need not know of flows that live elsewhere. What comes out of the
 * tunnel for a pod takes the host's whole way instead, so that the target's
 * filters see client -> server as they will when the address has moved. The
 * host routes an address on its way to a device of ours (`ms_route_egress`):
 * there clients on this very node are steered, too, without touching the
 * host's side of the pod's veth pair, where a CNI's policy agent may sit.
 *
 * A tunnel packet is taken only from the peer and with the VNI that its inner
 * address has here: both are the agents' word, agreed on over mutual TLS.
 */
#ifndef MS_STEER_H
#define MS_STEER_H

#include "ms_hold.h"
#include "ms_kernel.h"
#include "ms_parse.h"

enum ms_where {
	MS_WHERE_PASS, /* not ours to decide */
	MS_WHERE_HERE,
	MS_WHERE_PEER,
	MS_WHERE_DROP,
};

#define MS_TTL_OUTER 64

MS_INLINE struct ms_conf *ms_conf(void)
{
	u32 zero = 0;

	return ms_lookup(MS_FD_CONF, &zero);
}

/*
 * An inner or outer packet as far as steering must know it. The key's local is
 * the destination and its remote the source, also of what is not TCP; an ICMP
 * error about TCP has the key of the flow that it is about, whose local end is
 * the error's destination.
 */
struct ms_route {
	struct ms_pkt pkt;
	u8 tcp;   /* the key's ports are valid */
	u8 flags; /* MS_TCP_*, of a TCP segment with its header in place */
	u8 probe; /* UDP between the agents' probe ports */
	u8 local; /* neighbour discovery: about this link and no other */
};

MS_INLINE void ms_route_l4(struct __sk_buff *skb, struct ms_route *r, u8 proto, __be16 probe_port)
{
	u8 tail[2] = {0, 0};
	__be16 ports[2] = {0, 0};

	if (ms_load(skb, r->pkt.l4, ports, sizeof(ports)) < 0)
		return;
	if (proto == IPPROTO_UDP) {
		r->probe = ports[0] == probe_port && ports[1] == probe_port;
		return;
	}
	r->tcp = 1;
	r->pkt.key.local_port = ports[1];
	r->pkt.key.remote_port = ports[0];
	if (ms_load(skb, r->pkt.l4 + 12, tail, 2) == 0)
		r->flags = tail[1];
}

/* An ICMP error about a TCP segment of ours: the flow is the embedded packet's, seen from its
 * sender. */
MS_INLINE void ms_route_icmp4(struct __sk_buff *skb, struct ms_route *r)
{
	u32 inner = r->pkt.l4 + sizeof(struct icmphdr);
	struct iphdr ip;
	__be16 ports[2];
	u8 type[2] = {0, 0};

	if (bpf_skb_load_bytes(skb, r->pkt.l4, type, 2) < 0)
		return;
	if (type[0] != ICMP_DEST_UNREACH && type[0] != ICMP_TIME_EXCEEDED &&
	    type[0] != ICMP_PARAMETERPROB)
		return;
	if (bpf_skb_load_bytes(skb, inner, &ip, sizeof(ip)) < 0 || ip.protocol != IPPROTO_TCP ||
	    ip.ihl < 5 || (ip.frag_off & bpf_htons(0x1fff)))
		return;
	if (bpf_skb_load_bytes(skb, inner + ip.ihl * 4, ports, sizeof(ports)) < 0)
		return;
	if (ip.saddr != ((u32 *)r->pkt.key.local)[3])
		return;
	ms_key_v4(r->pkt.key.remote, ip.daddr);
	r->pkt.key.local_port = ports[0];
	r->pkt.key.remote_port = ports[1];
	r->tcp = 1;
	r->flags = MS_TCP_ACK; /* never a new connection */
}

MS_INLINE int ms_same(const u8 a[16], const u8 b[16])
{
	const u32 *x = (const u32 *)a, *y = (const u32 *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

MS_INLINE void ms_route_icmp6(struct __sk_buff *skb, struct ms_route *r)
{
	u32 inner = r->pkt.l4 + sizeof(struct icmp6hdr);
	struct ipv6hdr ip;
	__be16 ports[2];
	u8 type[2] = {0, 0};

	if (bpf_skb_load_bytes(skb, r->pkt.l4, type, 2) < 0)
		return;
	r->local = type[0] >= 133 && type[0] <= 137; /* RFC 4861 */
	if (type[0] == 0 || type[0] > 4)
		return; /* errors are 1 to 127, assigned are 1 to 4 (RFC 4443) */
	if (bpf_skb_load_bytes(skb, inner, &ip, sizeof(ip)) < 0 || ip.nexthdr != IPPROTO_TCP)
		return;
	if (bpf_skb_load_bytes(skb, inner + sizeof(ip), ports, sizeof(ports)) < 0)
		return;
	if (!ms_same(r->pkt.key.local, (const u8 *)&ip.saddr))
		return;
	ms_key_v6(r->pkt.key.remote, &ip.daddr);
	r->pkt.key.local_port = ports[0];
	r->pkt.key.remote_port = ports[1];
	r->tcp = 1;
	r->flags = MS_TCP_ACK;
}

MS_INLINE int ms_route_v4(struct __sk_buff *skb, struct ms_route *r, __be16 probe_port)
{
	struct iphdr ip;

	if (ms_load(skb, r->pkt.l3, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl < 5)
		return -1;
	ms_key_v4(r->pkt.key.remote, ip.saddr);
	ms_key_v4(r->pkt.key.local, ip.daddr);
	r->pkt.l4 = r->pkt.l3 + ip.ihl * 4;
	if (ip.frag_off & bpf_htons(0x1fff))
		return 0; /* no ports */
	if (ip.protocol == IPPROTO_TCP || ip.protocol == IPPROTO_UDP)
		ms_route_l4(skb, r, ip.protocol, probe_port);
	else if (ip.protocol == IPPROTO_ICMP)
		ms_route_icmp4(skb, r);
	return 0;
}

MS_INLINE int ms_route_v6(struct __sk_buff *skb, struct ms_route *r, __be16 probe_port)
{
	struct ipv6hdr ip;

	if (ms_load(skb, r->pkt.l3, &ip, sizeof(ip)) < 0 || ip.version != 6)
		return -1;
	ms_key_v6(r->pkt.key.remote, &ip.saddr);
	ms_key_v6(r->pkt.key.local, &ip.daddr);
	r->pkt.l4 = r->pkt.l3 + sizeof(ip);
	if (ip.nexthdr == IPPROTO_TCP || ip.nexthdr == IPPROTO_UDP)
		ms_route_l4(skb, r, ip.nexthdr, probe_port);
	else if (ip.nexthdr == IPPROTO_ICMPV6)
		ms_route_icmp6(skb, r);
	else if (!ms_skip_extensions(skb, &r->pkt, ip.nexthdr))
		ms_route_l4(skb, r, IPPROTO_TCP, probe_port);
	return 0;
}

/* 0: addresses are valid, and the rest as far as it goes. */
MS_INLINE int ms_route_parse(struct __sk_buff *skb, struct ms_route *r, __be16 probe_port)
{
	r->pkt.proto = ms_ethertype(skb, &r->pkt.l3);
	if (r->pkt.proto == ETH_P_IP)
		return ms_route_v4(skb, r, probe_port);
	if (r->pkt.proto == ETH_P_IPV6)
		return ms_route_v6(skb, r, probe_port);
	return -1;
}

/* A new connection: who gets it, and all that follows it. */
MS_INLINE int ms_where_syn(const struct ms_route *r, const struct ms_addr_ctl *addr)
{
	u32 birth;

	if (addr->state == MS_ADDR_LEAVING) {
		if (!(addr->flags & MS_ADDR_SYN_PEER)) {
			ms_count(MS_R_SYN_LEAVING);
			return MS_WHERE_DROP;
		}
		birth = MS_BORN_PEER;
	} else if (addr->state == MS_ADDR_ARRIVING) {
		if (!(addr->flags & MS_ADDR_SYN_HERE))
			return MS_WHERE_PEER;
		birth = MS_BORN_HERE;
	} else {
		return addr->state == MS_ADDR_GONE ? MS_WHERE_PEER : MS_WHERE_HERE;
	}
	bpf_map_update_elem_(bpf_pseudo_fd(1, MS_FD_BIRTHS), (void *)&r->pkt.key, &birth, BPF_ANY);
	return birth == MS_BORN_PEER ? MS_WHERE_PEER : MS_WHERE_HERE;
}

/* Where the flow of a packet to `addr` lives. */
MS_INLINE int ms_where(const struct ms_route *r, const struct ms_addr_ctl *addr)
{
	struct ms_flow_ctl ctl;
	u32 *birth;

	if (!r->tcp)
		return MS_WHERE_HERE;
	if (!ms_flow(&r->pkt.key, &ctl))
		return ctl.state == MS_FLOW_MOVED ? MS_WHERE_PEER : MS_WHERE_HERE;
	if ((r->flags & (MS_TCP_SYN | MS_TCP_ACK)) == MS_TCP_SYN)
		return ms_where_syn(r, addr);
	birth = ms_lookup(MS_FD_BIRTHS, &r->pkt.key);
	if (birth)
		return *birth == MS_BORN_PEER ? MS_WHERE_PEER : MS_WHERE_HERE;
	if (addr->state == MS_ADDR_ARRIVING || addr->state == MS_ADDR_GONE)
		return MS_WHERE_PEER;
	return MS_WHERE_HERE;
}

MS_INLINE struct ms_addr_ctl *ms_tunnelled(const u8 ip[16])
{
	struct ms_addr_ctl *addr = ms_lookup(MS_FD_ADDRS, ip);

	if (!addr || !(addr->flags & MS_ADDR_TUNNEL))
		return 0;
	ms_opaque(addr); /* or clang masks the pointer, which the verifier forbids */
	return addr;
}

/* Written once: the entry is read by every CPU for every packet. */
MS_INLINE void ms_see(struct ms_addr_ctl *addr)
{
	if (!addr->seen)
		addr->seen = 1;
}

MS_INLINE int ms_is_mapped(const u8 ip[16])
{
	const u32 *w = (const u32 *)ip;

	return w[0] == 0 && w[1] == 0 && w[2] == bpf_htonl(0xffff);
}

MS_INLINE int ms_set_key(struct __sk_buff *skb, const struct ms_addr_ctl *addr, u32 whole)
{
	struct bpf_tunnel_key key = {.tunnel_id = addr->vni, .tunnel_ttl = MS_TTL_OUTER};
	const u32 *w = (const u32 *)addr->peer;

	if (ms_is_mapped(addr->peer)) {
		key.remote_ipv4 = bpf_ntohl(w[3]);
		return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX | whole);
	}
	for (int i = 0; i < 4; i++)
		key.remote_ipv6[i] = w[i]; /* network order, unlike remote_ipv4 */
	return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6 | whole);
}

/* `whole`: 0, or BPF_F_DONT_FRAGMENT for a packet that shall get through in one piece or not at
 * all. */
MS_INLINE int ms_into_tunnel(struct __sk_buff *skb, const struct ms_addr_ctl *addr, u32 whole)
{
	struct ms_conf *conf = ms_conf();

	if (skb->mark == MS_MARK_TUNNEL)
		return ms_drop(MS_R_TUNNEL_LOOP);
	if (!conf || !conf->tunnel_ifindex || ms_set_key(skb, addr, whole) < 0)
		return ms_drop(MS_R_TUNNEL_FAILED);
	ms_count(MS_R_TUNNEL_OUT);
	return bpf_redirect(conf->tunnel_ifindex, 0);
}

MS_INLINE int ms_steer_nic(struct __sk_buff *skb)
{
	struct ms_route r = {};
	struct ms_addr_ctl *addr;
	int where;

	if (ms_route_parse(skb, &r, 0))
		return ms_pass(MS_R_PASS_UNKNOWN);
	addr = ms_tunnelled(r.pkt.key.local);
	if (!addr)
		return ms_work_in(skb, &r.pkt, MS_INGRESS);
	if (addr->state == MS_ADDR_ARRIVING)
		ms_see(addr);
	where = ms_where(&r, addr);
	if (where == MS_WHERE_PEER)
		return ms_into_tunnel(skb, addr, 0);
	return where == MS_WHERE_DROP ? MS_DROP : ms_work_in(skb, &r.pkt, MS_INGRESS);
}

MS_INLINE int ms_store_macs(struct __sk_buff *skb, const u8 dst[6], const u8 src[6])
{
	u8 macs[2 * ETH_ALEN];

	__builtin_memcpy(macs, dst, ETH_ALEN);
	__builtin_memcpy(macs + ETH_ALEN, src, ETH_ALEN);
	return bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
}

MS_INLINE int ms_steer_routed(struct __sk_buff *skb)
{
	struct ms_route r = {};
	struct ms_addr_ctl *addr;
	struct ms_conf *conf = ms_conf();
	int where;

	if (!conf || ms_route_parse(skb, &r, conf->probe_port))
		return ms_drop(MS_R_TUNNEL_FAILED);
	addr = ms_tunnelled(r.pkt.key.local);
	if (!addr || !addr->pod_ifindex)
		return ms_drop(MS_R_TUNNEL_FAILED);
	if (r.probe)
		return ms_into_tunnel(skb, addr, BPF_F_DONT_FRAGMENT);
	where = ms_where(&r, addr);
	if (where == MS_WHERE_PEER)
		return ms_into_tunnel(skb, addr, 0);
	if (where == MS_WHERE_DROP)
		return MS_DROP;
	if (ms_store_macs(skb, addr->pod_mac, conf->nic_mac) < 0)
		return ms_drop(MS_R_TUNNEL_FAILED);
	skb->mark = 0;
	ms_count(MS_R_STEER_LOCAL);
	return bpf_redirect(addr->pod_ifindex, 0);
}

/* Does the packet's sender own the other end of this address's tunnel? */
MS_INLINE int ms_is_peer(struct __sk_buff *skb, const struct ms_addr_ctl *addr)
{
	struct bpf_tunnel_key key = {};
	const u32 *w = (const u32 *)addr->peer;

	if (ms_is_mapped(addr->peer))
		return bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0) == 0 &&
		       key.tunnel_id == addr->vni && key.remote_ipv4 == bpf_ntohl(w[3]);
	return bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6) == 0 &&
	       key.tunnel_id == addr->vni && key.remote_ipv6[0] == w[0] &&
	       key.remote_ipv6[1] == w[1] && key.remote_ipv6[2] == w[2] &&
	       key.remote_ipv6[3] == w[3];
}

/* The peer's pod speaks from an address that the network has here, or had a moment ago. */
MS_INLINE int ms_emit(struct __sk_buff *skb, const struct ms_route *r, const struct ms_conf *conf)
{
	const u8 *gateway = r->pkt.proto == ETH_P_IP ? conf->gateway_mac_v4 : conf->gateway_mac_v6;

	if (!conf->nic_ifindex || ms_store_macs(skb, gateway, conf->nic_mac) < 0)
		return ms_drop(MS_R_TUNNEL_FAILED);
	skb->mark = MS_MARK_TUNNEL; /* ms_steer_out lets it out as it is */
	ms_count(MS_R_TUNNEL_EMIT);
	return bpf_redirect(conf->nic_ifindex, 0);
}

MS_INLINE int ms_steer_arrived(struct __sk_buff *skb)
{
	struct ms_route r = {};
	struct ms_conf *conf = ms_conf();
	struct ms_addr_ctl *addr;

	if (!conf || ms_route_parse(skb, &r, conf->probe_port))
		return ms_drop(MS_R_TUNNEL_PEER);
	addr = ms_tunnelled(r.pkt.key.local);
	if (addr && ms_is_peer(skb, addr)) {
		if (r.probe)
			return ms_drop(MS_R_TUNNEL_PROBE);
		if (addr->state == MS_ADDR_LEAVING)
			ms_see(addr);
		skb->mark = MS_MARK_TUNNEL;
		bpf_skb_change_type(skb, 0); /* PACKET_HOST: the inner MAC is some other device's */
		ms_count(MS_R_TUNNEL_IN);
		return MS_PASS;
	}
	addr = ms_tunnelled(r.pkt.key.remote);
	if (addr && ms_is_peer(skb, addr))
		return r.probe ? ms_drop(MS_R_TUNNEL_PROBE) : ms_emit(skb, &r, conf);
	return ms_drop(MS_R_TUNNEL_PEER);
}

/* End of the segment, in sequence numbers; a FIN is not looked at here. 0: there is no TCP header.
 */
MS_INLINE int ms_segment_end(struct __sk_buff *skb, const struct ms_pkt *p, u32 *seq, u32 *end)
{
	u32 tcp[4]; /* ports, seq, ack, data offset .. window */

	if (ms_load(skb, p->l4, tcp, sizeof(tcp)) < 0)
		return 0;
	*seq = bpf_ntohl(tcp[1]);
	*end = *seq + skb->len - p->l4 - ((bpf_ntohl(tcp[3]) >> 28) * 4);
	return 1;
}

/* May this packet leave the way, too, that the network does not take yet? See ms_copies. */
MS_INLINE int ms_copy_too(struct __sk_buff *skb, const struct ms_pkt *p)
{
	u32 flow = bpf_get_hash_recalc(skb), slot = flow & (MS_COPIES_MAX - 1), seq, end;
	struct ms_copies *c = ms_lookup(MS_FD_COPIES, &slot);
	u64 now = bpf_ktime_get_ns(), full;
	int known;

	if (!c || !ms_segment_end(skb, p, &seq, &end))
		return 1;
	known = c->flow == flow;
	full = c->full_ns;
	if (!known || (s64)(now - c->last_ns) >= MS_COPY_PAUSE_NS || (s64)(full - now) < 0)
		full = now;
	c->flow = flow;
	c->last_ns = now;
	c->full_ns = full;
	if (known && ms_before(seq, c->end))
		return 1;
	c->end = end;
	if (full - now >= (u64)MS_COPY_BURST * MS_COPY_NS_BYTE)
		return 0;
	c->full_ns = full + (u64)skb->len * MS_COPY_NS_BYTE;
	return 1;
}

/*
 * The first word, the last one and what is no TCP goes both ways in any case: the bulk of a
 * connection is sent again when it is lost, an RST and a datagram are not.
 */
MS_INLINE int ms_is_bulk(const struct ms_route *r)
{
	return r->tcp && !(r->flags & (MS_TCP_SYN | MS_TCP_FIN | MS_TCP_RST));
}

/* Nobody knows yet, or any more, from which node the network takes packets of this address. */
MS_INLINE int ms_out_both(struct __sk_buff *skb, const struct ms_route *r,
			  const struct ms_addr_ctl *addr, const struct ms_conf *conf)
{
	if (!addr->seen && ms_is_bulk(r) && !ms_copy_too(skb, &r->pkt)) {
		ms_count(MS_R_OUT_BULK);
		return addr->state == MS_ADDR_ARRIVING ? ms_into_tunnel(skb, addr, 0) : MS_PASS;
	}
	if (!conf->tunnel_ifindex || ms_set_key(skb, addr, 0) < 0 ||
	    bpf_clone_redirect(skb, conf->tunnel_ifindex, 0) < 0)
		ms_count(MS_R_TUNNEL_FAILED);
	return ms_pass(MS_R_OUT_BOTH);
}

MS_INLINE int ms_steer_out(struct __sk_buff *skb)
{
	struct ms_route r = {};
	struct ms_conf *conf = ms_conf();
	struct ms_addr_ctl *addr;

	if (!conf || ms_route_parse(skb, &r, conf->probe_port))
		return MS_PASS;
	addr = ms_tunnelled(r.pkt.key.remote);
	/* an advertisement that the peer emitted would claim the address for the peer */
	if (!addr || r.probe || r.local || !(addr->flags & MS_ADDR_OUT_TUNNEL))
		return MS_PASS;
	if (skb->mark == MS_MARK_TUNNEL) {
		skb->mark = 0;
		return MS_PASS;
	}
	if (!(addr->flags & MS_ADDR_OUT_DIRECT))
		return ms_into_tunnel(skb, addr, 0);
	return ms_out_both(skb, &r, addr, conf);
}

#endif
