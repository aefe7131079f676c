"""The byte server: what tests/net/bytes_client.py talks to, on the handoff library, so that it can change nodes.

    python bytes_pod.py 8000 PATH_MTU

A client says in one JSON line what it will send and wants to get. The pod checks each byte that comes, sends the
bytes that were asked for, and when both are done its verdict and a FIN. It reads and writes with random pauses, so
that a migration finds queues in every state: unread bytes here, unsent bytes here and in the kernel, or nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from bytes_client import PAUSE_SHARE, pattern, piece
from midstream_runtime.handoff import App, Connection, Handler, Handoff, Movable, Paused


@dataclass
class State:
    """All that moves with a stream beside what its connection holds."""

    head: str = ""  # of the client's line, as long as it is not complete
    seed: int = -1
    up: int = 0
    down: int = 0
    read_pause_s: float = 0.0
    write_pause_s: float = 0.0
    chunk: int = 1000
    received: int = 0
    written: int = 0
    verdict: str = "OK"


class Stream:
    """One client."""

    def __init__(self, connection: Connection, state: State) -> None:
        self.connection = connection
        self.state = state
        self._random = random.Random(f"{state.seed} {state.received} {state.written}")
        self._patterns = _patterns(state.seed)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # -- called by the library

    def received(self, data: bytes) -> None:
        if self.state.seed < 0:
            self._read_line(data)
        else:
            self._check(data)

    def eof(self) -> None:
        self.rest()
        self.connection.close()

    def drained(self) -> None:
        self._write()

    def lost(self, error: OSError | None) -> None:
        self.rest()

    def movable(self) -> Movable:
        return Movable()

    def save(self) -> bytes:
        return json.dumps(asdict(self.state)).encode()

    # -- called by the app

    def rest(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers = {}

    def go_on(self) -> None:
        self.connection.read_more(True)
        if self.state.seed >= 0:
            self._write()

    # -- the protocol

    def _read_line(self, data: bytes) -> None:
        head, end, rest = (self.state.head.encode("latin1") + data).partition(b"\n")
        if not end:
            self.state.head = head.decode("latin1")
            return
        self.state = State(**json.loads(head))
        self._patterns = _patterns(self.state.seed)
        self._check(rest)
        self._write()

    def _check(self, data: bytes) -> None:
        state, at = self.state, 0
        while at < len(data):
            wanted = piece(self._patterns[0], state.received + at, len(data) - at)
            if data[at : at + len(wanted)] != wanted and state.verdict == "OK":
                state.verdict = f"byte {state.received + at} of {state.up} differs"
            at += len(wanted)
        state.received += len(data)
        if state.received > state.up:
            state.verdict = f"{state.received} bytes came of {state.up}"
        if state.received >= state.up:
            self._end()
        elif self._pauses(state.read_pause_s):
            self.connection.read_more(False)
            self._later("read", state.read_pause_s, lambda: self.connection.read_more(True))

    def _write(self) -> None:
        """A piece at a time, until the kernel takes no more or a pause is due."""
        state = self.state
        while state.written < state.down:
            if self.connection.unsent_bytes or self.connection.closed or "write" in self._timers:
                return
            data = piece(self._patterns[1], state.written, min(state.chunk, state.down - state.written))
            state.written += len(data)
            self.connection.write(data)
            if self._pauses(state.write_pause_s):
                self._later("write", state.write_pause_s, self._write)
        self._end()

    def _end(self) -> None:
        if self.state.received >= self.state.up and self.state.written >= self.state.down:
            self.connection.write(self.state.verdict.encode())
            self.rest()
            self.connection.close()

    def _pauses(self, pause_s: float) -> bool:
        return pause_s > 0 and self._random.random() < PAUSE_SHARE

    def _later(self, what: str, pause_s: float, call: Callable[[], None]) -> None:
        def fire() -> None:
            del self._timers[what]
            call()

        loop = asyncio.get_running_loop()
        self._timers[what] = loop.call_later(self._random.uniform(0, pause_s), fire)


def _patterns(seed: int) -> tuple[bytes, bytes]:
    """Of the client's bytes and of ours; built when the seed is known."""
    return (pattern(seed), pattern(seed + 1)) if seed >= 0 else (b"", b"")


class Bytes(App):
    kind = "bytes"

    def connected(self, connection: Connection) -> Stream:
        return Stream(connection, State())

    def restored(self, connection: Connection, state: bytes) -> Stream:
        return Stream(connection, State(**json.loads(state)))

    async def pause(self, handlers: Sequence[Handler]) -> Paused:
        for stream in handlers:
            assert isinstance(stream, Stream)
            stream.rest()
        return await super().pause(handlers)

    async def resume(self, handlers: Sequence[Handler]) -> None:
        _go_on(handlers)

    async def activate(self, handlers: Sequence[Handler]) -> None:
        _go_on(handlers)


def _go_on(handlers: Sequence[Handler]) -> None:
    for stream in handlers:
        assert isinstance(stream, Stream)
        if not stream.connection.closed:
            stream.go_on()


async def main(port: int, path_mtu_bytes: int) -> None:
    handoff = Handoff(Bytes())
    handoff.listen("::", port, path_mtu_bytes=path_mtu_bytes)
    print("ready", flush=True)
    await handoff.serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
