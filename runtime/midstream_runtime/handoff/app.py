"""What a server implements so that its connections can change nodes.

A connection's own state (unsent bytes, whether the client has finished sending, whether we have) travels by itself.
A server adds what only it knows, as bytes of its choice: `Handler.save` at the source, `App.restored` at the target.
Nothing that these methods do may block: while they run, clients wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from midstream_runtime.contract.errors import Final
from midstream_runtime.handoff.connection import Connection


class Movable(NamedTuple):
    """How a stream stands; what `midstream status` and the planner see."""

    movable: bool = True
    reason: str = ""
    """Why not, as a CamelCase name, when it is not movable."""
    tokens: int = 0
    kv_bytes: int = 0


class KvEntry(NamedTuple):
    """A KV block that goes along: its slot here, the bytes in use of it, and their checksum (contract/pool.py)."""

    slot: int
    length_bytes: int
    digest: bytes
    block_hash: bytes = b""
    """Of a block that is full and named; empty for one that is still being filled."""


@dataclass(slots=True)
class Paused:
    """State of paused streams: one entry a handler, in the order asked; KV blocks are named by their index in `kv`."""

    states: list[bytes]
    kv: list[KvEntry] = field(default_factory=list)


class Handler(Protocol):
    """The server's side of one connection. Called from the event loop, never while the connection is frozen."""

    def received(self, data: bytes) -> None:
        """Bytes of the client."""

    def eof(self) -> None:
        """The client will send no more; it may still read."""

    def drained(self) -> None:
        """The send buffer has become empty; more may be written."""

    def lost(self, error: OSError | None) -> None:
        """The connection is gone (reset, timed out) without our doing: nothing can be written any more."""

    def movable(self) -> Movable: ...

    def save(self) -> bytes:
        """The handler's state between two calls."""


class App:
    """A server. The defaults suit one whose whole state is in its handlers."""

    kind = "server"
    """Which kind of server this is; source and target must agree."""

    def connected(self, connection: Connection) -> Handler:
        """A new client."""
        raise NotImplementedError

    def restored(self, connection: Connection, state: bytes) -> Handler:
        """A client that came from another node; silent until `activate`."""
        raise NotImplementedError

    def model(self) -> dict[str, Any] | None:
        """{name, fingerprint}: equal fingerprints continue each other's answers."""
        return None

    def pool(self) -> tuple[dict[str, Any], int] | None:
        """The KV pool's description ({fingerprint, slots, slot_bytes, data_offset, block_tokens}) and memfd (kept)."""
        return None

    def load(self) -> dict[str, float] | None:
        """{kv_free: share of the KV cache, running, waiting: requests}, for whoever chooses a target; None: not
        known."""
        return None

    async def pause(self, handlers: Sequence[Handler]) -> Paused:
        """Stop at a boundary. What is written meanwhile is part of the connections' state."""
        return Paused([h.save() for h in handlers])

    async def resume(self, handlers: Sequence[Handler]) -> None:
        """Go on after `pause`."""

    async def release(self, handlers: Sequence[Handler]) -> None:
        """These streams live elsewhere now: forget them. `lost` is not called."""

    async def reserve(self, slots: int) -> list[int]:
        """KV slots for the agent to write. Retryable("pool_full") when there are not enough."""
        raise Final("no_pool", f"a {self.kind} pod has no KV pool")

    async def free(self, slots: Sequence[int]) -> None:
        """Reserved slots that nobody took."""

    async def kv(self, handlers: Sequence[Handler], known: Sequence[int], limit: int) -> list[list[KvEntry]]:
        """Full blocks of streams that go on, from number `known[i]` on and at most `limit` in all. They stay as they
        are until `unhold`, once for each time that they were named."""
        return [[] for _ in handlers]

    async def have(self, hashes: Sequence[bytes]) -> list[int | None]:
        """Where this pod has these blocks already; those stay until `unhold`."""
        return [None] * len(hashes)

    async def land(self, blocks: Sequence[KvEntry]) -> None:
        """The agent has filled these reserved slots, and verified them: from now on they can be found, and stay until
        `unhold`."""
        raise Final("no_pool", f"a {self.kind} pod has no KV pool")

    async def unhold(self, slots: Sequence[int]) -> None:
        """The agent needs these no more; a slot that is named twice was held twice."""

    async def stage(
        self, connections: Sequence[Connection], states: Sequence[bytes], slots: Sequence[int | None]
    ) -> Sequence[Handler]:
        """Handlers for streams that arrive. `slots[i]` holds block i of `Paused.kv`; None: it did not come."""
        return [self.restored(c, s) for c, s in zip(connections, states, strict=True)]

    async def activate(self, handlers: Sequence[Handler]) -> None:
        """The staged streams are live."""
