"""pool.sock: how the gateway, in the pod's other container, gets at the pool that lives in vLLM's process.

A unix socket in a volume that both containers mount (an emptyDir at /run/midstream). It hands out the sealed memfd, so
no file of the pool exists anywhere, and answers for its blocks. Frames are the engine socket's
(midstream_runtime.engine. ipc); `id` is echoed. Pins and reservations belong to the connection that asked for them
and end with it.

| kind | asks | answers |
|---|---|---|
| info | | body: JSON {model, context, pool}; the memfd |
| pin | body: hashes, a chain | slots: of the first of these blocks, as many as are here |
| have | body: hashes | slots: of each of these blocks, -1 for one that is not here; pinned |
| unpin | slots | |
| reserve | n | slots |
| free | slots | |
| land | slots; body: (hash, checksum) of each | reserved slots are sealed, and pinned |
| publish | slots, reserved or pinned (-1: did not come); body: ids, u32 | published |
| stats | | body: JSON |
"""

from __future__ import annotations

import array
import contextlib
import logging
import mmap
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.contract.pool import CHECKSUM_BYTES, HASH_BYTES, HEADER_BYTES, PoolLayout
from midstream_runtime.engine import ipc
from midstream_runtime.vllm_connector.store import BlockStore

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
MAP_TIMEOUT_S = 30.0
"""The scheduler's half answers at once; a minute of silence would only hide that it is stuck."""

Reply = tuple[dict[str, Any], bytes]


class PoolServer:
    """Listens until the process ends; a thread of its own, and one for each gateway (there is one)."""

    def __init__(self, store: BlockStore, info: dict[str, Any], path: str) -> None:
        self.store, self.info, self.path = store, info, path
        folder = os.path.dirname(path)
        try:
            os.makedirs(folder, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(path)
            os.chmod(path, 0o660)
        except OSError as error:
            raise Final(
                "pool_socket", f"{path} cannot be listened on ({error.strerror}): mount a shared emptyDir at {folder}"
            ) from error
        self._listener.listen()
        threading.Thread(target=self._accept, name="midstream-pool", daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            session = _Session(self, sock)
            threading.Thread(target=session.run, name="midstream-pool-session", daemon=True).start()


class _Session:
    def __init__(self, server: PoolServer, sock: socket.socket) -> None:
        self._store, self._info, self._sock = server.store, server.info, sock
        self._pins: Counter[int] = Counter()
        self._reserved: set[int] = set()
        self._verbs: dict[str, Callable[[dict[str, Any], bytes], Reply]] = {
            "info": self._on_info, "pin": self._on_pin, "have": self._on_have, "unpin": self._on_unpin,
            "reserve": self._on_reserve, "free": self._on_free, "land": self._on_land, "publish": self._on_publish,
            "stats": self._on_stats,
        }  # fmt: skip

    def run(self) -> None:
        parser = ipc.FrameParser()
        try:
            while data := self._sock.recv(_READ_BYTES):
                for header, body in parser.feed(data):
                    self._answer(header, body)
        except (OSError, MidstreamError) as error:
            log.warning("pool.sock: closing a gateway's connection: %s", error)
        finally:
            self._sock.close()
            self._store.unpin(self._pins.elements())
            self._store.free(sorted(self._reserved))

    def _answer(self, header: dict[str, Any], body: bytes) -> None:
        kind = header["kind"]
        try:
            verb = self._verbs.get(kind)
            if verb is None:
                raise Final("unknown_request", f"the connector does not know {kind!r}: use one release")
            fields, answer = verb(header, body)
        except MidstreamError as error:
            fields, answer = _error(error), b""
        except (KeyError, TypeError, ValueError) as error:
            fields, answer = _error(Final("bad_request", f"{kind}: {type(error).__name__}: {error}")), b""
        frame = ipc.encode({"kind": kind, "id": header.get("id"), **fields}, answer)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._store.pool.fd]))]
        sent = self._sock.sendmsg([frame], rights if kind == "info" else [])
        self._sock.sendall(memoryview(frame)[sent:])

    def _on_info(self, _h: dict[str, Any], _b: bytes) -> Reply:
        return {}, ipc.encode_json(self._info)

    def _on_pin(self, _h: dict[str, Any], body: bytes) -> Reply:
        slots = self._store.pin(_parts(body, HASH_BYTES))
        self._pins.update(slots)
        return {"slots": slots}, b""

    def _on_have(self, _h: dict[str, Any], body: bytes) -> Reply:
        slots = self._store.have(_parts(body, HASH_BYTES))
        self._pins.update(slot for slot in slots if slot >= 0)
        return {"slots": slots}, b""

    def _on_unpin(self, header: dict[str, Any], _b: bytes) -> Reply:
        ours = [int(slot) for slot in header["slots"] if self._pins[int(slot)] > 0]
        self._pins.subtract(ours)
        self._store.unpin(ours)
        return {}, b""

    def _on_reserve(self, header: dict[str, Any], _b: bytes) -> Reply:
        count = int(header["n"])
        if count < 0:
            raise Final("bad_request", f"cannot reserve {count} slots")
        slots = self._store.reserve(count)
        self._reserved.update(slots)
        return {"slots": slots}, b""

    def _on_free(self, header: dict[str, Any], _b: bytes) -> Reply:
        slots = self._reserved.intersection(int(slot) for slot in header["slots"])
        self._reserved -= slots
        self._store.free(sorted(slots))
        return {}, b""

    def _on_land(self, header: dict[str, Any], body: bytes) -> Reply:
        slots = [int(slot) for slot in header["slots"]]
        names = [(part[:HASH_BYTES], part[HASH_BYTES:]) for part in _parts(body, HASH_BYTES + CHECKSUM_BYTES)]
        if len(set(slots)) != len(slots) or not self._reserved.issuperset(slots):
            raise Final("kv_not_reserved", "KV slots were named that this gateway did not reserve")
        # the agent has looked: but perhaps into the pool of a server that was there before this one
        view = self._store.pool.view
        if any(view.actual_checksum(slot) != digest for slot, (_, digest) in zip(slots, names, strict=True)):
            raise Final("kv_checksum", "KV slots do not hold the blocks that were named: recompute")
        self._store.land(slots, names)
        self._reserved.difference_update(slots)
        self._pins.update(slots)
        return {}, b""

    def _on_publish(self, header: dict[str, Any], body: bytes) -> Reply:
        slots = [None if slot < 0 else int(slot) for slot in header["slots"]]
        named = {slot for slot in slots if slot is not None}
        if not all(slot in self._reserved or self._pins[slot] > 0 for slot in named):
            raise Final("kv_not_reserved", "KV slots were named that this gateway did not reserve")
        published = self._store.publish(slots, ids_of(body))
        self._reserved -= named
        return {"published": published}, b""

    def _on_stats(self, _h: dict[str, Any], _b: bytes) -> Reply:
        return {}, ipc.encode_json(self._store.stats())


def map_pool(path: str, layout: PoolLayout) -> torch.Tensor:
    """The pool behind `path` as [slot][layer][key, value][token][kv head][head_dim]; Final when it is another one's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(MAP_TIMEOUT_S)
        try:
            sock.connect(path)
            sock.sendall(ipc.encode({"kind": "info", "id": 0}))
            _, fds, _, _ = socket.recv_fds(sock, _READ_BYTES, 1)
        except OSError as error:
            raise Final("pool_socket", f"the scheduler's KV pool does not answer at {path}: {error}") from error
    fd = fds[0]
    try:
        memory = mmap.mmap(fd, layout.total_bytes, mmap.MAP_SHARED)
        found = PoolLayout.unpack(memory[:HEADER_BYTES], os.fstat(fd).st_size)
    finally:
        os.close(fd)
    if found != layout:
        raise Final("pool_socket", f"the pool at {path} is another server's: give each server a path of its own")
    count, dtype = layout.slots * layout.slot_elements, getattr(torch, layout.dtype)
    data = torch.frombuffer(memory, dtype=dtype, count=count, offset=layout.data_offset)
    return data.view(layout.slots, layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)


def ids_of(body: bytes) -> list[int]:
    """Token ids as little-endian u32; ValueError when the length is none."""
    ids = array.array("I")
    ids.frombytes(body)
    return ids.tolist()


def _parts(body: bytes, size: int) -> list[bytes]:
    if len(body) % size:
        raise Final("bad_request", f"a body of {len(body)} bytes is no list of {size} bytes each")
    return [body[at : at + size] for at in range(0, len(body), size)]


def _error(error: MidstreamError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": error.message, "retryable": isinstance(error, Retryable)}}
