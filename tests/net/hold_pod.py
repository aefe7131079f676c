"""A serving pod for tests that decide themselves what is in flight: a line protocol on the handoff library.

    python hold_pod.py 8000

The client sends JSON lines:

    {"do": "echo", "text": ...}     the line comes back
    {"do": "get", "bytes": N}       N bytes of `stream` come back; a further get goes on where the last one ended
    {"do": "put", "bytes": N}       N raw bytes follow the line; their CRC comes back as 8 hex digits
    {"do": "sink", "bytes": N}      the same without looking at them: as fast as a server can be
    {"do": "token"}                 whenever the connection has become live after a pause, one b"T" is written
    {"do": "tokens", "bytes": N}    N bytes of `stream` every few milliseconds, as an LLM's answer comes, until "stop"
    {"do": "keep"}                  when the client has finished sending, the server goes on until it has been moved
    {"do": "stay"}                  this stream does not move: it ends where it is
    {"do": "stop"}                  no more of them, and the server's FIN
    {"do": "close", "bytes": N}     N bytes of `stream`, then the server's FIN

When the client has finished sending, what it asked for is written to the end, then the server finishes too, at once or
(keep) after the next move.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import zlib
from collections.abc import Sequence
from typing import Any

from midstream_runtime.handoff import App, Connection, Handler, Handoff, Movable

PERIOD = 65_521  # prime: no power-of-two shift maps the stream onto itself
CHUNK = 1 << 18
CHUNKS_A_TURN = 16
TOKEN_EVERY_S = 0.003
_ONCE = random.Random(11).randbytes(PERIOD)
_MANY = _ONCE * (2 + CHUNK // PERIOD)


def stream(offset: int, length: int) -> bytes:
    """`length` bytes of an endless stream, from `offset` on."""
    start = offset % PERIOD
    if length <= CHUNK:
        return _MANY[start : start + length]
    return (_ONCE * (2 + length // PERIOD))[start : start + length]


class Player:
    """One client. All that must travel is in the attributes that `save` names."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.buffer = b""
        self.put_left = 0
        self.crc = 0
        self.sink = False
        self.get_left = 0
        self.offset = 0
        self.token = False
        self.token_bytes = 0
        self.keep = False
        self.stays = False
        self.closing = False

    SAVED = ("put_left", "crc", "sink", "get_left", "offset", "token", "token_bytes", "keep", "closing")

    def save(self) -> bytes:
        state = {name: getattr(self, name) for name in self.SAVED}
        return json.dumps({**state, "buffer": self.buffer.decode("latin1")}).encode()

    def load(self, state: bytes) -> None:
        fields = json.loads(state)
        self.buffer = fields.pop("buffer").encode("latin1")
        for name, value in fields.items():
            setattr(self, name, value)

    def movable(self) -> Movable:
        return Movable(not self.stays, "WantsToStay" if self.stays else "")

    def received(self, data: bytes) -> None:
        self.buffer += data
        while self.buffer and self._step():
            pass

    def _step(self) -> bool:
        """Take a line, or what follows a put, from the front of the buffer; False: more must come first."""
        if self.put_left:
            taken, self.buffer = self.buffer[: self.put_left], self.buffer[self.put_left :]
            if not self.sink:
                self.crc = zlib.crc32(taken, self.crc)
            self.put_left -= len(taken)
            if not self.put_left:
                self.connection.write(b"%08x" % self.crc)
            return True
        line, end, rest = self.buffer.partition(b"\n")
        if end:
            self.buffer = rest
            self._obey(json.loads(line))
        return bool(end)

    def _obey(self, line: dict[str, Any]) -> None:
        match line["do"]:
            case "echo":
                self.connection.write(json.dumps(line).encode() + b"\n")
            case "token":
                self.token = True
            case "keep":
                self.keep = True
            case "stay":
                self.stays = True
            case "tokens":
                self.token_bytes = int(line["bytes"])
                self.tick()
            case "stop":
                self.token_bytes = 0
                self.connection.close()
            case "put" | "sink":
                self.put_left, self.crc, self.sink = int(line["bytes"]), 0, line["do"] == "sink"
            case "get":
                self.get_left += int(line["bytes"])
                self.pump()
            case "close":
                self.get_left += int(line["bytes"])
                self.closing = True
                self.pump()

    def tick(self) -> None:
        """A token, and the next one later; `live` goes on with them where they stopped."""
        if not self.token_bytes or self.connection.frozen or self.connection.closed:
            return
        self.connection.write(stream(self.offset, self.token_bytes))
        self.offset += self.token_bytes
        asyncio.get_running_loop().call_later(TOKEN_EVERY_S, self.tick)

    def pump(self) -> None:
        """Write until the kernel takes no more; a turn of the event loop at a time."""
        connection = self.connection
        for _ in range(CHUNKS_A_TURN):
            if connection.frozen or connection.closed or connection.unsent_bytes:
                return
            if not self.get_left:
                break
            piece = stream(self.offset, min(self.get_left, CHUNK))
            self.offset += len(piece)
            self.get_left -= len(piece)
            connection.write(piece)
        if self.get_left:
            asyncio.get_running_loop().call_soon(self.pump)
        elif self.closing:
            connection.close()

    def drained(self) -> None:
        self.pump()

    def eof(self) -> None:
        self.closing = not self.keep
        self.pump()

    def lost(self, error: OSError | None) -> None:
        print(f"lost {error!r}", flush=True)

    def live(self) -> None:
        if self.token:
            self.connection.write(b"T")
        self.closing = self.closing or self.connection.eof
        self.tick()
        self.pump()


class HoldApp(App):
    kind = "hold-test"

    def connected(self, connection: Connection) -> Player:
        return Player(connection)

    def restored(self, connection: Connection, state: bytes) -> Player:
        player = Player(connection)
        player.load(state)
        return player

    async def resume(self, handlers: Sequence[Handler]) -> None:
        await self.activate(handlers)

    async def activate(self, handlers: Sequence[Handler]) -> None:
        for handler in handlers:
            assert isinstance(handler, Player)
            handler.live()


async def main(port: int) -> None:
    handoff = Handoff(HoldApp())
    handoff.listen("::", port, path_mtu_bytes=int(sys.argv[2]) if len(sys.argv) > 2 else 9001)
    print("ready", flush=True)
    await handoff.serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
