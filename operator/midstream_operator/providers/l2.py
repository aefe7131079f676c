"""Addresses on a plain network: whoever answers ARP and neighbour solicitations has them.

The agents do the announcing (gratuitous ARP, unsolicited NA) when an address is attached to a pod, and when a job
moves it. So there is nobody to ask beforehand; what is left to confirm is that the node's agent routes the address
to a pod of its own. The path itself was proved by the agents' probe during the migration.
"""

from __future__ import annotations

from collections.abc import Sequence

from midstream_operator.agents import Agents
from midstream_operator.providers.base import Place
from midstream_operator.settings import Pool


class L2Provider:
    name = "l2"
    announces = True

    def __init__(self, agents: Agents) -> None:
        self._agents = agents

    async def check(self, pool: Pool) -> None:
        """Nothing to ask: the pool's addresses have to be free on the network, which its owner said."""

    async def assign(self, addresses: Sequence[str], place: Place, epoch: int) -> None:
        """The agent announces them as soon as they are attached."""

    def why_not(self, addresses: Sequence[str]) -> str:
        return ""

    async def confirm(self, addresses: Sequence[str], place: Place, *, proved: bool | None = None) -> bool:
        reply = await self._agents.describe(place.node)
        return set(addresses) <= set(reply.floating_addresses)

    async def release(self, addresses: Sequence[str], place: Place, epoch: int) -> None:
        """Detached by the agent, they answer no more."""
