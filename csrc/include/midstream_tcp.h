/* SPDX-License-Identifier: Apache-2.0 */
/* midstream_tcp.h - checkpoint and restore of TCP sockets. DRAFT of the contract. */
#ifndef MIDSTREAM_TCP_H
#define MIDSTREAM_TCP_H
#include <stddef.h>
#include <stdint.h>
#include "midstream_maps.h" /* struct ms_flow_key, ms_flow_ctl, ms_flow_note: shared with BPF */

typedef struct ms_tcp_batch ms_tcp_batch; /* opaque: n checkpoints, in the order of the fds */

/* Per-socket results: err[i] is 0 or -errno or -MS_E*; the call itself returns the number of failed ones or -errno. */
int ms_tcp_probe(const int *fds, size_t n, int *err);                              /* refusals by name, touches nothing */
int ms_tcp_flow_keys(const int *fds, size_t n, struct ms_flow_key *keys, int *err); /* getsockname/getpeername */
int ms_tcp_checkpoint(const int *fds, size_t n, ms_tcp_batch **out, int *err);      /* leaves sockets in repair = frozen */
int ms_tcp_thaw(const int *fds, const ms_tcp_batch *b, const struct ms_flow_note *notes, int *err);
int ms_tcp_encode(const ms_tcp_batch *b, uint8_t *buf, size_t cap, size_t *len);    /* buf NULL: asks for the size */
int ms_tcp_decode(const uint8_t *buf, size_t len, ms_tcp_batch **out);
void ms_tcp_batch_free(ms_tcp_batch *b);
size_t ms_tcp_batch_len(const ms_tcp_batch *b);
int ms_tcp_flow_ctl(const ms_tcp_batch *b, uint32_t state, struct ms_flow_key *keys, struct ms_flow_ctl *ctls);
int ms_tcp_restore(const int *blank_fds, const ms_tcp_batch *b, int *err);          /* all but the send queue; stays in repair */
int ms_tcp_activate_begin(const int *fds, const ms_tcp_batch *b, const struct ms_flow_note *notes, int *err);
int ms_tcp_activate_finish(const int *fds, const ms_tcp_batch *b, const struct ms_flow_note *notes, int *err);
/* L3 packets as the client would send them (PRIME: pure ACK; PLAY: the kept newest segment / data), into one buffer with lengths */
int ms_tcp_client_packets(const ms_tcp_batch *b, const struct ms_flow_note *notes, int what, uint8_t *buf, size_t cap, uint32_t *lens);
const char *ms_tcp_strerror(int err);
#endif
