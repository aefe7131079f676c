// SPDX-License-Identifier: Apache-2.0
/* probe.c - which sockets can be moved; the others are refused by name. */
#include "internal.h"

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

int ms_state_refusal(int state)
{
	switch (state) {
	case ST_ESTABLISHED:
	case ST_FIN_WAIT1:
	case ST_FIN_WAIT2:
	case ST_CLOSE_WAIT:
	case ST_LAST_ACK:
	case ST_CLOSING:
		return 0;
	case ST_LISTEN:
		return -EOPNOTSUPP;
	case ST_SYN_SENT:
	case ST_SYN_RECV: /* with an fd: a TCP Fast Open child */
		return -EINPROGRESS;
	default:
		return -ENOTCONN;
	}
}

/* What never changes in a socket's life. *domain: AF_INET or AF_INET6. */
int ms_check_socket(int fd, int *domain)
{
	int protocol, err;

	err = ms_getint(fd, SOL_SOCKET, SO_PROTOCOL, &protocol);
	if (err)
		return err;
	if (protocol == IPPROTO_MPTCP)
		return -EPROTONOSUPPORT;
	err = ms_getint(fd, SOL_SOCKET, SO_DOMAIN, domain);
	if (err)
		return err;
	if (protocol != IPPROTO_TCP || (*domain != AF_INET && *domain != AF_INET6))
		return -EPROTOTYPE;
	return 0;
}

/*
 * What would be lost in silence: an upper layer protocol (kTLS keys...), and
 * urgent data. SIOCINQ and a peek end at an urgent byte, so that all behind it
 * would vanish (measured: SIOCINQ 3, rcv_nxt 7 further on).
 */
int ms_check_pending(int fd)
{
	char ulp[16], byte;
	socklen_t len = sizeof(ulp);

	if (getsockopt(fd, IPPROTO_TCP, TCP_ULP, ulp, &len) == 0 && len > 0)
		return -ESOCKTNOSUPPORT;
	if (recv(fd, &byte, 1, MSG_OOB | MSG_PEEK | MSG_DONTWAIT) >= 0 || errno == EAGAIN)
		return -EBUSY;
	return 0;
}

static int probe_one(int fd)
{
	struct tcp_info info;
	socklen_t len = sizeof(info);
	int domain, err;

	err = ms_check_socket(fd, &domain);
	if (err)
		return err;
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len))
		return -errno;
	err = ms_state_refusal(info.tcpi_state);
	return err ? err : ms_check_pending(fd);
}

int ms_tcp_probe(const int *fds, size_t n, int *err)
{
	int failed = 0;

	for (size_t i = 0; i < n; i++) {
		err[i] = probe_one(fds[i]);
		failed += !!err[i];
	}
	return failed;
}

/* Fills one end of a key; v4-mapped for IPv4. */
static void key_end(const struct sockaddr_storage *ss, uint8_t *addr, __be16 *port)
{
	if (ss->ss_family == AF_INET6) {
		const struct sockaddr_in6 *sin6 = (const struct sockaddr_in6 *)ss;

		memcpy(addr, &sin6->sin6_addr, 16);
		*port = sin6->sin6_port;
	} else {
		const struct sockaddr_in *sin = (const struct sockaddr_in *)ss;

		memset(addr, 0, 10);
		memset(addr + 10, 0xff, 2);
		memcpy(addr + 12, &sin->sin_addr, 4);
		*port = sin->sin_port;
	}
}

int ms_flow_key_of(int fd, struct ms_flow_key *key)
{
	struct sockaddr_storage local, remote;
	socklen_t local_len = sizeof(local), remote_len = sizeof(remote);

	memset(key, 0, sizeof(*key));
	if (getsockname(fd, (struct sockaddr *)&local, &local_len) ||
	    getpeername(fd, (struct sockaddr *)&remote, &remote_len))
		return -errno;
	if (local.ss_family != AF_INET && local.ss_family != AF_INET6)
		return -EPROTOTYPE;
	key_end(&local, key->local, &key->local_port);
	key_end(&remote, key->remote, &key->remote_port);
	return 0;
}

int ms_tcp_flow_keys(const int *fds, size_t n, struct ms_flow_key *keys, int *err)
{
	int failed = 0;

	for (size_t i = 0; i < n; i++) {
		err[i] = ms_flow_key_of(fds[i], &keys[i]);
		failed += !!err[i];
	}
	return failed;
}
