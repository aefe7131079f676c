"""A server of lines on the handoff library, for tests that play every part of a client by hand.

    python line_pod.py PORT

    hello NAME   names the connection in the log; answers the line itself
    echo TEXT    answers TEXT
    flood N      N bytes of `pattern(N)`
    bye N        the same, then closes: our FIN follows the last byte
    count        how many connections the server has
    deaf         accepts nobody until an agent settles its accept queue

A client that has finished sending gets `bye NAME` and our FIN. Stdout tells what the server saw: `hello NAME`,
`eof NAME`, `lost NAME ECONNRESET`, `closed NAME`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import sys
import time
from typing import Any

from midstream_runtime.handoff import App, Connection, Handler, Handoff, Movable


def pattern(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def tell(*words: object) -> None:
    print(*words, flush=True)


class DeafHandoff(Handoff):
    """Can leave connections in the kernel's accept queue, as a busy server would."""

    deaf = False

    def accept_all(self) -> int:
        if self.deaf:
            time.sleep(0.001)  # the listener stays readable: do not spin
            return 0
        return super().accept_all()

    async def _on_settle(self, header: dict[str, Any], payload: bytes) -> Any:
        self.deaf = False
        return await super()._on_settle(header, payload)


class LineHandler:
    def __init__(self, app: LineApp, connection: Connection, state: bytes = b'["", ""]') -> None:
        self._app, self._connection = app, connection
        self._name, pending = json.loads(state)
        self._pending = pending.encode("latin1")

    def received(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            verb, _, rest = line.decode().partition(" ")
            getattr(self, f"_on_{verb}")(rest)

    def _on_hello(self, name: str) -> None:
        self._name = name
        tell("hello", name)
        self._connection.write(f"hello {name}\n".encode())

    def _on_echo(self, text: str) -> None:
        self._connection.write(text.encode() + b"\n")

    def _on_flood(self, length: str) -> None:
        self._connection.write(pattern(int(length)))

    def _on_bye(self, length: str) -> None:
        self._connection.write(pattern(int(length)))
        self._connection.close()
        tell("closed", self._name)

    def _on_count(self, _: str) -> None:
        self._connection.write(f"{len(self._app.handoff.connections)}\n".encode())

    def _on_deaf(self, _: str) -> None:
        self._app.handoff.deaf = True
        self._connection.write(b"deaf\n")

    def eof(self) -> None:
        tell("eof", self._name)
        self._connection.write(f"bye {self._name}\n".encode())
        self._connection.close()

    def drained(self) -> None:
        pass

    def lost(self, error: OSError | None) -> None:
        tell("lost", self._name, errno.errorcode.get(error.errno or 0, "?") if error else "?")

    def movable(self) -> Movable:
        return Movable()

    def save(self) -> bytes:
        return json.dumps([self._name, self._pending.decode("latin1")]).encode()


class LineApp(App):
    kind = os.environ.get("POD_KIND", "lines")
    handoff: DeafHandoff

    def model(self) -> dict[str, Any] | None:
        name = os.environ.get("MODEL")
        return {"name": name, "fingerprint": name} if name else None

    def connected(self, connection: Connection) -> Handler:
        return LineHandler(self, connection)

    def restored(self, connection: Connection, state: bytes) -> Handler:
        return LineHandler(self, connection, state)


async def main(port: int) -> None:
    app = LineApp()
    app.handoff = DeafHandoff(app)
    app.handoff.listen("::", port, path_mtu_bytes=int(os.environ.get("PATH_MTU", "9001")))
    serving = asyncio.create_task(app.handoff.serve(), name="serve")
    await asyncio.sleep(0)  # it listens for agents before it first waits
    tell("ready")
    await serving


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
