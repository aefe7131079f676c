/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * midstream.c - the TC entry points (clsact, direct action). Compiled and
 * pinned by `python -m midstream_agent.hold load`, attached by the agent.
 */
#include "ms_hold.h"

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

/* Ingress of the host's NIC that carries floating IPs: the same hold, when the pod is gone. */
int ms_nic_ingress(struct __sk_buff *skb)
{
	return ms_work(skb, MS_INGRESS);
}
