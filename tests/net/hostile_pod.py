"""A line pod that breaks the handoff in one way, which a client chooses: `misdeed NAME`; `misdeed none` ends it.

    python hostile_pod.py PORT

Everything that the misdeed does not name is done by the handoff library, so that each refusal is for the misdeed
alone. Prints `did NAME` when it commits it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from line_pod import DeafHandoff, LineApp, LineHandler, tell
from midstream_runtime.contract import handoff as wire
from midstream_runtime.handoff import Connection, Handler
from midstream_runtime.handoff import answering as library

F_ADD_SEALS, SEAL_SHRINK = 1033, 0x0002
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
POOL = {"fingerprint": "x", "slots": 4, "slot_bytes": 4096, "data_offset": 4096, "block_tokens": 16}
POOL_BYTES = 5 * 4096


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("pool", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def linked_file() -> int:
    """A pool that is a symlink in the pod's root, to a file of somebody else's."""
    with contextlib.suppress(FileExistsError):
        os.symlink("/etc/passwd", "/run/midstream/pool")
    return os.open("/run/midstream/pool", os.O_RDONLY)


def foreign_socket() -> int:
    """A TCP socket of another network namespace, made by a child in one of its own."""
    ours, theirs = socket.socketpair()
    libc = ctypes.CDLL(None, use_errno=True)
    if os.fork() == 0:
        try:
            if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            with socket.socket(socket.AF_INET6) as sock:
                socket.send_fds(theirs, [b"."], [sock.fileno()])
        finally:
            os._exit(0)
    theirs.close()
    os.wait()
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    return fds[0]


def unix_socket() -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def listener() -> int:
    sock = socket.socket(socket.AF_INET6)
    sock.listen()
    return sock.detach()


POOLS: dict[str, Callable[[], int]] = {
    "pool_unsealed": lambda: memfd(POOL_BYTES, 0),
    "pool_truncated": lambda: memfd(POOL_BYTES - 1, SEAL_SHRINK),
    "pool_symlink": linked_file,
    "pool_directory": lambda: os.open("/run", os.O_RDONLY),
    "pool_socket": unix_socket,
    "pool_malformed": lambda: memfd(POOL_BYTES, SEAL_SHRINK),
}
FDS: dict[str, Callable[[], int]] = {
    "fd_netns": foreign_socket,
    "fd_file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "fd_udp": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).detach(),
    "fd_unix": unix_socket,
    "fd_listener": listener,
}


misdeed = "none"


def commit(name: str) -> bool:
    if misdeed == name:
        tell("did", name)
    return misdeed == name


class Hostile(DeafHandoff):
    async def _on_hello(self, header: dict[str, Any], payload: bytes) -> Any:
        reply = await super()._on_hello(header, payload)
        if commit("old_version"):
            reply.fields.update(version=0, min_version=0)
        if commit("version_malformed"):
            reply.fields["version"] = "one"
        return reply

    async def _on_streams(self, header: dict[str, Any], payload: bytes) -> Any:
        reply = await super()._on_streams(header, payload)
        if commit("streams_malformed"):
            reply.fields["streams"] = [{"id": "x"}]
        return reply

    async def _on_pause(self, header: dict[str, Any], payload: bytes) -> Any:
        return self._with_other_fds(await super()._on_pause(header, payload))

    async def _on_blank(self, header: dict[str, Any], payload: bytes) -> Any:
        return self._with_other_fds(await super()._on_blank(header, payload))

    def _with_other_fds(self, reply: Any) -> Any:
        if misdeed in FDS and commit(misdeed):
            reply.fds = [FDS[misdeed](), *reply.fds[1:]]
        if commit("fds_one_more"):
            reply.fds = [*reply.fds, os.dup(reply.fds[0])]
        if commit("fds_one_less"):
            reply.fds = reply.fds[1:]
        if commit("fds_twice"):
            reply.fds = [reply.fds[0], *reply.fds[:-1]]
        return reply


class HostileHandler(LineHandler):
    def _on_misdeed(self, name: str) -> None:
        global misdeed
        misdeed = name
        self._connection.write(f"misdeed {name}\n".encode())


class HostileApp(LineApp):
    def connected(self, connection: Connection) -> Handler:
        return HostileHandler(self, connection)

    def restored(self, connection: Connection, state: bytes) -> Handler:
        return HostileHandler(self, connection, state)

    def pool(self) -> tuple[dict[str, Any], int] | None:
        if misdeed not in POOLS or not commit(misdeed):
            return None
        return {**POOL, "slots": -1} if misdeed == "pool_malformed" else POOL, POOLS[misdeed]()


def frame(header: dict[str, Any], payload: bytes = b"", **fields: Any) -> bytes:
    return wire.encode({"kind": header["kind"], "id": header["id"], **fields}, payload)


FRAMES: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "frame_large_header": lambda _: struct.pack("<II", wire.MAX_HEADER_BYTES + 1, 0),
    "frame_large_payload": lambda _: struct.pack("<II", 2, 0xFFFFFFFF),
    "frame_no_json": lambda _: struct.pack("<II", 4, 0) + b"\xff\xfe{{",
    "frame_no_object": lambda _: struct.pack("<II", 2, 0) + b"[]",
    "frame_other_id": lambda h: frame({**h, "id": -1}),
    "frame_fds_claimed": lambda h: frame(h, fds=5),
    "frame_fds_negative": lambda h: frame(h, fds=-1),
}


async def send(sock: socket.socket, header: dict[str, Any], reply: Any) -> None:
    """Instead of the library's: frames that it would never send."""
    loop = asyncio.get_running_loop()
    if not misdeed.startswith("frame"):
        return await library_send(sock, header, reply)
    commit(misdeed)
    if misdeed in FRAMES:
        await loop.sock_sendall(sock, FRAMES[misdeed](header))
    if misdeed == "frames_for_ever":
        body = frame(header, bytes(32 << 20), more=True)
        while True:
            await loop.sock_sendall(sock, body)
    if misdeed == "frames_of_fds":
        body = frame(header, fds=250, more=True)
        while True:
            await library.send_first(sock, body, [sock.fileno()] * 250)
    await asyncio.sleep(3600)  # frame_never: and the agent waits


library_send = library.send


async def main(port: int) -> None:
    library.send = send
    app = HostileApp()
    app.handoff = Hostile(app)
    app.handoff.listen("::", port, path_mtu_bytes=int(os.environ["PATH_MTU"]))
    serving = asyncio.create_task(app.handoff.serve(), name="serve")
    await asyncio.sleep(0)
    tell("ready")
    await serving


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
