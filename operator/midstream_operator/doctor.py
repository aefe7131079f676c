"""What is wrong with this installation: the agents' findings by node, and what only the operator sees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from midstream_agent.contract.nodes import next_to

from midstream_operator.context import Context
from midstream_operator.errors import OperatorError
from midstream_operator.floating import FloatingIPs
from midstream_operator.model import Json
from midstream_operator.providers import ec2_permissions
from midstream_operator.providers.ec2 import Ec2Provider
from midstream_operator.providers.ec2_inventory import instance_id
from midstream_operator.providers.ec2_permissions import ALLOWED, DENIED, UNKNOWN, Permission
from midstream_operator.settings import Pool

_KEPT_S = 5.0  # one report serves everybody who asks meanwhile


def finding(node: str, check: str, severity: str, message: str, remedy: str = "") -> Json:
    return {"node": node, "check": check, "severity": severity, "message": message, "remedy": remedy}


def _judged(name: str, found: Sequence[Permission]) -> list[Json]:
    """Each denied action by itself; the others are counted, and those that cannot be asked about are named."""
    remedy = "allow it in the policy of the operator's role: docs/iam.md"
    denied = [p for p in found if p.answer == DENIED]
    told = [finding("", name, "error", f"{p.action} ({p.needed_for}): {p.message}", remedy) for p in denied]
    allowed = sum(p.answer == ALLOWED for p in found)
    open_ = sorted(p.action for p in found if p.answer == UNKNOWN)
    rest = f"; not known before they are used: {', '.join(open_)}" if open_ else ""
    return [*told, finding("", name, "ok", f"{allowed} of {len(found)} actions are allowed{rest}")]


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
        rights = await asyncio.gather(*(self._rights(p) for p in self.ctx.settings.pools if p.provider == "ec2"))
        each = [f for found in (*rights, *told) for f in found]
        return [*self._agents(), *pools, *self._pods(), *self._addresses(), *each]

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

    async def _rights(self, pool: Pool) -> list[Json]:
        """What the operator's IAM role allows, by dry run with the pool's subnet and one of its zone's nodes."""
        provider, name = self.ctx.providers.get("ec2"), f"iam {pool.name}"
        nodes = [n for n in self.ctx.view.nodes.values() if n.provider_id and pool.zone in ("", n.zone)]
        if not isinstance(provider, Ec2Provider) or not nodes:
            return [finding("", name, "warning", "rights on EC2 were not asked: no node of the pool's zone", "")]
        try:
            instance = instance_id(min(nodes, key=lambda n: n.name).provider_id)
            found = await ec2_permissions.examine(provider.calls, provider.inventory, pool.subnet, instance)
        except OperatorError as e:
            return [finding("", name, "error", e.message, "see docs/errors.md")]
        return _judged(name, found)

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
