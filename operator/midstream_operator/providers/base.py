"""What the FloatingIP controller asks of a network.

A provider makes the network deliver an address to a node. It knows nothing of pods' insides: plumbing the address
into the pod is the agent's part, and the controller's to ask for. All methods are idempotent, may be called again
after a restart of the operator, never block the event loop, and raise errors.Retryable or errors.Final.

    assign    ask the network to deliver the addresses here; returns once it said yes, which may be before it does
    confirm   True once it does, by everything that this provider can ask
    release   the addresses lead nowhere any more; what is gone already is no error
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from midstream_operator.settings import Pool


@dataclass(frozen=True, slots=True)
class Place:
    """A pod on a node: where an address shall lead."""

    node: str
    provider_id: str  # Node.spec.providerID, e.g. aws:///eu-west-1a/i-0123; empty where there is no cloud
    zone: str  # label topology.kubernetes.io/zone
    namespace: str
    pod: str
    pod_uid: str


class AddressProvider(Protocol):
    """One way to move an address. `name` is FloatingIP.spec.provider."""

    name: str
    announces: bool  # the agent tells the network when it attaches an address

    async def check(self, pool: Pool) -> None:
        """At the start: that this pool can be served at all (rights, reservation, conflicts)."""
        ...

    async def assign(self, addresses: Sequence[str], place: Place, epoch: int) -> None:
        """All of one place in one call: a cloud's rate limits count calls."""
        ...

    async def confirm(self, addresses: Sequence[str], place: Place, *, proved: bool | None = None) -> bool:
        """Whether the network leads there. `proved`: the agents have seen packets take the path both ways; False: they
        should have, and have not."""
        ...

    def why_not(self, addresses: Sequence[str]) -> str:
        """What the last `confirm` missed, for a person; empty: nothing that would help."""
        ...

    async def release(self, addresses: Sequence[str], place: Place, epoch: int) -> None: ...


class NodeWitness(Protocol):
    """Who can prove that a silent node is gone for good. Silence is no proof, a deleted Node object neither."""

    async def gone(self, provider_id: str) -> str:
        """The evidence, e.g. "ec2:terminated"; empty while there is none."""
        ...
