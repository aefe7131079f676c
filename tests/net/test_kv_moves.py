"""Streams of real engines change nodes with their KV: copied while they go on, shared where it can be, computed again
where it cannot come; and a move that fails leaves nothing of it on either side.

Every answer is compared with the one without a migration. What the pools hold is read from the engines' own memfds.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from midstream_runtime.contract.pool import PoolView, SlotState
from midstream_testbed.fleet import GATEWAY_PORT, Fleet
from midstream_testbed.machine import Pod
from midstream_testbed.namespace import Process
from midstream_testbed.vpc import Vpc
from traces import descriptors

ADDRESS, KV_PORT = "10.77.0.100", 9446
URL = f"http://{ADDRESS}:{GATEWAY_PORT}/v1/completions"
TOKENS = 700
SYSTEM = "You are a patient teacher, who explains everything twice. " * 8
BLOCK_TOKENS = 16
BATCH = 3
UNDONE = ("PHASE_ROLLED_BACK", "PHASE_FAILED")


class KvWorld:
    """Two hosts that steer in small batches, an agent and a serving pod on each; streams go back and forth."""

    def __init__(self, vpc: Vpc, fleet: Fleet, *target_options: str) -> None:
        self.vpc, self.fleet = vpc, fleet
        self.client = vpc.client("client")
        self.pods: list[Pod] = []
        for name, options in (("node-a", ()), ("node-b", target_options)):
            host = vpc.host(name)
            fleet.start_agent(host, "--moved-linger-s", "1", "--batch-streams", str(BATCH), "--peer-reply-s", "5")
            more = ("--pace-ms", "4", "--pool-slots", "1024", *options)
            self.pods.append(fleet.start_gateway(host, f"llm-{name}", *more))
        for pod in self.pods:
            fleet.wait_ready(pod.name)
        fleet.attach(self.pods[0], ADDRESS)
        self.wanted: dict[str, str] = {}

    def ask(self, prompt: str) -> Process:
        body = {"model": "midstream-tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True,
                "ignore_eos": True}  # fmt: skip
        argv = ["curl", "-sS", "-N", "--max-time", "90", "-H", "content-type: application/json",
                "-d", json.dumps(body), URL]  # fmt: skip
        return self.client.popen(argv, stdout=subprocess.PIPE, name="curl")

    def reference(self, *prompts: str) -> None:
        """The answers without a migration; they leave their blocks in the source's pool as cache."""
        for prompt, curl in [(p, self.ask(p)) for p in prompts]:
            self.wanted[prompt] = text_of(curl, b"")

    def begin(self, *prompts: str, events: int = 60) -> list[Asked]:
        """Ask, and wait until each has so many tokens."""
        asked = [Asked(self, prompt, self.ask(prompt)) for prompt in prompts]
        for one in asked:
            one.read(events)
        return asked

    def hop(self, *options: str) -> dict[str, Any]:
        there = self.pods[1]
        report = self.fleet.migrate(self.pods[0].name, there.host.name, *options)
        if report["phase"] == "PHASE_SUCCEEDED":
            self.pods.reverse()
        return report

    def moved(self, *options: str) -> dict[str, Any]:
        """A hop that must succeed; what it says of KV, as numbers."""
        report = self.hop(*options)
        assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
        return kv_of(report)

    def metric(self, pod: Pod, name: str) -> float:
        text = pod.run(["curl", "-sS", f"http://127.0.0.1:{GATEWAY_PORT}/metrics"], check=True).stdout
        found = re.search(rf"^{name}_total (\S+)$", text, re.M)
        assert found, f"no metric {name}"
        return float(found[1])

    def adopted(self) -> tuple[float, float]:
        """At the pod that serves now: tokens of KV that came with answers, tokens computed again for them."""
        names = ("midstream_adopted_kv_tokens", "midstream_adopted_prefill_tokens")
        return self.metric(self.pods[0], names[0]), self.metric(self.pods[0], names[1])


class Asked:
    """A stream under way."""

    def __init__(self, world: KvWorld, prompt: str, curl: Process) -> None:
        self.world, self.prompt, self.curl, self.got = world, prompt, curl, b""

    def read(self, events: int) -> None:
        assert self.curl.stdout is not None
        while self.got.count(b"\n\n") < events:
            more = os.read(self.curl.stdout.fileno(), 1 << 16)
            assert more, self.curl.output()
            self.got += more

    def unchanged(self) -> None:
        assert text_of(self.curl, self.got) == self.world.wanted[self.prompt]


def text_of(curl: Process, begun: bytes) -> str:
    out, _ = curl.communicate(timeout=120)
    assert curl.returncode == 0, curl.output()
    *events, done, rest = (begun + out).decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events)


def kv_of(report: dict[str, Any]) -> dict[str, Any]:
    kv = report.get("kv", {})
    names = ("bytesTotal", "bytesSent", "bytesShared", "rounds", "blocksRecomputed")
    return {**{name: int(kv.get(name, 0)) for name in names}, "reason": kv.get("reason", "")}


@contextlib.contextmanager
def pool_of(world: KvWorld, pod: Pod) -> Iterator[PoolView]:
    """The pod's KV pool, out of its gateway's descriptors."""
    folder = Path(f"/proc/{world.fleet.pods[pod.name].process.pid}/fd")
    fd = next(f for f in folder.iterdir() if "memfd:midstream-kv" in os.readlink(f))
    with fd.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory, memoryview(memory) as view:
        yield PoolView(view)


def slots(world: KvWorld, pod: Pod) -> Counter[SlotState]:
    with pool_of(world, pod) as pool:
        return Counter(SlotState(pool.info(slot).state) for slot in range(pool.layout.slots))


def nothing_left(world: KvWorld, fds: dict[int, Counter[str]]) -> None:
    """No slot is reserved, or in a stream; agents have the descriptors that they had. Answers must have ended."""
    end = time.monotonic() + 20
    while True:
        found = [f"{pod.name}: {counts}" for pod in world.pods if (counts := busy(world, pod))]
        for pid, had in fds.items():
            more = descriptors(pid) - had
            found += [f"process {pid} has {dict(more)} too many"] if more else []
        if not found:
            return
        assert time.monotonic() < end, found
        time.sleep(0.1)


def busy(world: KvWorld, pod: Pod) -> dict[str, int]:
    counts = slots(world, pod)
    return {s.name: counts[s] for s in (SlotState.RESERVED, SlotState.OPEN) if counts[s]}


def agents_fds(world: KvWorld) -> dict[int, Counter[str]]:
    return {a.process.pid: descriptors(a.process.pid) for a in world.fleet.agents.values()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KvWorld]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path_factory.mktemp("kv"), steer=True) as fleet:
        made = KvWorld(vpc, fleet)
        for _ in range(2):  # what is made once and kept is there
            made.hop()
        yield made


def prompts(kind: str, count: int) -> list[str]:
    """That no other test has asked for, here or at the other node."""
    return [f"{kind} {number}. It is a truth universally acknowledged, that a" for number in range(count)]


def test_kv_comes_while_answers_go_on_and_nothing_is_computed_again(world: KvWorld) -> None:
    asked_for = prompts("ahead", 8)
    world.reference(*asked_for)
    fds = agents_fds(world)
    asked = world.begin(*asked_for)
    report = world.hop()
    assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
    kv = kv_of(report)
    assert kv["rounds"] >= 2 and kv["reason"] == "" and kv["blocksRecomputed"] == 0
    assert len(report["batches"]) == 3, "all batches share the copy"
    ahead = re.search(r"copied +([0-9.]+) MB of KV copied in", report["output"])
    assert ahead and float(ahead[1]) * 1e6 >= 0.5 * kv["bytesSent"], "most went while the answers went on"
    for one in asked:
        one.unchanged()
    used, again = world.adopted()
    assert used >= 8 * 60 and again == 0
    nothing_left(world, fds)


def test_a_beginning_that_streams_share_goes_once_and_not_where_it_is_already(world: KvWorld) -> None:
    asked_for = [SYSTEM + prompt for prompt in prompts("shared", 6)]
    world.reference(*asked_for)
    asked = world.begin(*asked_for, events=30)
    first = world.moved()
    size = slot_bytes(world)
    assert first["bytesShared"] >= 5 * 6 * size, "five of six beginnings of some blocks"
    assert first["bytesSent"] <= first["bytesTotal"] - first["bytesShared"] + size
    for one in asked:
        one.unchanged()
    assert first["blocksRecomputed"] == 0
    # back again, where the references have left the same blocks as cache
    asked = world.begin(*asked_for, events=30)
    second = world.moved()
    assert second["bytesShared"] > first["bytesShared"]
    assert second["bytesSent"] < first["bytesSent"]
    for one in asked:
        one.unchanged()


def slot_bytes(world: KvWorld) -> int:
    with pool_of(world, world.pods[0]) as pool:
        return pool.layout.slot_bytes


def test_without_the_kv_port_tokens_are_replayed_and_the_job_says_so(world: KvWorld) -> None:
    (prompt,) = prompts("port", 1)
    world.reference(prompt)
    (asked,) = world.begin(prompt)
    rule = f"tcp dport {KV_PORT} reject with tcp reset"
    world.vpc.router.nft(f"table inet ms_kv {{\nchain c {{\ntype filter hook forward priority -10;\n{rule}\n}}\n}}")
    try:
        before = world.metric(world.pods[1], "midstream_adopted_prefill_tokens")
        kv = world.moved()
    finally:
        world.vpc.router.nft("delete table inet ms_kv")
    assert kv["reason"] == "kv_broken" and kv["bytesSent"] == 0
    assert kv["blocksRecomputed"] >= 60 // BLOCK_TOKENS
    asked.unchanged()
    assert world.adopted()[1] - before > 60


def test_replay_is_a_choice(world: KvWorld) -> None:
    (prompt,) = prompts("replay", 1)
    world.reference(prompt)
    (asked,) = world.begin(prompt)
    kv = world.moved("--kv", "replay")
    assert (kv["bytesSent"], kv["reason"]) == (0, "") and kv["blocksRecomputed"] >= 60 // BLOCK_TOKENS
    asked.unchanged()


def test_a_block_that_is_not_what_its_checksum_says_is_computed_again(world: KvWorld) -> None:
    """A bit of each block flips in the source's pool, behind the engine's back."""
    (prompt,) = prompts("damaged", 1)
    world.reference(prompt)
    (asked,) = world.begin(prompt)
    with pool_of(world, world.pods[0]) as pool:
        sealed = [s for s in range(pool.layout.slots) if pool.info(s).state == SlotState.SEALED]
        assert len(sealed) >= 60 // BLOCK_TOKENS
        for slot in sealed:
            with pool.slot(slot) as place:
                place[0] ^= 1  # a float16's lowest bit: enough for a checksum, too little for another token
    kv = world.moved()
    assert kv["reason"] == "kv_checksum" and kv["blocksRecomputed"] > 0
    asked.unchanged()


@pytest.mark.parametrize(
    ("side", "where"),
    [
        ("source", "source.PREPARE.do.after"),
        ("source", "source.PAUSE.do.after"),
        ("source", "source.SEND.do.before"),
        ("source", "source.SEND.do.after"),
        ("target", "target.RESTORE.do.before"),
        ("target", "target.RESTORE.do.after"),
    ],
)
@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_move_that_fails_leaves_no_slot_and_no_descriptor(world: KvWorld, side: str, where: str, how: str) -> None:
    asked_for = prompts(f"{where} {how}", 2)
    world.reference(*asked_for)
    victim = world.fleet.agents[world.pods[0 if side == "source" else 1].host.name]
    fds = agents_fds(world)
    asked = world.begin(*asked_for)
    victim.arm(f"{where}={how}")
    there = world.pods[1].name
    argv = world.fleet.cli_argv("migrate", world.pods[0].name, "--target-pod", there, "--job", f"{where}-{how}".lower())
    migrate = world.fleet.operator.popen(argv, env=world.fleet.env(), name="migrate")
    if how == "kill":
        victim.process.wait(30)
        fds.pop(victim.process.pid)
        world.fleet.restart_agent(victim)
    migrate.communicate(timeout=60)
    for one in asked:
        one.unchanged()
    nothing_left(world, fds)
    kv = world.moved()  # and the next one is none the worse
    assert kv["reason"] == ""


def test_a_full_pool_at_the_target_means_replay_and_is_said(tmp_path: Path) -> None:
    """The target has room for the answers and for no copy of them beside what it serves already."""
    with Vpc.create() as vpc, Fleet(vpc, tmp_path, steer=True) as fleet:
        world = KvWorld(vpc, fleet, "--pool-slots", "60")
        asked_for = prompts("full", 4)
        world.reference(*asked_for)
        asked = world.begin(*asked_for, events=350)
        kv = world.moved()
        assert kv["reason"] == "pool_full" and kv["blocksRecomputed"] > 0 and kv["bytesSent"] > 0
        for one in asked:
            one.unchanged()
        nothing_left(world, {})


def test_pools_of_another_shape_are_not_copied(tmp_path: Path) -> None:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path, steer=True) as fleet:
        world = KvWorld(vpc, fleet, "--block-tokens", "32")
        (prompt,) = prompts("shape", 1)
        world.reference(prompt)
        (asked,) = world.begin(prompt)
        kv = world.moved()
        assert kv["reason"] == "kv_fingerprint" and kv["bytesSent"] == 0 and kv["blocksRecomputed"] > 0
        asked.unchanged()

