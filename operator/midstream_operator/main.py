"""`python -m midstream_operator.main --config FILE`: one replica of the operator.

What runs, each as a named task; when one of them ends, the process does, and the kubelet starts it anew:

    watch ...       pods, nodes, agents (watch.py)          both replicas
    kopf            MigrationJobs, FloatingIPs (handlers)   both
    http            probes, metrics, doctor                 both
    events          posts Events                            both
    certificates    renews our own, signs the agents' while we lead; only where we keep the authority
    leader          waits for the Lease, then: jobs, floating ips, notice sources
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import kopf
import uvloop
import yaml
from aiohttp import web

from midstream_operator import certificates, handlers, http, logs, planning, webhook
from midstream_operator.agents import Agents
from midstream_operator.authority import Pair
from midstream_operator.context import Context
from midstream_operator.doctor import Doctor
from midstream_operator.errors import Final, OperatorError
from midstream_operator.events import Recorder
from midstream_operator.floating import FloatingIPs
from midstream_operator.interruptions import Interruptions
from midstream_operator.jobs import Jobs
from midstream_operator.kube import Kube, connect, ours
from midstream_operator.lease import Lease
from midstream_operator.metrics import Metrics
from midstream_operator.model import FLOATING_IPS, JOBS
from midstream_operator.notices.agents import AgentSource
from midstream_operator.notices.base import NoticeSource
from midstream_operator.notices.eviction import EvictionSource
from midstream_operator.notices.instances import Instances
from midstream_operator.notices.lifecycle import LifecycleActions
from midstream_operator.notices.nodes import NodeSource
from midstream_operator.notices.sqs import SqsSource
from midstream_operator.providers.base import Place
from midstream_operator.providers.ec2 import Ec2Provider
from midstream_operator.providers.l2 import L2Provider
from midstream_operator.respond import Responder
from midstream_operator.settings import Settings
from midstream_operator.view import View
from midstream_operator.watch import Watcher, watchers

log = logging.getLogger(__name__)
PAGE = "500"
AGENTS_LOOKED_AT_S = 1.0  # a new node's metadata is listened to within this time


def parse(argv: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(prog="midstream-operator", description="Midstream's operator")
    parser.add_argument("--config", type=Path, required=True, help="YAML: see operator/midstream_operator/settings.py")
    parser.add_argument("--identity", default=os.environ.get("POD_NAME") or socket.gethostname())
    parser.add_argument("--http-port", type=int, help="overrides the configuration's")
    args = parser.parse_args(argv)
    try:
        data = yaml.safe_load(args.config.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as e:
        raise Final("bad_config", f"cannot read {args.config}: {e}") from e
    settings = replace(Settings.parse(data), identity=f"{args.identity}_{os.urandom(4).hex()}")
    return replace(settings, http_port=args.http_port) if args.http_port is not None else settings


class Operator:
    """One replica: its parts, and how they start and end."""

    def __init__(self, settings: Settings, kube: Kube, lease_kube: Kube, authority: Pair | None = None) -> None:
        view = View()
        agents = Agents(settings, view)
        metrics = Metrics()
        self._ec2 = ec2_of(settings, agents)
        self._authority = authority  # None: certificates are somebody else's
        self.ctx = Context(
            settings,
            kube,
            view,
            agents,
            Lease(lease_kube, settings),
            Recorder(kube, settings.identity),
            metrics,
            {"l2": L2Provider(agents), **({"ec2": self._ec2} if self._ec2 else {})},
            self._ec2,
        )
        self.fips = FloatingIPs(self.ctx)
        self.jobs = Jobs(self.ctx, self.fips)
        self.watchers: list[Watcher] = watchers(settings, view)

    def ready(self) -> bool:
        return all(w.synced.is_set() for w in self.watchers)

    async def run(self) -> None:
        """Until a signal, or until a part of it ends."""
        settings, kube, timeouts = self.ctx.settings, self.ctx.kube, self.ctx.settings.timeouts
        hook = await self._webhook()
        report = Doctor(self.ctx, self.fips).report
        runner = await http.serve(settings.http_port, self.ctx.metrics, self.ready, report, self.plan)
        watch = kopf.operator(
            registry=handlers.registry(self.jobs, self.fips),
            settings=handlers.settings(timeouts),
            identity=cast("Any", settings.identity),  # or kopf asks for the user's name: a container's may have none
            standalone=True,
            clusterwide=True,
        )
        parts: dict[str, Awaitable[Any]] = {
            **{f"watch {w.name}": w.run(kube, timeouts.retry_s, timeouts.retry_max_s) for w in self.watchers},
            "kopf": watch,
            "events": self.ctx.events.run(),
            "leader": self._leader(),
        }
        if self._authority is not None:
            parts["certificates"] = certificates.Signer(self.ctx, self._authority).run()
        tasks = [asyncio.create_task(_named(work), name=name) for name, work in parts.items()]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                log.info("%s ended: so does this replica", task.get_name())
                task.result()
        finally:
            await self._stop(tasks)
            await runner.cleanup()
            if hook is not None:
                await hook.cleanup()

    async def plan(self, node: str, seconds: float) -> str:
        return await planning.for_node(self.ctx, self.jobs.node_facts(node), seconds)

    async def _webhook(self) -> web.AppRunner | None:
        if not self.ctx.settings.webhook.port:
            return None
        if self._authority is None:
            raise Final("bad_config", "webhook.port: needs certificates: operator, whose authority signs its own")
        await webhook.trust(self.ctx.kube, self.ctx.settings, self._authority)
        return await webhook.serve(self.ctx.settings)

    async def _stop(self, tasks: list[asyncio.Task[Any]]) -> None:
        led = self.ctx.lease.held
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if led:
            await self.ctx.lease.release()
        await self.ctx.agents.close()
        if self._ec2 is not None:
            await self._ec2.close()

    async def _leader(self) -> None:
        for watcher in self.watchers:
            await watcher.synced.wait()
        await self.ctx.lease.run(self._lead)

    async def _lead(self) -> None:
        """First everything that there is, so that no address is given out twice; then all loops until one ends."""
        self.ctx.metrics.leader.set(1)
        try:
            await self._load(FLOATING_IPS, self.fips.seen)
            await self._load(JOBS, self.jobs.seen)
            self._above_all_epochs()
            settings = self.ctx.settings
            notices = Interruptions(self.ctx, self.jobs, Responder(self.ctx, self.jobs), settings.handling)
            notices.lifecycle = LifecycleActions(settings.aws.sqs, notices.is_off)
            async with asyncio.TaskGroup() as group:
                group.create_task(self.jobs.run(), name="jobs")
                group.create_task(self.fips.run(), name="floating ips")
                group.create_task(notices.run(), name="interruptions")
                group.create_task(notices.lifecycle.run(), name="lifecycle actions")
                for source in self._sources():
                    group.create_task(source.run(notices.handle), name=f"notices {source.name}")
        finally:
            self.ctx.metrics.leader.set(0)

    def _above_all_epochs(self) -> None:
        """What agents have been told is in the statuses, too."""
        told = [*self.fips.objects.values(), *self.jobs.open.values()]
        if self.ctx.lease.epochs is not None:
            self.ctx.lease.epochs.raise_above(max((o.get("status", {}).get("epoch", 0) for o in told), default=0))

    def _sources(self) -> list[NoticeSource]:
        """Evictions and taints come from the watches that are open anyway; a queue only where there is one."""
        settings, view = self.ctx.settings, self.ctx.view
        found: list[NoticeSource] = [
            EvictionSource(view, settings.timeouts.eviction_margin_s, settings.timeouts.retry_s),
            NodeSource(view, settings.timeouts.retry_s),
            self._agent_source(),
        ]
        if settings.aws.sqs.queue_url:
            found.append(SqsSource(settings.aws.sqs, Instances(view.nodes).node_of))
        return found

    def _agent_source(self) -> AgentSource:
        timeouts = self.ctx.settings.timeouts
        return AgentSource(
            self.ctx.view, self.ctx.agents.notices, timeouts.retry_s, timeouts.retry_max_s, AGENTS_LOOKED_AT_S
        )

    async def _load(self, plural: str, seen: Callable[[dict[str, Any]], None]) -> None:
        token = ""
        while True:
            page = await self.ctx.kube.request("GET", ours(plural), query=[("limit", PAGE), ("continue", token)])
            for item in page["items"]:
                seen(item)
            token = page["metadata"].get("continue", "")
            if not token:
                return


def ec2_of(settings: Settings, agents: Agents) -> Ec2Provider | None:
    """Only where a pool needs it: it wants AWS credentials."""

    async def imds(addresses: Sequence[str], place: Place) -> bool | None:
        return await agents.sees(place.node, addresses)

    if not any(pool.provider == "ec2" for pool in settings.pools):
        return None
    return Ec2Provider(settings.aws.ec2, settings.pools, imds=imds)


async def _named(work: Awaitable[Any]) -> Any:
    return await work


async def run(settings: Settings) -> None:
    kube, lease_kube = await connect(), await connect()
    try:
        authority = await certificates.prepare(kube, settings) if settings.certificates == "operator" else None
        await Operator(settings, kube, lease_kube, authority).run()
    finally:
        await kube.close()
        await lease_kube.close()


def main(argv: Sequence[str] | None = None) -> int:
    logs.setup()
    try:
        uvloop.run(run(parse(argv)))
    except OperatorError as e:
        print(f"midstream-operator: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
