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
 *   ms_addrs    ms_addr_key         ms_addr_ctl        agent only (but for `seen`: BPF)
 *   ms_births   ms_flow_key         ms_birth (u32)     BPF only (agent deletes)
 *   ms_copies   slot (u32)          ms_copies          BPF only
 *   ms_conf     0 (u32)             ms_conf            agent only
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
 *                 ^_____________|________|________|  rollback: thaw, entry deleted
 *   target:  (none) -> HELD -> HERE -> (none = LIVE, once the address has settled)
 *                 ^______|            discard: entry deleted with the sockets
 *
 * With switchover Wait the target goes from HELD to (none) at once: nothing is
 * steered. MOVED says where packets go and not who owns the flow: until COMMIT
 * is journalled the source may take it back, and the target's hold keeps what
 * was sent there meanwhile from being acknowledged.
 *
 * Who drops what, at the pod's eth0 (hold = ingress, gate = egress):
 *
 *   state    ingress                                egress
 *   LIVE     passes                                 passes
 *   FROZEN   absorbed in silence, noted             dropped
 *   HELD     absorbed, noted; answered with a       dropped (but for the
 *            zero window where RFC 9293 wants ACK   hold's own answers)
 *   MOVED    dropped                                dropped
 *   HERE     passes                                 passes
 *
 * A client's RST at exactly rcv_nxt marks the note MS_NOTE_RST: from then on
 * the flow is absorbed and never answered again, SYNs included.
 */
enum ms_flow_state {
	MS_FLOW_LIVE = 0, /* never stored: no entry means live */
	MS_FLOW_FROZEN = 1,
	MS_FLOW_HELD = 2,
	MS_FLOW_MOVED = 3,
	MS_FLOW_HERE = 4, /* live on this node, while its address is not or not surely here */
};

/* IPv4 addresses are v4-mapped (::ffff:a.b.c.d), whatever the socket's family. */
struct ms_flow_key {
	__u8 local[16];  /* the floating IP */
	__u8 remote[16]; /* the client */
	__be16 local_port;
	__be16 remote_port;
};

#define MS_CTL_TIMESTAMPS (1u << 0) /* answers carry the timestamp option */

struct ms_flow_ctl {
	__u32 state;   /* enum ms_flow_state */
	__u32 flags;   /* MS_CTL_* */
	__u32 snd_nxt; /* seq of the hold's answers: end of what was ever sent */
	__u32 rcv_nxt; /* ack of the hold's answers: end of the dumped receive queue */
	__u32 tsval;   /* TSval of the answers, frozen at the dumped value */
	__u32 pad0;
	__u32 pad1;
	__u32 pad2;
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

/*
 * Addresses that are on their way: what a packet meets that has no flow entry.
 *
 *   state     on      TCP without entry or birth    new connection (SYN)
 *   LEAVING   source  is here                       dropped in silence, or with SYN_PEER
 *                                                   to the peer, as all that follows it
 *   ARRIVING  target  goes to the peer              to the peer, or with SYN_HERE here,
 *                                                   as all that follows it
 *   SETTLED   target  is here                       is here
 *   GONE      source  goes to the peer              goes to the peer
 *
 * Their one legal order: LEAVING -> GONE -> (none), ARRIVING -> SETTLED ->
 * (none); (none) at any time before the first COMMIT. "Goes to the peer" needs
 * MS_ADDR_TUNNEL, without which it is "passes". What is not TCP, nor an ICMP
 * error about TCP, belongs to the node that has the packet. What came out of
 * the tunnel never goes into it again: no packet can circle.
 *
 * An address has one peer, so a flow needs none of its own.
 */
enum ms_addr_state {
	MS_ADDR_LEAVING = 1,
	MS_ADDR_ARRIVING = 2,
	MS_ADDR_SETTLED = 3,
	MS_ADDR_GONE = 4,
};

#define MS_ADDR_TUNNEL (1u << 0)   /* switchover Steer: vni, peer and pod are set */
#define MS_ADDR_SYN_PEER (1u << 1) /* source: new connections are the peer's */
#define MS_ADDR_SYN_HERE (1u << 2) /* target: new connections are ours */
/*
 * How packets *from* the address leave this node. Neither: as they would without
 * us. Both: from the assign call until the path is proved, since nobody knows in
 * which instant the network accepts them from where; duplicates are harmless, but
 * one of two is carried for nothing. So a bulk flow's second copies are limited
 * (ms_copies) as long as the network is known to be as it was.
 */
#define MS_ADDR_OUT_TUNNEL (1u << 3) /* through the tunnel, the peer emits them */
#define MS_ADDR_OUT_DIRECT (1u << 4) /* by the NIC */

struct ms_addr_key {
	__u8 addr[16];
};

struct ms_addr_ctl {
	__u32 state; /* enum ms_addr_state */
	__u32 flags; /* MS_ADDR_* */
	__u32 epoch;
	__u32 vni;         /* of the tunnel, both ways; the two agents agree on it for each job */
	__u8 peer[16];     /* the other node's end of the tunnel, v4-mapped */
	__u32 pod_ifindex; /* host side of the pod's veth pair */
	__u8 pod_mac[6];   /* the pod's side */
	/*
	 * The network has brought here what it would have brought to the peer before: it has
	 * moved the address, or begun to. Set by BPF; every stage that the agent sets clears it
	 * (an update in that very instant, too: the next packet sets it again).
	 */
	__u8 seen;
	__u8 pad[1];
};

/*
 * What a TCP flow that leaves both ways may send the other way: the one that
 * leads nowhere as long as the address has not moved (target: by the NIC;
 * source: through the tunnel). MS_COPY_BURST bytes at once, refilled by one byte
 * each MS_COPY_NS_BYTE. Not limited are:
 *
 *   a flow that was silent for MS_COPY_PAUSE_NS: it starts anew. Tokens come
 *     with pauses, and so does the probe for a lost tail, which waits for 2 ms
 *     and two round trips (tcp_schedule_loss_probe)
 *   what is sent again: what went lost in the instant of the move must not be
 *     lost twice, and what its receipt sets free goes on by fast retransmission
 *   all, once the network was seen to have changed (ms_addr_ctl.seen)
 *
 * So a stream of tokens leaves both ways as a whole. A download that the network
 * takes from the other node without warning loses what is under way, is never
 * silent there, and never waits for a retransmission timeout.
 *
 * A slot is its last flow's: where two share one, each starts anew whenever the
 * other spoke, and copies are too many, never too few. Two CPUs with packets of
 * one flow at once may lose what either adds, to the same effect.
 */
#define MS_COPIES_MAX 4096 /* a power of two */
#define MS_COPY_BURST 65536
#define MS_COPY_NS_BYTE 1000
#define MS_COPY_PAUSE_NS 2000000

struct ms_copies {
	__u32 flow;    /* skb's hash of the flow whose slot this is */
	__u32 end;     /* of its newest segment, in sequence numbers */
	__u64 last_ns; /* of its newest packet */
	__u64 full_ns; /* by then all is refilled */
};

/* Connections made while their address was on its way; whose they are. */
enum ms_birth {
	MS_BORN_HERE = 1,
	MS_BORN_PEER = 2,
};

/* What the programs must know of this node. */
struct ms_conf {
	__u32 nic_ifindex;    /* carries floating IPs */
	__u32 tunnel_ifindex; /* VXLAN device, collect_md */
	__be16 probe_port;    /* UDP to and from it is the agents' own */
	__u8 nic_mac[6];
	__u8 gateway_mac_v4[6]; /* next hop of the NIC; zero: none */
	__u8 gateway_mac_v6[6];
	__u8 pad[4];
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
	MS_R_FRAGMENT = 12,      /* first fragment of a held flow: absorbed, not noted */
	MS_R_BAD_CHECKSUM = 13,  /* absorbed, as the stack would: neither noted nor answered */
	MS_R_NOTE_MISSING = 14,  /* held flow without a note entry: absorbed, not kept */
	MS_R_SKEWED = 15,        /* ack beyond snd_nxt or seq far off: absorbed, not noted */
	MS_R_TUNNEL_OUT = 16,    /* went into the tunnel */
	MS_R_TUNNEL_IN = 17,     /* came out of it, for a pod of this node */
	MS_R_TUNNEL_EMIT = 18,   /* came out of it, emitted by the NIC for the peer */
	MS_R_TUNNEL_PROBE = 19,  /* a probe of the agents: their packet sockets have it already */
	MS_R_TUNNEL_PEER = 20,   /* dropped: sender, VNI and address do not belong together */
	MS_R_TUNNEL_LOOP = 21,   /* dropped: came out of the tunnel and is nobody's here */
	MS_R_TUNNEL_FAILED = 22, /* dropped: no key, no room, no next hop */
	MS_R_STEER_LOCAL = 23,   /* the host's own routing, handed to the pod */
	MS_R_OUT_BOTH = 24,      /* a copy went into the tunnel, the packet by the NIC */
	MS_R_OUT_BULK = 25,      /* such a copy was spared: the packet left one way only */
	MS_R_MAX = 26,
};

/* Entries of ms_counters: room for reasons to come, so that an upgrade keeps the map. */
#define MS_COUNTERS_MAX 64

/* skb->mark of a packet that the hold itself made; the gate lets it out. */
#define MS_MARK_ANSWER 0x4d530001u
/* skb->mark of a packet that came out of the tunnel; within the host's namespace only. */
#define MS_MARK_TUNNEL 0x4d530002u

#endif /* MIDSTREAM_MAPS_H */
