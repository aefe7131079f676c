/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * midstream_maps.h - the one contract between the BPF programs and whoever
 * fills their maps (agent, C library, tests). Plain C types, no includes but
 * <linux/types.h>; it is read by bcc, by gcc and by the Python contract test.
 *
 * Byte order: addresses and ports are network order (as in the packet); every
 * other number is host order. Sequence numbers are absolute, as on the wire
 * after ntohl.
 *
 *   map         key                 value              written by
 *   ms_flows    ms_flow_key         ms_flow_ctl        agent only
 *   ms_notes    ms_flow_key         ms_flow_note       BPF only (agent creates and deletes)
 *   ms_addrs    ms_addr_key         ms_addr_ctl        agent only
 *   ms_counters ms_reason (u32)     u64 per CPU        BPF only
 *
 * Two maps for a flow and not one: an update by the agent would overwrite a
 * note that BPF wrote in the same instant.
 */
#ifndef MIDSTREAM_MAPS_H
#define MIDSTREAM_MAPS_H

#include <linux/types.h>

/*
 * A flow's states on one node and their one legal order:
 *
 *   source:  (none = LIVE) -> FROZEN -> HELD -> MOVED -> (none, after linger)
 *                 ^_____________|________|  rollback: thaw, entry deleted
 *   target:  (none) -> FROZEN -> HELD -> (none = LIVE)
 *                 ^_______|________|         discard: entry deleted with the sockets
 *
 * Who drops what, at the pod's eth0 (hold = ingress, gate = egress):
 *
 *   state    ingress                                egress
 *   LIVE     passes                                 passes
 *   FROZEN   absorbed in silence, noted             dropped
 *   HELD     absorbed, noted; answered with a       dropped (but for the
 *            zero window where RFC 9293 wants ACK   hold's own answers)
 *   MOVED    dropped (steered, once there is a      dropped
 *            tunnel: MS_CTL_STEER)
 *
 * A client's RST at exactly rcv_nxt marks the note MS_NOTE_RST: from then on
 * the flow is absorbed and never answered again, SYNs included.
 */
enum ms_flow_state {
	MS_FLOW_LIVE = 0, /* never stored: no entry means live */
	MS_FLOW_FROZEN = 1,
	MS_FLOW_HELD = 2,
	MS_FLOW_MOVED = 3,
	MS_FLOW_NOT_HERE = 4, /* reserved for switchover Steer */
};

/* IPv4 addresses are v4-mapped (::ffff:a.b.c.d), whatever the socket's family. */
struct ms_flow_key {
	__u8 local[16];  /* the floating IP */
	__u8 remote[16]; /* the client */
	__be16 local_port;
	__be16 remote_port;
};

#define MS_CTL_TIMESTAMPS (1u << 0) /* answers carry the timestamp option */
#define MS_CTL_STEER (1u << 1)      /* reserved: MOVED goes to peer `peer` */

struct ms_flow_ctl {
	__u32 state;   /* enum ms_flow_state */
	__u32 flags;   /* MS_CTL_* */
	__u32 snd_nxt; /* seq of the hold's answers: end of what was ever sent */
	__u32 rcv_nxt; /* ack of the hold's answers: end of the dumped receive queue */
	__u32 tsval;   /* TSval of the answers, frozen at the dumped value */
	__u32 peer;    /* reserved for Steer: index of the tunnel peer */
	__u32 epoch;
	__u32 pad;
};

#define MS_NOTE_DATA_MAX 2048

#define MS_NOTE_SEG (1u << 0)      /* seq .. tsecr describe the client's newest segment */
#define MS_NOTE_DATA (1u << 1)     /* data[0..data_len) starts at data_seq */
#define MS_NOTE_RST (1u << 2)      /* the client reset the connection (at rcv_nxt) */
#define MS_NOTE_FIN (1u << 3)      /* the client's FIN was seen at the end of what is kept */
#define MS_NOTE_TS (1u << 4)       /* tsval/tsecr are valid */
#define MS_NOTE_RST_SEEN (1u << 5) /* RST while FROZEN: valid if rst_seq is rcv_nxt */

/*
 * What the hold keeps of an absorbed client. "Newest" is by ack, then TSval,
 * then seq, then arrival. Nothing in here was acknowledged; the client sends it
 * again if the note is lost.
 *
 * Kept data: in HELD what follows rcv_nxt (data_seq == rcv_nxt), the longest
 * seen. In FROZEN rcv_nxt is not known yet, so the segment with the lowest seq
 * is kept: the reader compares with the dumped rcv_nxt, trims what lies before,
 * and ignores data that starts beyond it. The same goes for the FIN, which is
 * at data_seq + data_len (data_len is 0, without MS_NOTE_DATA, for a bare FIN),
 * and for an RST that came while FROZEN.
 *
 * seq, ack and window are not those of a segment that must be played back: the
 * newest may be a probe at an old seq. Play with seq = rcv_nxt.
 */
struct ms_flow_note {
	__u32 version; /* even: stable; odd: BPF is writing; good when two reads agree */
	__u32 flags;   /* MS_NOTE_* */
	__u32 seq;
	__u32 ack;
	__u32 window; /* the 16-bit field as it was on the wire, not scaled */
	__u32 tsval;
	__u32 tsecr;
	__u32 data_seq;
	__u32 data_len;
	__u32 absorbed; /* packets absorbed */
	__u32 answered; /* zero-window ACKs sent */
	__u32 rst_seq;  /* with MS_NOTE_RST_SEEN */
	__u8 data[MS_NOTE_DATA_MAX];
};

/* Addresses that are on their way: what a segment without a flow entry meets. */
#define MS_ADDR_LEAVING 1 /* SYNs are dropped in silence (Wait) or steered (Steer) */

struct ms_addr_key {
	__u8 addr[16];
};

struct ms_addr_ctl {
	__u32 state; /* MS_ADDR_* */
	__u32 peer;  /* reserved for Steer */
	__u32 epoch;
	__u32 pad;
};

/* Every drop and every answer has a reason here; index into ms_counters. */
enum ms_reason {
	MS_R_PASS_UNKNOWN = 0, /* no entry: passed untouched */
	MS_R_ABSORB_FROZEN = 1,
	MS_R_ABSORB_HELD = 2,
	MS_R_ANSWER_ZERO_WINDOW = 3,
	MS_R_GATE_DROP = 4,
	MS_R_GATE_PASS_ANSWER = 5,
	MS_R_MOVED_DROP = 6,
	MS_R_SYN_LEAVING = 7,
	MS_R_DEAD_DROP = 8,
	MS_R_MALFORMED = 9,  /* a segment of a held flow that cannot be parsed: absorbed */
	MS_R_NOTE_BUSY = 10, /* another CPU was writing the note: not kept */
	MS_R_ANSWER_FAILED = 11,
	MS_R_FRAGMENT = 12,     /* first fragment of a held flow: absorbed, not noted */
	MS_R_BAD_CHECKSUM = 13, /* absorbed, as the stack would: neither noted nor answered */
	MS_R_NOTE_MISSING = 14, /* held flow without a note entry: absorbed, not kept */
	MS_R_SKEWED = 15,       /* ack beyond snd_nxt or seq far off: absorbed, not noted */
	MS_R_MAX = 16,
};

/* Entries of ms_counters: room for reasons to come, so that an upgrade keeps the map. */
#define MS_COUNTERS_MAX 64

/* skb->mark of a packet that the hold itself made; the gate lets it out. */
#define MS_MARK_ANSWER 0x4d530001u

#endif /* MIDSTREAM_MAPS_H */
