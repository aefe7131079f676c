"""A server that sends each client a line every few milliseconds: `ticker_pod.py PORT PERIOD_MS`.

A line is its number and when it was due, in ns of CLOCK_MONOTONIC, which is one for all namespaces of a machine: the
first line after a move was due when the stream was paused. So a client sees how long it was kept waiting, however
seldom lines come. Uses the handoff library alone: a benchmark of many streams measures the data path and no engine.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import cast

from midstream_runtime.handoff import App, Connection, Handler, Handoff, Movable


class Ticker:
    """One client: the number of its next line, and since when it waits for it while it is on its way."""

    def __init__(self, connection: Connection, period_s: float, number: int = 0, paused_ns: int = 0) -> None:
        self.connection, self.period_s, self.number, self.paused_ns = connection, period_s, number, paused_ns
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        # spread over the period by the connection's number, as clients that came at different times are
        self._next(self.period_s * (self.connection.id % 97) / 97)

    def _next(self, after_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(after_s, self.tick)

    def tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.connection.frozen or self.connection.closed:
            return
        self.connection.write(b"%d %d\n" % (self.number, self.paused_ns or time.monotonic_ns()))
        self.number, self.paused_ns = self.number + 1, 0
        self._next(self.period_s)

    def received(self, data: bytes) -> None: ...

    def eof(self) -> None:
        self.connection.close()

    def drained(self) -> None: ...

    def lost(self, error: OSError | None) -> None: ...

    def movable(self) -> Movable:
        return Movable()

    def save(self) -> bytes:
        self.paused_ns = time.monotonic_ns()
        return b"%d %d" % (self.number, self.paused_ns)


class TickerApp(App):
    kind = "ticker"

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s

    def connected(self, connection: Connection) -> Ticker:
        ticker = Ticker(connection, self.period_s)
        ticker.start()
        return ticker

    def restored(self, connection: Connection, state: bytes) -> Ticker:
        return Ticker(connection, self.period_s, *map(int, state.split()))

    async def resume(self, handlers: Sequence[Handler]) -> None:
        for handler in handlers:
            cast(Ticker, handler).tick()

    async def activate(self, handlers: Sequence[Handler]) -> None:
        await self.resume(handlers)


async def main(port: int, period_ms: float) -> None:
    handoff = Handoff(TickerApp(period_ms / 1000))
    handoff.listen("::", port, path_mtu_bytes=9001)
    print("ready", flush=True)
    await handoff.serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
