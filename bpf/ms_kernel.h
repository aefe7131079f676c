/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ms_kernel.h - what the programs take from the kernel and from the loader.
 *
 * The loader creates (or finds pinned) the maps itself and compiles these
 * sources against their descriptors, MS_FD_*; so the maps outlive every
 * recompilation, and bcc's own map declarations are not used. It also passes
 * the sizes it created them with: a layout that differs does not compile.
 */
#ifndef MS_KERNEL_H
#define MS_KERNEL_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/icmp.h>
#include <uapi/linux/icmpv6.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/udp.h>

#include "midstream_maps.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ms_note.h locks a note through its low half: little-endian machines only"
#endif

#define MS_INLINE static inline __attribute__((always_inline))

/* Lets the next filter of the chain decide; TC_ACT_OK would end it before foreign filters. */
#define MS_PASS TC_ACT_UNSPEC
/*
 * SHOT and not STOLEN, also at egress: the socket learns that nothing left, and
 * bytes it meant to send stay unsent instead of becoming lost packets in flight.
 */
#define MS_DROP TC_ACT_SHOT

_Static_assert(sizeof(struct ms_flow_key) == MS_SIZE_KEY, "ms_flow_key: loader and header differ");
_Static_assert(sizeof(struct ms_flow_ctl) == MS_SIZE_CTL, "ms_flow_ctl: loader and header differ");
_Static_assert(sizeof(struct ms_flow_note) == MS_SIZE_NOTE,
	       "ms_flow_note: loader and header differ");
_Static_assert(sizeof(struct ms_addr_key) == MS_SIZE_ADDR_KEY,
	       "ms_addr_key: loader and header differ");
_Static_assert(sizeof(struct ms_addr_ctl) == MS_SIZE_ADDR_CTL,
	       "ms_addr_ctl: loader and header differ");
_Static_assert(sizeof(struct ms_copies) == MS_SIZE_COPIES, "ms_copies: loader and header differ");
_Static_assert(sizeof(struct ms_conf) == MS_SIZE_CONF, "ms_conf: loader and header differ");
_Static_assert(MS_R_MAX <= MS_COUNTERS_MAX, "ms_counters has no room for every reason");

/* Keeps clang from reasoning about `x` across this point: the verifier must see the check. */
#define ms_opaque(x) asm volatile("" : "+r"(x))

MS_INLINE void *ms_lookup(u64 map_fd, const void *key)
{
	return bpf_map_lookup_elem_(bpf_pseudo_fd(1, map_fd), (void *)key);
}

MS_INLINE void ms_count(u32 reason)
{
	u64 *n = ms_lookup(MS_FD_COUNTERS, &reason);

	if (n)
		*n += 1; /* per CPU, and softirqs do not nest */
}

MS_INLINE int ms_drop(u32 reason)
{
	ms_count(reason);
	return MS_DROP;
}

MS_INLINE int ms_pass(u32 reason)
{
	ms_count(reason);
	return MS_PASS;
}

/* Sequence numbers compare by signed distance (RFC 9293, 3.4). */
MS_INLINE int ms_before(u32 a, u32 b)
{
	return (s32)(a - b) < 0;
}

#endif
