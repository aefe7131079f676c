// SPDX-License-Identifier: Apache-2.0
/*
 * options.c - the socket options that an application can see, as one table.
 *
 * A blank socket is fresh, so what has the value of a fresh socket need not be
 * set: restore costs what the application changed. Options whose default hangs
 * on a sysctl are always set, as the target's sysctls may differ.
 */
#include <stdlib.h>
#include <sys/time.h>
#include <netinet/ip.h>

#include "internal.h"

enum opt_kind { K_INT, K_U64, K_TIMEVAL, K_LINGER_ON, K_LINGER_S };

#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72
#endif

#define SOL SOL_SOCKET
#define TCP IPPROTO_TCP
#define IP IPPROTO_IP
#define IP6 IPPROTO_IPV6
#define BOTH true, true

/* id, kind, phase, v4, v6, always, level, name, fresh. PRIORITY comes after TOS, which changes it.
 */
const struct opt_def ms_opts[OPT_COUNT] = {
    [OPT_SNDBUF] = {1, K_INT, PHASE_SPECIAL, BOTH, true, SOL, SO_SNDBUF, 0},
    [OPT_RCVBUF] = {2, K_INT, PHASE_SPECIAL, BOTH, true, SOL, SO_RCVBUF, 0},
    [OPT_BUF_LOCK] = {3, K_INT, PHASE_SPECIAL, BOTH, true, SOL, SO_BUF_LOCK, 0},
    [OPT_REUSEADDR] = {4, K_INT, PHASE_LIVE, BOTH, false, SOL, SO_REUSEADDR, 0},
    [OPT_REUSEPORT] = {5, K_INT, PHASE_LIVE, BOTH, false, SOL, SO_REUSEPORT, 0},
    [OPT_KEEPALIVE] = {6, K_INT, PHASE_BEGIN, BOTH, false, SOL, SO_KEEPALIVE, 0},
    [OPT_OOBINLINE] = {7, K_INT, PHASE_RESTORE, BOTH, false, SOL, SO_OOBINLINE, 0},
    [OPT_LINGER_ON] = {8, K_LINGER_ON, PHASE_RESTORE, BOTH, false, SOL, SO_LINGER, 0},
    [OPT_LINGER_S] = {9, K_LINGER_S, PHASE_SPECIAL, BOTH, false, SOL, SO_LINGER, 0},
    [OPT_MARK] = {10, K_INT, PHASE_RESTORE, BOTH, false, SOL, SO_MARK, 0},
    [OPT_RCVLOWAT] = {11, K_INT, PHASE_RESTORE, BOTH, false, SOL, SO_RCVLOWAT, 1},
    [OPT_MAX_PACING_RATE] = {12, K_U64, PHASE_RESTORE, BOTH, false, SOL, SO_MAX_PACING_RATE,
			     UINT64_MAX},
    [OPT_RCVTIMEO_US] = {13, K_TIMEVAL, PHASE_RESTORE, BOTH, false, SOL, SO_RCVTIMEO, 0},
    [OPT_SNDTIMEO_US] = {14, K_TIMEVAL, PHASE_RESTORE, BOTH, false, SOL, SO_SNDTIMEO, 0},
    [OPT_IP_TOS] = {15, K_INT, PHASE_RESTORE, true, false, false, IP, IP_TOS, 0},
    [OPT_IP_TTL] = {16, K_INT, PHASE_RESTORE, true, false, true, IP, IP_TTL, 64},
    [OPT_V6ONLY] = {17, K_INT, PHASE_RESTORE, false, true, true, IP6, IPV6_V6ONLY, 0},
    [OPT_TCLASS] = {18, K_INT, PHASE_RESTORE, false, true, false, IP6, IPV6_TCLASS, 0},
    [OPT_HOPS] = {19, K_INT, PHASE_RESTORE, false, true, true, IP6, IPV6_UNICAST_HOPS, 64},
    [OPT_PRIORITY] = {20, K_INT, PHASE_RESTORE, BOTH, false, SOL, SO_PRIORITY, 0},
    [OPT_NODELAY] = {21, K_INT, PHASE_RESTORE, BOTH, false, TCP, TCP_NODELAY, 0},
    [OPT_CORK] = {22, K_INT, PHASE_FINISH, BOTH, false, TCP, TCP_CORK, 0},
    [OPT_KEEPIDLE_S] = {23, K_INT, PHASE_RESTORE, BOTH, true, TCP, TCP_KEEPIDLE, 7200},
    [OPT_KEEPINTVL_S] = {24, K_INT, PHASE_RESTORE, BOTH, true, TCP, TCP_KEEPINTVL, 75},
    [OPT_KEEPCNT] = {25, K_INT, PHASE_RESTORE, BOTH, true, TCP, TCP_KEEPCNT, 9},
    [OPT_USER_TIMEOUT_MS] = {26, K_INT, PHASE_RESTORE, BOTH, false, TCP, TCP_USER_TIMEOUT, 0},
    [OPT_NOTSENT_LOWAT] = {27, K_INT, PHASE_RESTORE, BOTH, false, TCP, TCP_NOTSENT_LOWAT, 0},
    [OPT_LINGER2_S] = {28, K_INT, PHASE_RESTORE, BOTH, true, TCP, TCP_LINGER2, 60},
    [OPT_WINDOW_CLAMP] = {29, K_INT, PHASE_SPECIAL, BOTH, true, TCP, TCP_WINDOW_CLAMP, 0},
    [OPT_INQ] = {30, K_INT, PHASE_RESTORE, BOTH, false, TCP, TCP_INQ, 0},
};

int ms_setint(int fd, int level, int name, int value)
{
	return setsockopt(fd, level, name, &value, sizeof(value)) ? -errno : 0;
}

int ms_getint(int fd, int level, int name, int *value)
{
	socklen_t len = sizeof(*value);

	return getsockopt(fd, level, name, value, &len) ? -errno : 0;
}

static int read_one(int fd, const struct opt_def *def, uint64_t *value)
{
	union {
		int i;
		uint64_t u64;
		struct timeval tv;
	} v = {0};
	socklen_t len = def->kind == K_INT   ? sizeof(v.i)
			: def->kind == K_U64 ? sizeof(v.u64)
					     : sizeof(v.tv);

	if (getsockopt(fd, def->level, def->name, &v, &len))
		return -errno;
	if (def->kind == K_INT)
		*value = (uint64_t)(int64_t)v.i;
	else if (def->kind == K_U64)
		*value = len == sizeof(v.u64)          ? v.u64
			 : (uint32_t)v.i == UINT32_MAX ? UINT64_MAX
						       : (uint32_t)v.i;
	else
		*value = (uint64_t)v.tv.tv_sec * 1000000 + (uint64_t)v.tv.tv_usec;
	return 0;
}

static int read_linger(int fd, struct flow *f)
{
	struct linger linger;
	socklen_t len = sizeof(linger);

	if (getsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, &len))
		return -errno;
	f->opts[OPT_LINGER_ON] = (uint64_t)(int64_t)linger.l_onoff;
	f->opts[OPT_LINGER_S] = (uint64_t)(int64_t)linger.l_linger;
	f->opts_present |= 1u << OPT_LINGER_ON | 1u << OPT_LINGER_S;
	return 0;
}

static int read_string(int fd, int level, int name, char *buf, socklen_t size)
{
	socklen_t len = size;

	if (getsockopt(fd, level, name, buf, &len))
		return -errno;
	memset(buf + len, 0, size - len);
	buf[size - 1] = 0;
	return 0;
}

int ms_opts_read(int fd, struct flow *f)
{
	bool v4 = f->family == 4 || ms_mapped(f), v6 = f->family == 6;
	int err;

	f->opts_present = 0;
	for (int i = 0; i < OPT_COUNT; i++) {
		const struct opt_def *def = &ms_opts[i];

		if (!(v4 && def->v4) && !(v6 && def->v6))
			continue;
		if (def->kind == K_LINGER_ON)
			err = read_linger(fd, f);
		else if (def->kind == K_LINGER_S)
			continue;
		else
			err = read_one(fd, def, &f->opts[i]);
		if (err == -ENOPROTOOPT) /* an older kernel: nobody can have set it */
			continue;
		if (err)
			return err;
		f->opts_present |= 1u << i;
	}
	err = read_string(fd, IPPROTO_TCP, TCP_CONGESTION, f->congestion, MS_CC_MAX);
	if (err)
		return err;
	return read_string(fd, SOL_SOCKET, SO_BINDTODEVICE, f->device, MS_DEV_MAX);
}

int ms_opt_set(int fd, const struct flow *f, int index)
{
	const struct opt_def *def = &ms_opts[index];
	uint64_t value = f->opts[index];

	switch (def->kind) {
	case K_INT:
		return ms_setint(fd, def->level, def->name, (int)value);
	case K_U64:
		return setsockopt(fd, def->level, def->name, &value, sizeof(value)) ? -errno : 0;
	case K_TIMEVAL: {
		struct timeval tv = {(time_t)(value / 1000000), (suseconds_t)(value % 1000000)};

		return setsockopt(fd, def->level, def->name, &tv, sizeof(tv)) ? -errno : 0;
	}
	default: {
		struct linger linger = {(int)f->opts[OPT_LINGER_ON], (int)f->opts[OPT_LINGER_S]};

		return setsockopt(fd, def->level, def->name, &linger, sizeof(linger)) ? -errno : 0;
	}
	}
}

/* Sets those of a phase that a fresh socket does not have already. */
int ms_opts_apply(int fd, const struct flow *f, enum opt_phase phase)
{
	for (int i = 0; i < OPT_COUNT; i++) {
		const struct opt_def *def = &ms_opts[i];
		int err;

		if (def->phase != phase || !(f->opts_present & 1u << i))
			continue;
		if (!def->always && f->opts[i] == def->fresh)
			continue;
		err = ms_opt_set(fd, f, i);
		if (err)
			return err;
	}
	return 0;
}
