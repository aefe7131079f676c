/* SPDX-License-Identifier: Apache-2.0 */
/* internal.h - what the files of the library share. Nothing in here is exported. */
#ifndef MS_TCP_INTERNAL_H
#define MS_TCP_INTERNAL_H

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <linux/sockios.h>
#include <linux/tcp.h>

#include "midstream_tcp.h"

/* include/net/tcp_states.h; <netinet/tcp.h> has them too, but cannot live beside <linux/tcp.h>. */
enum {
	ST_ESTABLISHED = 1,
	ST_SYN_SENT,
	ST_SYN_RECV,
	ST_FIN_WAIT1,
	ST_FIN_WAIT2,
	ST_TIME_WAIT,
	ST_CLOSE,
	ST_CLOSE_WAIT,
	ST_LAST_ACK,
	ST_LISTEN,
	ST_CLOSING,
};

#define MS_CC_MAX 16  /* TCP_CA_NAME_MAX */
#define MS_DEV_MAX 16 /* IFNAMSIZ */

/* When an option is set on its way back; see options.c. */
enum opt_phase { PHASE_RESTORE, PHASE_BEGIN, PHASE_LIVE, PHASE_FINISH, PHASE_SPECIAL };

/* Positions in opts[]; the numbers of the format are in options.c. */
enum opt_index {
	OPT_SNDBUF,
	OPT_RCVBUF,
	OPT_BUF_LOCK,
	OPT_REUSEADDR,
	OPT_REUSEPORT,
	OPT_KEEPALIVE,
	OPT_OOBINLINE,
	OPT_LINGER_ON,
	OPT_LINGER_S,
	OPT_MARK,
	OPT_RCVLOWAT,
	OPT_MAX_PACING_RATE,
	OPT_RCVTIMEO_US,
	OPT_SNDTIMEO_US,
	OPT_IP_TOS,
	OPT_IP_TTL,
	OPT_V6ONLY,
	OPT_TCLASS,
	OPT_HOPS,
	OPT_PRIORITY,
	OPT_NODELAY,
	OPT_CORK,
	OPT_KEEPIDLE_S,
	OPT_KEEPINTVL_S,
	OPT_KEEPCNT,
	OPT_USER_TIMEOUT_MS,
	OPT_NOTSENT_LOWAT,
	OPT_LINGER2_S,
	OPT_WINDOW_CLAMP,
	OPT_INQ,
	OPT_COUNT
};

/* What an activation has done to a socket so far; never leaves the process. */
enum phase { PH_NONE, PH_IN_PLACE, PH_SEATED, PH_LIVE_ALREADY, PH_DEAD };

struct flow {
	int error; /* of the checkpoint: the entry is skipped */
	struct ms_flow_key key;
	uint8_t family; /* of the socket: 4, 6 */
	uint8_t state;
	uint8_t tcpi_options;
	uint8_t snd_wscale, rcv_wscale;
	uint32_t write_seq, outq, nsd; /* as the ioctls say: a FIN counts */
	uint32_t rcv_nxt;
	uint32_t tsval, mss, advmss, min_rtt_us;
	struct tcp_repair_window win;
	uint64_t opts[OPT_COUNT];
	uint32_t opts_present; /* bit per enum opt_index */
	char congestion[MS_CC_MAX];
	char device[MS_DEV_MAX];
	const uint8_t *send;
	const uint8_t *recv;
	uint32_t send_len, recv_len;

	/* of this process only */
	uint32_t rounds;
	bool disturbed; /* the unsent split of the socket itself is not the dumped one */
	enum phase phase;
	bool seat_known; /* this process seated the socket */
	uint32_t seat;   /* where the socket's snd_una is */
	uint32_t una;    /* what the client has acknowledged, notes included */
	uint32_t queued; /* end of what is in the socket's send queue */
	uint32_t snd_wnd;
	uint32_t pad; /* bytes queued before una; see activate.c */
};

_Static_assert(OPT_COUNT <= 32, "opts_present has 32 bits");

struct chunk {
	struct chunk *next;
	size_t size, used;
	uint8_t bytes[];
};

struct ms_tcp_batch {
	size_t n;
	struct chunk *chunks;
	struct flow flows[];
};

/* batch.c: memory that lives as long as the batch */
struct ms_tcp_batch *ms_batch_new(size_t n);
/* Valid until the next reserve. chunk: what to take from the heap where no room is left, if more
 * than size. */
uint8_t *ms_arena_reserve(struct ms_tcp_batch *b, size_t size, size_t chunk);
void ms_arena_commit(struct ms_tcp_batch *b, size_t size);

static inline int ms_before(uint32_t a, uint32_t b)
{
	return (int32_t)(a - b) < 0;
}

static inline bool ms_fin_in(const struct flow *f)
{
	return f->state == ST_CLOSE_WAIT || f->state == ST_LAST_ACK || f->state == ST_CLOSING;
}

static inline bool ms_fin_out(const struct flow *f)
{
	return f->state == ST_FIN_WAIT1 || f->state == ST_FIN_WAIT2 || f->state == ST_LAST_ACK ||
	       f->state == ST_CLOSING;
}

/* Sequence numbers of a checkpoint. */
static inline uint32_t ms_una(const struct flow *f)
{
	return f->write_seq - f->outq;
}
static inline uint32_t ms_data_end(const struct flow *f) /* of the payload to send */
{
	return f->write_seq - ms_fin_out(f);
}
static inline uint32_t ms_data_start(const struct flow *f)
{
	return ms_data_end(f) - f->send_len;
}
static inline uint32_t ms_sent_end(const struct flow *f) /* of the payload that was ever sent */
{
	uint32_t snd_nxt = f->write_seq - f->nsd;

	return ms_before(ms_data_end(f), snd_nxt) ? ms_data_end(f) : snd_nxt;
}
static inline uint32_t
ms_rcv_end(const struct flow *f) /* of the payload received, where a FIN would be */
{
	return f->rcv_nxt - ms_fin_in(f);
}
/*
 * Where snd_una must be for a client that has acknowledged up to una. A FIN that
 * it has acknowledged is queued again as sent, for PRIME to acknowledge.
 */
static inline uint32_t ms_seat_of(const struct flow *f, uint32_t una)
{
	return una == f->write_seq ? ms_data_end(f) : una;
}
static inline bool ms_mapped(const struct flow *f)
{
	return !memcmp(f->key.remote, "\0\0\0\0\0\0\0\0\0\0\xff\xff", 12);
}

/* A flow of which no socket was touched yet. */
static inline void ms_flow_reset(struct flow *f)
{
	f->phase = PH_NONE;
	f->seat_known = false;
	f->una = ms_una(f);
	f->seat = f->queued = ms_seat_of(f, f->una);
	f->snd_wnd = f->win.snd_wnd;
}

/* options.c */
struct opt_def {
	uint16_t id; /* in the format; never reused */
	uint8_t kind;
	uint8_t phase;
	bool v4, v6; /* read for IPv4 traffic, for AF_INET6 sockets with IPv6 traffic */
	bool always; /* the kernel's default depends on a sysctl */
	int level, name;
	uint64_t fresh; /* the value of a fresh socket */
};
extern const struct opt_def ms_opts[OPT_COUNT];
int ms_opts_read(int fd, struct flow *f);
int ms_opt_set(int fd, const struct flow *f, int index);
int ms_opts_apply(int fd, const struct flow *f, enum opt_phase phase);
int ms_setint(int fd, int level, int name, int value);
int ms_getint(int fd, int level, int name, int *value);

/* probe.c */
int ms_check_socket(int fd, int *domain);
int ms_check_pending(int fd);
int ms_state_refusal(int state);
int ms_flow_key_of(int fd, struct ms_flow_key *key);

/* restore.c */
int ms_seat(int fd, struct flow *f, uint32_t una, uint32_t snd_wnd);
int ms_disconnect(int fd);
int ms_set_window(int fd, const struct flow *f, uint32_t snd_wnd);
int ms_queue_send(int fd, const uint8_t **data, size_t *len);
uint32_t ms_sndbuf_wanted(const struct flow *f);
int ms_reset_sndbuf(int fd, const struct flow *f);

/* note.c: what a hold's note means for this checkpoint */
struct note_view {
	bool segment, timestamps, fin, rst;
	uint32_t ack, window, tsval, tsecr; /* window: as on the wire */
	const uint8_t *data;                /* starts at ms_rcv_end() */
	uint32_t data_len;
};
struct note_view ms_note_view(const struct flow *f, const struct ms_flow_note *note);

/* checksum.c: XXH64, seed 0 */
uint64_t ms_xxh64(const uint8_t *p, size_t len);

#endif
