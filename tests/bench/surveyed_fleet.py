"""The fleet of tests/unit/spot with what a job's plan asks in the product: its source's and its target's agents, each
by its own channel (`planning.for_job`), before anything is planned."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from fleet import SETTINGS, Fleet
from midstream_operator import planning
from midstream_operator.agents import Agents
from midstream_operator.context import Context
from midstream_operator.handling import Create
from midstream_operator.plan_model import Switchover
from midstream_operator.providers.ec2 import Ec2Provider
from midstream_operator.settings import Settings, TlsFiles
from midstream_operator.view import Agent, Pod, View
from midstream_testbed.certs import OPERATOR, Authority
from survey_agents import SUFFIX

assert SETTINGS.margin_s  # a job's deadline has it off already


@contextlib.contextmanager
def survey_agents(folder: Path) -> Iterator[tuple[TlsFiles, int]]:
    """The operator's TLS files, and the port of all agents."""
    authority = Authority(folder)
    authority.issue("agents", also=[f"*{SUFFIX}"])
    cert, key = authority.issue(OPERATOR)
    argv = [sys.executable, str(Path(__file__).with_name("survey_agents.py")), str(folder)]
    env = {"PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield TlsFiles(authority.ca, cert, key), int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@dataclass
class SurveyedFleet(Fleet):
    tls: TlsFiles = field(default_factory=TlsFiles)
    port: int = 0
    silent: int = 0  # plans without figures
    agents: Agents = field(init=False)
    ctx: Context = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        view = View()
        for node in self.nodes:
            view.put_agent(node, Agent(node + SUFFIX, f"127.0.0.1:{self.port}", True, f"agent-{node}"))
        settings = Settings(tls=self.tls)
        self.agents = Agents(settings, view)
        self.ctx = cast(Context, SimpleNamespace(settings=settings, agents=self.agents, providers={}))

    async def ready(self) -> None:
        """Channels are open in the product long before: each carries its node's notices."""
        room = asyncio.Semaphore(50)

        async def one(node: str) -> None:
            async with room:
                await planning.ask(self.ctx, [_pod("target", node)])

        await asyncio.gather(*(one(node) for node in self.nodes))

    async def done(self) -> None:
        await self.agents.close()

    def _plan(self, node: str, job: Create, provider: Ec2Provider) -> None:
        self.moves.add(asyncio.create_task(self._planned(node, job, provider), name=f"job of {node}"))

    async def _planned(self, node: str, job: Create, provider: Ec2Provider) -> None:
        self.ctx.providers = {"ec2": provider}
        (best, *_) = self._roomy()
        self.free[best.pod] -= 1
        source, target = _pod("pod", node), _pod("target", best.node)
        made = await planning.for_job(self.ctx, source, target, job.deadline, Switchover.STEER, True, 1)
        self.silent += made.words.startswith("no figures")
        self.note_planned(node)
        await self._move(node, best.node, provider)


def _pod(kind: str, node: str) -> Pod:
    return Pod("default", f"{kind}-{node}", f"uid-{node}", node + SUFFIX, {}, True, None, False, "llm", "Running")
