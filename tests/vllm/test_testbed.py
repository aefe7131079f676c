"""End to end on the testbed: a stock vLLM server and a gateway in a pod on each host, real agents, curl streams; moved
by a MigrationJob of a real control plane and the real operator, or by the command line.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from midstream_testbed.fleet import GATEWAY_PORT, Fleet
from midstream_testbed.machine import Host, Pod
from midstream_testbed.namespace import Process
from midstream_testbed.operated import Json, Operated, wait_until
from midstream_testbed.vpc import Vpc
from town import ADDRESS, PORT, Town
from vllm_servers import NAME, environment, serve_argv, transfer_config

T = TypeVar("T")
POOL = "/run/midstream/pool.sock"
"""In the pod's own /run, which its processes share as containers share a volume."""
SERVER_PORT = 8001
BLOCK_TOKENS = 128
"""The agent reserves four blocks a stream for what is decoded between its listing and the pause: with a model as
small as this, hundreds of tokens."""
TRIES = 3
BEGUN = 200
"""Tokens of an answer, at least, before its move: some blocks are full then, and are copied while it goes on."""
HELD_MS = 3000
"""Both answers have begun by then, and have most of their time before them."""
START_S = 300.0
PROMPT_TOKENS = 100
TOKENS = 5000  # many seconds: two busy servers leave agents little of two cores, and a move takes its time
URL = f"http://{ADDRESS}:{PORT}/v1/completions"


class VllmTown(Town):
    """Pods with a vLLM server beside the gateway."""

    def serve_vllm(self, model: Path, *, connector: bool) -> None:
        for host in self.hosts:
            self.pods.append(self.start_vllm(model, host, connector=connector))
        for pod in self.pods:
            self.fleet.wait_ready(pod.name, START_S)
        self.fleet.attach(self.pods[0], ADDRESS)

    def start_vllm(self, model: Path, host: Host, uid: str = "", *, connector: bool) -> Pod:
        """Both containers of a pod; returns at once."""
        pod = host.add_pod(f"vllm-{host.name}", uid=uid)
        options = ("--block-size", str(BLOCK_TOKENS), "--max-model-len", "8192")
        server = serve_argv(model, SERVER_PORT, transfer_config(POOL) if connector else None, *options)
        env = environment(VLLM_HOST_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        # two servers spin on both cores here: agents get their share, as their requests give it to them on a node
        pod.popen(["nice", "-n", "15", *server], env=env, name="vllm")
        argv = [
            sys.executable, "-m", "midstream_runtime.serve", "--listen", f"[::]:{GATEWAY_PORT}",
            "--path-mtu", str(self.vpc.mtu), "--engine", "vllm", "--engine-url", f"http://127.0.0.1:{SERVER_PORT}",
            "--engine-pool", POOL if connector else "",
        ]  # fmt: skip
        return self.fleet.run_pod(pod, argv, "vllm")

    def hold_back(self, delay_ms: int) -> Callable[[], bool]:
        """The next job waits so long in the source's agent; says whether it is there."""
        agent = self.fleet.agents[self.pods[0].host.name]
        seen = len(agent.fired())
        agent.arm(f"source.CONNECT.do.before=delay:{delay_ms}")
        return lambda: len(agent.fired()) > seen

    def hop_under(self, begin: Callable[[], T]) -> T:
        """A migration that begins right after `begin`: the command starts slowly beside two busy servers, so it is up
        and its job held back in the agent before the first token is asked for."""
        there = self.hold_back(1000)
        argv = self.fleet.cli_argv("migrate", self.pods[0].name, "--to", self.pods[1].host.name)
        migrate = self.fleet.operator.popen(argv, env=self.fleet.env(), name="migrate")
        while not there():
            assert migrate.poll() is None, migrate.output()
            time.sleep(0.005)
        begun = begin()
        for _ in range(2):
            if migrate.wait(60) == 0:
                break
            # refused before anything was frozen, since the servers left the gateway no time: that may be asked again
            assert "handoff_timeout" in migrate.output(), migrate.output()
            migrate = self.fleet.operator.popen(argv, env=self.fleet.env(), name="migrate")
        assert migrate.wait(60) == 0, migrate.output()
        self.pods.reverse()
        return begun

    def metric(self, pod: Pod, name: str) -> float:
        """Of the vLLM server in the pod."""
        done = pod.run(["curl", "-sS", f"http://127.0.0.1:{SERVER_PORT}/metrics"], check=True)
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", done.stdout, re.M)
        assert found, f"no metric {name}"
        return sum(float(value) for value in found)

    def hits(self, pod: Pod) -> tuple[float, float]:
        names = ("vllm:external_prefix_cache_queries_total", "vllm:external_prefix_cache_hits_total")
        return self.metric(pod, names[0]), self.metric(pod, names[1])


class OperatedTown(VllmTown):
    """Hosts are nodes, pods are Pods, the address is a FloatingIP, and who moves streams is the operator."""

    def __init__(self, cluster: Operated) -> None:
        self.cluster, self.fleet, self.vpc = cluster, cluster.fleet, cluster.vpc
        self.hosts = [cluster.add_node(name, "--moved-linger-s", "1") for name in ("node-a", "node-b")]
        self.client = self.vpc.client("client")
        self.pods = []
        cluster.start_operator()

    def serve_vllm(self, model: Path, *, connector: bool) -> None:
        for host in self.hosts:
            start = functools.partial(self.start_vllm, model, host, connector=connector)
            self.pods.append(self.cluster.place(f"vllm-{host.name}", host, start))
        self.cluster.wait_ready(self.pods[0].name, START_S)
        assert self.cluster.add_floating_ip() == ADDRESS
        self.cluster.wait_ready(self.pods[1].name, START_S)

    def job_under(self, begin: Callable[[], T]) -> tuple[T, Json]:
        """As `hop_under`, by a MigrationJob; the job as it ended."""
        there = self.hold_back(HELD_MS)
        name = self.cluster.migrate(self.pods[0].name, self.pods[1].host)
        wait_until(f"MigrationJob {name} is in the agent", there, START_S, self.cluster.operator_log)
        begun = begin()
        job = self.cluster.ended(name)
        assert job["status"]["phase"] == "Succeeded", job["status"]
        self.pods.reverse()
        return begun, job


@pytest.fixture
def vllm_town(tiny_model: Path, tmp_path: Path) -> Iterator[OperatedTown]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path) as fleet, Operated(fleet, f"{ADDRESS}/30") as cluster:
        town = OperatedTown(cluster)
        town.serve_vllm(tiny_model, connector=True)
        yield town


@pytest.fixture
def plain_town(tiny_model: Path, tmp_path: Path) -> Iterator[VllmTown]:
    """Without the connector."""
    with Vpc.create() as vpc, Fleet(vpc, tmp_path) as fleet:
        town = VllmTown(vpc, fleet)
        town.serve_vllm(tiny_model, connector=False)
        yield town


def body(first: int, tokens: int = TOKENS, **more: Any) -> str:
    prompt = [3 + (first * 97 + i * 31) % 400 for i in range(PROMPT_TOKENS)]
    base = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    return json.dumps({**base, **more})


def text(stream: bytes) -> str:
    *events, done, rest = stream.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events)


def whole(curl: Process) -> str:
    out, _ = curl.communicate(timeout=120)
    assert curl.returncode == 0, curl.output()
    return text(out)


def read_some(curl: Process, events: int) -> bytes:
    """The first events of a stream that is under way."""
    assert curl.stdout is not None
    got = b""
    while got.count(b"\n\n") < events:
        got += os.read(curl.stdout.fileno(), 1 << 16)  # past Python's buffer, which `communicate` does not look into
    return got


def test_a_migration_job_moves_streams_of_stock_servers_with_their_kv(vllm_town: OperatedTown) -> None:
    """A machine that is so busy that both answers are over before the move is asked again, with other prompts."""
    for first in range(0, 2 * TRIES, 2):
        queries, hits, job = move_two(vllm_town, first)
        if job["status"]["streams"]["migrated"] == 2 and queries:
            break
    assert queries > 2 * (PROMPT_TOKENS + BEGUN), f"both answers went on at the target: {job['status']}"
    full = queries - 2 * BLOCK_TOKENS  # each has a tail that is no full block
    assert hits >= 0.9 * full, f"{hits:g} of {queries:g} tokens"
    kv, report = job["status"]["kv"], vllm_town.cluster.report_of(job)
    assert kv["rounds"] >= 2 and kv["bytesSent"] > 0, kv
    ahead = re.search(r"copied +([0-9.]+) MB of KV copied in", report["output"])
    assert ahead, report["output"]
    assert float(ahead[1]) * 1e6 >= 0.5 * kv["bytesSent"], "most of it went while the answers went on"


def move_two(town: OperatedTown, first: int) -> tuple[float, float, Json]:
    """Two answers change nodes and are what they would have been; tokens that the target looked up, and found; the
    job."""
    bodies = [body(first + i) for i in range(2)]
    wanted = [whole(town.curl("-d", data, URL)) for data in bodies]
    assert wanted[0] != wanted[1] and len(set(wanted[0])) > 20
    capture = town.client.capture()
    before = town.hits(town.pods[1])

    def begin() -> tuple[list[Process], list[bytes]]:
        curls = [town.curl("-d", data, URL) for data in bodies]
        return curls, [read_some(curl, BEGUN) for curl in curls]

    (curls, begun), job = town.job_under(begin)
    for curl, start, one in zip(curls, begun, wanted, strict=True):
        out, _ = curl.communicate(timeout=120)
        assert curl.returncode == 0, curl.output()
        assert text(start + out) == one
    assert [p for p in capture.stop() if p.rst] == []
    queries, hits = (now - then for now, then in zip(town.hits(town.pods[0]), before, strict=True))
    return queries, hits, job


def test_without_the_connector_nothing_is_hit_and_the_text_is_the_same(plain_town: VllmTown) -> None:
    town = plain_town
    wanted = whole(town.curl("-d", body(0), URL))

    def begin() -> tuple[Process, bytes]:
        curl = town.curl("-d", body(0), URL)
        return curl, read_some(curl, 5)

    curl, first = town.hop_under(begin)
    out, _ = curl.communicate(timeout=120)
    assert text(first + out) == wanted
    assert town.metric(town.pods[0], "vllm:prompt_tokens_cached_total") == 0
