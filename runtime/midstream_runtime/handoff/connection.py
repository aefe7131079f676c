"""A client's socket with its send buffer, which can be frozen between two bytes and thawed, here or elsewhere.

asyncio's transports cannot be used for this: their buffer cannot be taken back, and a socket in TCP_REPAIR reads as
an error (recv gives EPERM), on which a transport closes. So this owns the raw socket.

Closing lingers (RFC 9112, 9.6): our FIN is sent behind the last byte, and the descriptor is kept until the client has
finished too. A socket that was closed earlier would be an orphan of the kernel, without a descriptor, and could not
be moved: its last bytes would end in an RST.

    OPEN --close()--> FLUSHING --sent--> LINGERING --client's FIN, or time--> CLOSED
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from midstream_runtime.handoff.app import Handler

READ_BYTES = 64 << 10
LINGER_S = 10.0
"""How long a client may take to close after our FIN; a client that has not acknowledged everything gets longer."""
LINGER_ROUNDS = 30


class Connection:
    """Owns `sock`. Methods are for the event loop's thread."""

    __slots__ = (
        "_closing", "_fin_sent", "_forget", "_frozen", "_linger", "_loop", "_out", "_reading", "_rounds", "_writing",
        "eof", "handler", "id", "sock",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, number: int, forget: Callable[[Connection], None]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.id = number
        self.handler: Handler | None = None
        """None while the connection only lingers, or is not adopted yet."""
        self.eof = False
        """The client has finished sending."""
        self._loop = asyncio.get_running_loop()
        self._forget = forget
        self._out = bytearray()
        self._reading = True
        self._writing = False
        self._frozen = True
        self._closing = False
        self._fin_sent = False
        self._linger: asyncio.TimerHandle | None = None
        self._rounds = 0

    # -- for the server ------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self.sock.fileno() < 0

    @property
    def frozen(self) -> bool:
        """Out of the event loop, for a migration; a server's own timers should rest too."""
        return self._frozen

    @property
    def unsent_bytes(self) -> int:
        """Written, and not yet taken by the kernel."""
        return len(self._out)

    def write(self, data: bytes) -> None:
        """Queue bytes and send what the kernel takes. Nothing happens on a connection that is closing or gone."""
        if self._closing or self.closed:
            return
        self._out += data
        if not self._frozen and not self._writing:
            self._flush()

    def close(self) -> None:
        """Send what is queued, then a FIN, then wait for the client's; the handler hears no more."""
        if self._closing or self.closed:
            return
        self.read_more(True)  # until the client's FIN
        self._closing = True
        self.handler = None
        if not self._frozen:
            self._finish()

    def read_more(self, wanted: bool) -> None:
        """Whether bytes are read now; while not, TCP slows the client down. Not part of the state that travels."""
        if wanted == self._reading or self._closing or self.closed:
            return
        self._reading = wanted
        if self._frozen or self.eof:
            return
        if wanted:
            self._loop.add_reader(self.sock.fileno(), self._on_readable)
        else:
            self._loop.remove_reader(self.sock.fileno())

    def local(self) -> tuple[str, int]:
        return _plain(self.sock.getsockname())

    def remote(self) -> tuple[str, int]:
        return _plain(self.sock.getpeername())

    # -- for the handoff -----------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Out of the event loop: no byte is read or written until `thaw`. What is written meanwhile is queued."""
        self._frozen = True
        if self.closed:
            return
        self._loop.remove_reader(self.sock.fileno())
        self._stop_writing()
        self._cancel_linger()

    def thaw(self) -> None:
        """Into the event loop, for the first time or again."""
        if self.closed:
            return
        self._frozen = False
        if self._reading and not self.eof:
            self._loop.add_reader(self.sock.fileno(), self._on_readable)
        if self._closing:
            self._finish()
        elif self._out:
            self._flush()

    def save(self) -> dict[str, Any]:
        """State of a frozen connection beside what the kernel holds; `unsent` is a count, the bytes are `unsent()`."""
        return {"unsent": len(self._out), "eof": self.eof, "closing": self._closing, "fin": self._fin_sent}

    def unsent(self) -> bytes:
        return bytes(self._out)

    def load(self, state: dict[str, Any], unsent: bytes) -> None:
        self._out[:] = unsent
        self.eof, self._closing, self._fin_sent = bool(state["eof"]), bool(state["closing"]), bool(state["fin"])

    def drop(self) -> None:
        """Close the descriptor and say nothing to anybody: the stream lives elsewhere, or never lived."""
        if self.closed:
            return
        self.freeze()
        self.sock.close()
        self.handler = None  # which knows this connection: a cycle would keep a stream's memory until gc comes by
        self._forget(self)

    # -- the event loop's side -----------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            data = self.sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self._lose(e)
            return
        if data:
            if self.handler is not None:
                self.handler.received(data)
            return
        self.eof = True
        self._loop.remove_reader(self.sock.fileno())
        if self.handler is not None:
            self.handler.eof()
        elif self._fin_sent:  # both have finished, but the client may not have all bytes yet
            self._cancel_linger()
            self._finish()

    def _on_writable(self) -> None:
        self._flush()
        if not self._out and self.handler is not None and not self.closed:
            self.handler.drained()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self.sock.send(self._out)]
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._loop.add_writer(self.sock.fileno(), self._on_writable)
                self._writing = True
            return
        except OSError as e:
            self._lose(e)
            return
        self._stop_writing()
        if self._closing:
            self._finish()

    def _stop_writing(self) -> None:
        if self._writing:
            self._loop.remove_writer(self.sock.fileno())
        self._writing = False

    def _finish(self) -> None:
        if self._out:
            self._flush()
            return
        if not self._fin_sent:
            self._fin_sent = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as e:  # reset meanwhile
                self._lose(e)
                return
        if self.eof and not queued_bytes(self.sock):
            self.drop()
            return
        self._linger = self._loop.call_later(LINGER_S if not self.eof else 0.05, self._linger_over)

    def _linger_over(self) -> None:
        """Give up on a client that does not close, but not on one that has not got all its bytes."""
        self._linger = None
        self._rounds += 1
        done = not queued_bytes(self.sock) or self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        limit_s = LINGER_S * LINGER_ROUNDS
        if done or self._rounds * (0.05 if self.eof else LINGER_S) > limit_s:
            self.drop()
            return
        self._linger = self._loop.call_later(LINGER_S if not self.eof else 0.05, self._linger_over)

    def _cancel_linger(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
        self._linger = None

    def _lose(self, error: OSError) -> None:
        handler, self.handler = self.handler, None
        self.drop()
        if handler is not None:
            handler.lost(error)


def queued_bytes(sock: socket.socket) -> int:
    """Sent or not, what the client has not acknowledged; our FIN counts as one (SIOCOUTQ, tcp_ioctl)."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    return int(count)


def _plain(name: Any) -> tuple[str, int]:
    """Address and port, v4-mapped addresses as IPv4."""
    return str(name[0]).removeprefix("::ffff:"), int(name[1])
