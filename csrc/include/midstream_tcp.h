/* SPDX-License-Identifier: Apache-2.0 */
/*
 * midstream_tcp.h - checkpoint and restore of TCP sockets, with their queues.
 *
 * This header is the manual. The bytes of a checkpoint are described in
 * docs/checkpoint-format.md.
 *
 * THE RECIPE
 *
 *   source                                    target
 *   ------------------------------------      ------------------------------------
 *   1 the application stops: no read, write
 *     or poll on the fds until 6
 *   2 ms_tcp_probe()
 *   3 ms_tcp_flow_keys(); gate the flows:
 *     no packet leaves, none arrives
 *   4 ms_tcp_checkpoint()      [frozen]
 *     ms_tcp_flow_ctl() -> the hold answers
 *   5 ms_tcp_encode() ----------------------> ms_tcp_decode(); gate the flows
 *                                             ms_tcp_restore(blank fds)
 *   6 commit, with the hold's notes --------> ms_tcp_activate_begin(notes)
 *     close(fds): no FIN, no RST              open the gate
 *                                             play ms_tcp_client_packets(PRIME)
 *                                             play ms_tcp_client_packets(PLAY)
 *                                             ms_tcp_activate_finish(notes)
 *
 *   rollback at the source, any time before the commit:
 *     ms_tcp_thaw_begin(notes); open the gate; play PRIME, PLAY;
 *     ms_tcp_thaw_finish(notes)
 *   giving up at the target: close(blank fds). A socket in repair mode says
 *     nothing when it is closed, whoever closes it.
 *
 * PRECONDITIONS
 *
 *   - CAP_NET_ADMIN in the user namespace that owns the socket's network
 *     namespace. Nothing else: `unshare -rn` is enough, and no call needs to be
 *     made from inside the socket's network namespace.
 *   - Between checkpoint (restore) and thaw (activate) no packet of the flow may
 *     reach the socket and none may leave. A frozen socket still runs its timers.
 *     Without a gate nothing crashes, but a byte that is acknowledged after the
 *     checkpoint is lost.
 *   - A frozen socket answers recv() with EPERM, send() with EINVAL, and epoll
 *     says that it is ready: an event loop that still knows it would close it.
 *   - A blank fd is a fresh socket(AF_INET or AF_INET6, SOCK_STREAM, 0): never
 *     bound, never connected, options untouched. Whoever created it is charged
 *     for its memory, and its network namespace is where the flow will live: let
 *     the target pod create it. ms_tcp_families() says which family each needs.
 *   - The local address is best already present in the blank's namespace, with a
 *     route to the client. Where it is not yet, restore needs IP_TRANSPARENT for
 *     the moment of connect(), which CAP_NET_ADMIN allows.
 *
 * THE QUEUES OF A TCP SOCKET, and what a checkpoint holds
 *
 *   send                 SIOCOUTQ
 *        |<--------------------------------->|
 *        |      sent        |    SIOCOUTQNSD |
 *        |                  |<-------------->|
 *   -----+------------------+----------------+----> sequence numbers
 *      snd_una           snd_nxt         write_seq (the FIN, once there is one,
 *                                         is the last number before it)
 *   receive        SIOCINQ
 *        |<------------------->|
 *   -----+---------------------+------------------>
 *    copied_seq             rcv_nxt (past the peer's FIN, once it came)
 *
 *   Data that arrived out of order is not in a checkpoint. It was SACKed and not
 *   acknowledged: the client sends it again.
 *
 * ACTIVATE, and why in two calls (measured on Linux 6.18; the wrong order costs
 * between 0.5 and 15 seconds of silence):
 *
 *   begin   the send queue starts at the highest ack that the hold absorbed:
 *           a socket whose snd_una lies behind is seated again (a disconnect in
 *           repair mode is silent). Timestamps go on at the dumped value + 2.
 *           Repair ends without a window probe: nothing was emitted so far.
 *   PRIME   one pure ACK of the client with its newest ack, window and timestamp.
 *           It teaches stateful filters that the client speaks first, and opens
 *           the window. It must come before anything is emitted, because the
 *           client's answer to that would carry a newer timestamp, and PAWS would
 *           then reject the kept segment.
 *   PLAY    the client's kept payload, its FIN or RST, and, for a flow for which
 *           nothing will be sent, one old byte (rcv_nxt - 1): the socket drops it
 *           and answers with an ACK at once: right seq, ack, window, timestamps,
 *           which reopens the zero window the hold had shown. So no raw packet has
 *           to be forged on the server's side.
 *   finish  the rest of the send queue as new data, Nagle off for that moment.
 *           Of more than 10 segments all but the last are queued as sent in
 *           begin: the client may have them, its ack may still be on its way,
 *           and acks beyond snd_nxt would be dropped.
 *           A socket that was CLOSING goes on as LAST_ACK, since PLAY brought the
 *           client's FIN before ours is sent; to both ends it is the same.
 *
 * UNITS AND BYTE ORDER. Sequence numbers are absolute and in host order, as are
 * all numbers but those of struct ms_flow_key (network order, as in a packet).
 * IPv4 addresses are v4-mapped in it. Lengths are bytes.
 *
 * ERRORS. A call returns the number of sockets that failed, or -errno when the
 * call as a whole failed; err[i] is 0 or -errno for socket i. One bad socket never
 * harms the others. What each errno means here: ms_tcp_refusal(), ms_tcp_strerror().
 *
 *   probe, checkpoint                        restore
 *   -EBADF             BadFd                 -EAFNOSUPPORT   BlankFamily
 *   -ENOTSOCK          NotASocket            -EISCONN        BlankInUse
 *   -EPROTOTYPE        NotTcp                -EADDRINUSE     FlowExists
 *   -EPROTONOSUPPORT   Mptcp                 -EADDRNOTAVAIL  FlowExists
 *   -EOPNOTSUPP        Listener              -ENETUNREACH    NoRoute
 *   -ENOTCONN          NotConnected          -ENOBUFS        QueueTooLarge
 *   -EINPROGRESS       Handshake (TFO too)   -ENODEV         NoSuchDevice
 *   -ESOCKTNOSUPPORT   UnknownUlp (TLS...)   -ENOENT         NoCongestionControl
 *   -EBUSY             UrgentData            decode
 *   -EAGAIN            Unstable: retry       -EBADMSG        Damaged (truncated, checksum)
 *   -EPERM             NoCapability          -EPROTO         Malformed
 *   thaw, activate                           -ENOPROTOOPT    NewerFormat
 *   -ESTALE            NotRestored
 *   -ENOMEM            NoMemory (any)
 *
 * NOT CARRIED: ECN (the transfer goes on without), MSG_ZEROCOPY completions, TCP
 * MD5 keys, socket filters, sockmap membership; none of them can be seen from
 * outside but the first. Serving pods run with tcp_ecn=0.
 *
 * THREADS. Calls on different batches and fds may run at the same time; a batch
 * has no lock of its own. No call ever blocks.
 *
 * SOURCES. Linux 6.18 net/ipv4/tcp.c, tcp_output.c, tcp_input.c; CRIU soccr;
 * RFC 7323 (PAWS), RFC 5961, RFC 9293; measurements in comments where they decide.
 */
#ifndef MIDSTREAM_TCP_H
#define MIDSTREAM_TCP_H

#include <stddef.h>
#include <stdint.h>
#include "midstream_maps.h" /* struct ms_flow_key, ms_flow_ctl, ms_flow_note: shared with BPF */

#ifdef __cplusplus
extern "C" {
#endif

/* n checkpoints, in the order of the fds. Made by checkpoint or decode, ended by
 * ms_tcp_batch_free(). */
typedef struct ms_tcp_batch ms_tcp_batch;

/* Can these sockets be moved? Touches nothing; best asked before anything is frozen. */
int ms_tcp_probe(const int *fds, size_t n, int *err);

/* The flows' keys, by getsockname() and getpeername(). keys: n entries, zeroed where err[i]. */
int ms_tcp_flow_keys(const int *fds, size_t n, struct ms_flow_key *keys, int *err);

/*
 * Freezes the sockets (TCP_REPAIR) and reads them until what was read is stable.
 * The queues stay in the sockets. A socket that fails is not left frozen; those
 * that succeed are, and it is for the caller to thaw or to close them. *out is
 * made whenever the call does not return < 0; its failed entries are skipped by
 * all later calls, but cannot be encoded. May be called on a socket that is
 * frozen already (an agent that restarted): the fds stay the caller's.
 */
int ms_tcp_checkpoint(const int *fds, size_t n, ms_tcp_batch **out, int *err);

/*
 * Rollback. The fds are those of the checkpoint; notes: n entries, zeroed where
 * the hold kept nothing. A socket with nothing in flight only leaves repair mode;
 * one with bytes in flight, or one that timed out while frozen, is seated again
 * from the checkpoint: a mere end of repair stalled clients for 140 ms to 1.6 s.
 * Between the two calls the checkpoint is the only holder of such bytes.
 */
int ms_tcp_thaw_begin(const int *fds, size_t n, ms_tcp_batch *b, const struct ms_flow_note *notes,
		      int *err);
int ms_tcp_thaw_finish(const int *fds, size_t n, ms_tcp_batch *b, const struct ms_flow_note *notes,
		       int *err);

/* buf NULL: only *len is set. -ENOSPC when cap is too small; -EINVAL when an entry had failed. */
int ms_tcp_encode(const ms_tcp_batch *b, uint8_t *buf, size_t cap, size_t *len);

/* Trusts nothing in buf, keeps no pointer into it. */
int ms_tcp_decode(const uint8_t *buf, size_t len, ms_tcp_batch **out);

void ms_tcp_batch_free(ms_tcp_batch *b); /* closes no fd; NULL is fine */
size_t ms_tcp_batch_len(const ms_tcp_batch *b);

/* 4 or 6 for each: the family the blank must have (6 for v4-mapped: the application sees AF_INET6).
 */
int ms_tcp_families(const ms_tcp_batch *b, uint8_t *families);

/* What the hold needs to answer for the flows; `state` is an enum ms_flow_state. */
int ms_tcp_flow_ctl(const ms_tcp_batch *b, uint32_t state, struct ms_flow_key *keys,
		    struct ms_flow_ctl *ctls);

/* For people and tests: what a checkpoint holds. */
struct ms_tcp_summary {
	struct ms_flow_key key;
	uint8_t family;  /* 4, 6 */
	uint8_t state;   /* as in TCP_INFO: 1 ESTABLISHED, 4 FIN_WAIT1, ... */
	uint8_t options; /* TCPI_OPT_* */
	uint8_t wscale;  /* snd | rcv << 4 */
	uint32_t snd_una, snd_nxt, write_seq, rcv_nxt, tsval;
	uint32_t send_bytes;   /* unacknowledged and unsent payload */
	uint32_t unsent_bytes; /* of those, never sent (a FIN not counted) */
	uint32_t recv_bytes;   /* unread payload */
	uint32_t mss;          /* what the client accepts (mss_clamp) */
	uint32_t snd_wnd, rcv_wnd;
	uint32_t min_rtt_us;
	uint32_t rounds; /* reads it took until the dump was stable; 0 after decode */
};
int ms_tcp_summaries(const ms_tcp_batch *b, struct ms_tcp_summary *out);

/*
 * All but the send queue: a socket in repair mode that had one would retransmit
 * by itself after a second. The fds stay in repair mode, emit nothing, and are
 * silent when closed. They must be gated before: packets would reach them.
 * A socket that failed is not usable any more: close it, ask for another.
 */
int ms_tcp_restore(const int *blank_fds, size_t n, ms_tcp_batch *b, int *err);

/*
 * See ACTIVATE above. Both may be called again after a crash in between (with a
 * freshly decoded batch): what is live already is left alone but for bytes of the
 * send queue that were not queued yet. Must be complete before the application
 * gets the sockets.
 */
int ms_tcp_activate_begin(const int *fds, size_t n, ms_tcp_batch *b,
			  const struct ms_flow_note *notes, int *err);
int ms_tcp_activate_finish(const int *fds, size_t n, ms_tcp_batch *b,
			   const struct ms_flow_note *notes, int *err);

#define MS_TCP_PRIME 0
#define MS_TCP_PLAY 1
#define MS_TCP_PACKETS_MAX 8                                     /* of one flow and one `what` */
#define MS_TCP_PACKET_BYTES_MAX (2048 + MS_TCP_PACKETS_MAX * 80) /* of one flow and one `what` */

/*
 * Packets as the client would send them: whole IPv4 or IPv6 packets with their
 * checksums, to be played where the client's packets arrive. Call it between
 * begin and finish: what is needed depends on what begin did.
 *   buf    of n * MS_TCP_PACKET_BYTES_MAX bytes always suffices (else -ENOSPC)
 *   lens   of n * MS_TCP_PACKETS_MAX entries always suffices; lengths of the
 *          packets, which lie in buf one behind the other
 *   *count of packets made
 */
int ms_tcp_client_packets(const ms_tcp_batch *b, const struct ms_flow_note *notes, int what,
			  uint8_t *buf, size_t cap, uint32_t *lens, size_t lens_cap, size_t *count);

/*
 * zlib's crc32(0, data, size), at what the CPU has for it: the agents' checksums of
 * KV blocks. -EOPNOTSUPP where it has nothing; zlib is not slower then.
 */
int ms_tcp_crc32(const void *data, size_t size, uint32_t *crc);

const char *ms_tcp_strerror(int err); /* one sentence that says what to do; err may be negative */
const char *ms_tcp_refusal(int err);  /* the name in the table above; "" when there is none */

#ifdef __cplusplus
}
#endif
#endif /* MIDSTREAM_TCP_H */
