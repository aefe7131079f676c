/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * midstream.c - the TC entry points (clsact, direct action). Compiled and
 * pinned by `python -m midstream_agent.hold load`, attached by the agent.
 */
#include "ms_hold.h"
#include "ms_steer.h"

/* Ingress of the pod's eth0: all that reaches the pod ends here, whatever side it came from. */
int ms_hold_ingress(struct __sk_buff *skb)
{
	return ms_work(skb, MS_INGRESS);
}

/* Egress of the pod's eth0. */
int ms_gate_egress(struct __sk_buff *skb)
{
	return ms_work(skb, MS_EGRESS);
}

/* Ingress of the host's NIC that carries floating IPs: steers, and holds when the pod is gone. */
int ms_nic_ingress(struct __sk_buff *skb)
{
	return ms_steer_nic(skb);
}

/* Egress of that NIC: packets from an address that the network has at the peer, or may have. */
int ms_nic_egress(struct __sk_buff *skb)
{
	return ms_steer_out(skb);
}

/* Ingress of the tunnel: what the peer has steered here, or wants emitted. */
int ms_tunnel_ingress(struct __sk_buff *skb)
{
	return ms_steer_arrived(skb);
}

/* Egress of the device to which the host routes addresses that are on their way. */
int ms_route_egress(struct __sk_buff *skb)
{
	return ms_steer_routed(skb);
}
