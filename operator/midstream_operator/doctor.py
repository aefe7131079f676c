"""What is wrong with this installation: the agents' findings by node, and what only the operator sees."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from midstream_agent.contract.nodes import next_to

from midstream_operator.context import Context
from midstream_operator.errors import OperatorError
from midstream_operator.floating import FloatingIPs
from midstream_operator.model import Json

_KEPT_S = 5.0  # one report serves everybody who asks meanwhile


def finding(node: str, check: str, severity: str, message: str, remedy: str = "") -> Json:
    return {"node": node, "check": check, "severity": severity, "message": message, "remedy": remedy}


@dataclass(slots=True)
class Doctor:
    ctx: Context
    fips: FloatingIPs
    _last: tuple[float, list[Json]] = field(default=(-_KEPT_S, []))
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def report(self) -> list[Json]:
        async with self._lock:
            if time.monotonic() - self._last[0] > _KEPT_S:
                self._last = time.monotonic(), await self._examine()
            return self._last[1]

    async def _examine(self) -> list[Json]:
        nodes = sorted({a.node for a in self.ctx.view.agent_pods.values()})
        told = await asyncio.gather(*(self._agent(n, next_to(n, nodes)) for n in nodes))
        pools = await asyncio.gather(*(self._pool(p.name) for p in self.ctx.settings.pools))
        return [*self._agents(), *pools, *self._pods(), *self._addresses(), *(f for found in told for f in found)]

    async def _agent(self, node: str, others: list[str]) -> list[Json]:
        try:
            reply = await self.ctx.agents.doctor(node, others)
        except OperatorError as e:
            return [finding(node, "agent", "error", e.message, "look at the log of the agent's pod on that node")]
        return [finding(node, f.check, f.severity, f.message, f.remedy) for f in reply.findings]

    def _agents(self) -> list[Json]:
        """Nodes with serving pods and without an agent: nothing there can move."""
        serving = {p.node for p in self.ctx.view.pods.values() if p.node}
        without = sorted(n for n in serving if self.ctx.view.agent(n) is None)
        remedy = "the DaemonSet's nodeSelector or tolerations do not cover it"
        return [finding(n, "agent", "error", "serving pods, but no agent", remedy) for n in without]

    async def _pool(self, name: str) -> Json:
        pool = self.ctx.settings.pool(name)
        try:
            provider = self.ctx.providers.get(pool.provider)
            if provider is None:
                return finding(
                    "", f"pool {name}", "error", f"no provider {pool.provider}", "correct the chart's values"
                )
            await provider.check(pool)
        except OperatorError as e:
            return finding("", f"pool {name}", "error", e.message, "see docs/errors.md")
        return finding("", f"pool {name}", "ok", f"{pool.provider}, {', '.join(pool.cidrs)}")

    def _pods(self) -> list[Json]:
        """Enabled pods that no floating address leads to: their clients are on addresses that cannot move."""
        held = self.fips.addresses_per_pod()
        bare = sorted(f"{p.namespace}/{p.name}" for p in self.ctx.view.pods.values() if p.running and not held[p.uid])
        total = len(self.ctx.view.pods)
        if not bare:
            return [finding("", "floating ips", "ok", f"all {total} enabled pods have one")]
        text = f"{len(bare)} of {total} enabled pods have none: {', '.join(bare[:5])}"
        return [finding("", "floating ips", "warning", text, "make a FloatingIP that selects them")]

    def _addresses(self) -> list[Json]:
        found = []
        for obj in self.fips.objects.values():
            for condition in (obj.get("status") or {}).get("conditions") or []:
                if condition["type"] == "Ready" and condition["status"] != "True":
                    meta = obj["metadata"]
                    name = f"floatingip {meta['namespace']}/{meta['name']}"
                    text = f"{condition['reason']}: {condition['message']}"
                    found.append(finding("", name, "warning", text, "see docs/errors.md"))
        return found
