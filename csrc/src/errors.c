// SPDX-License-Identifier: Apache-2.0
/* errors.c - errno values in the words of this library. */
#include <string.h>

#include "internal.h"

static const struct {
	int err;
	const char *name, *text;
} names[] = {
    {EBADF, "BadFd", "not an open file descriptor: pass the socket's own"},
    {ENOTSOCK, "NotASocket", "not a socket: pass TCP sockets only"},
    {EPROTOTYPE, "NotTcp", "not a TCP socket over IPv4 or IPv6: pass TCP sockets only"},
    {EPROTONOSUPPORT, "Mptcp",
     "an MPTCP socket: make the listener with IPPROTO_TCP (Go: GODEBUG=multipathtcp=0)"},
    {EOPNOTSUPP, "Listener", "a listening socket: pass the connections it accepted"},
    {ENOTCONN, "NotConnected", "the connection is not there (any more): leave it out"},
    {EINPROGRESS, "Handshake",
     "the handshake (or TCP Fast Open) is not complete: try again once it is"},
    {ESOCKTNOSUPPORT, "UnknownUlp",
     "an upper layer protocol such as kTLS holds state: let this stream finish"},
    {EBUSY, "UrgentData", "urgent data is pending: read it first, or let this stream finish"},
    {EAGAIN, "Unstable",
     "the queues did not stop changing: shut the gate and stop the application, then try again"},
    {EPERM, "NoCapability", "CAP_NET_ADMIN in the socket's user namespace is needed"},
    {ENOMEM, "NoMemory", "out of memory: try again with fewer sockets"},
    {EAFNOSUPPORT, "BlankFamily", "the blank socket is of the other family: ask ms_tcp_families()"},
    {EISCONN, "BlankInUse", "the blank socket is connected: pass a fresh one"},
    {EADDRINUSE, "FlowExists", "the local address is in use here in a way that cannot be shared"},
    {EADDRNOTAVAIL, "FlowExists",
     "a socket with these addresses and ports exists here, or the local address cannot be bound"},
    {ENETUNREACH, "NoRoute",
     "no route to the client from the blank's network namespace: add address and route first"},
    {ENOBUFS, "QueueTooLarge",
     "the queue does not fit: raise net.core.wmem_max and rmem_max, or run with CAP_NET_ADMIN in "
     "the first user namespace"},
    {ENODEV, "NoSuchDevice", "the socket is bound to a network device that does not exist here"},
    {ENOENT, "NoCongestionControl",
     "its congestion control is not available here: load tcp_<name>"},
    {EBADMSG, "Damaged", "the checkpoint is truncated or its checksum is wrong: send it again"},
    {EPROTO, "Malformed", "the checkpoint contradicts itself: it was not written by this library"},
    {ENOPROTOOPT, "NewerFormat",
     "the checkpoint has a version or field that this reader does not know: upgrade the reader "
     "first"},
    {ESTALE, "NotRestored", "the socket is in no state for this call: begin comes before finish"},
    {ENOSPC, "", "the buffer is too small"},
    {EINVAL, "", "arguments do not fit: as many fds as the batch has flows, none of which failed"},
};

const char *ms_tcp_strerror(int err)
{
	err = err < 0 ? -err : err;
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (names[i].err == err)
			return names[i].text;
	return err ? strerror(err) : "success";
}

const char *ms_tcp_refusal(int err)
{
	err = err < 0 ? -err : err;
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (names[i].err == err)
			return names[i].name;
	return "";
}
