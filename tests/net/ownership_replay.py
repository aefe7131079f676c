"""Plays a run of the model, row by row, against real agents, and holds what they did against what the model says.

Both agents are led by failpoints: each waits at the end of the row that it has just done until the run wants its next
one. Rows that are not an agent's own happen for real, too: an agent is killed and started again, a reply is lost with
its session, a node goes off the network with all its processes.

After each row this compares, at both nodes: where the streams are live (a socket in the pod that no gate shuts), the
decisions in both journals, and where the network delivers the address.
"""

from __future__ import annotations

import ipaddress
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream_agent.hold import FLOW_HERE, Hold
from midstream_testbed.fleet import Agent
from midstream_testbed.machine import Pod
from ownership_model import Row
from world import V4, World

PATIENCE_S = 15  # longer than any timeout that a row waits for
SOURCE, TARGET = "source", "target"
SOURCE_DECISIONS, TARGET_DECISIONS = ("SENT", "COMMIT", "ABORT"), ("RESTORED", "ACTIVATED", "DISCARDED")
ESTABLISHED = "01"

# Where an agent waits once it has done a row. THAW_*: the last undo that says something of ownership.
STOPS = {
    "HOLD": (SOURCE, "source.EXPORT.do.after"),
    "HEAR_RESTORED": (SOURCE, "source.MOVE_ADDRESS.do.before"),
    "COMMIT": (SOURCE, "source.COMMIT.do.journalled"),
    "HEAR_ACTIVATED": (SOURCE, "source.COMMIT.do.after"),
    "HEAR_LOST": (SOURCE, "source.COMMIT.do.after"),
    "LOSE_TO_DEAD_TARGET": (SOURCE, "source.COMMIT.do.after"),
    "TAKE_ADDRESS_BACK": (SOURCE, "source.SEND.undo.after"),  # it has moved, and is proved, by then
    "THAW_NOTHING_SENT": (SOURCE, "source.EXPORT.undo.after"),
    "THAW_DISCARDED": (SOURCE, "source.EXPORT.undo.after"),
    "THAW_TARGET_GONE": (SOURCE, "source.EXPORT.undo.after"),
    "RESTORE": (TARGET, "target.RESTORE.do.before"),
    "RESTORED": (TARGET, "target.reply.ship"),
    "TAKE_ADDRESS": (TARGET, "target.MOVE_ADDRESS.do.before"),
    "ACTIVATED": (TARGET, "target.ACTIVATE.do.journalled"),
    "GO_LIVE": (TARGET, "target.reply.commit"),
    "DISCARD": (TARGET, "target.DISCARD.do.before"),
    "DISCARDED": (TARGET, "target.reply.discard"),
}
SEE_ADDRESS = {"ADDRESS_MOVED", "THAW_DISCARDED", "GO_LIVE", "RELEASE"}


@dataclass
class Led:
    """One agent that goes from failpoint to failpoint."""

    agent: Agent
    seen: int
    at: str = ""  # where it waits

    def go_on(self, to: str = "", spec: str = "") -> None:
        """Leave the place where it waits; wait at `to`. `spec`: what else to arm."""
        items = [i for i in (spec, f"{to}=wait" if to else "") if i]
        self.at = ""
        self.agent.arm(",".join(items))

    def reach(self, point: str) -> None:
        if self.at == point:
            return
        wait_for(lambda: point in self.agent.fired()[self.seen :], f"{self.agent.host.name} at {point}")
        self.seen += self.agent.fired()[self.seen :].index(point) + 1
        self.at = point

    @property
    def armed(self) -> Path:
        """What the agent has yet to take up."""
        return Path(self.agent.env["MIDSTREAM_FAILPOINT_FILE"])

    def kill(self) -> None:
        self.agent.process.kill()
        if self.agent.process.wait(10) != -signal.SIGKILL:
            raise AssertionError(f"the agent had ended before it was killed:\n{self.agent.log[-3000:]}")
        self.at = ""
        self.armed.unlink(missing_ok=True)


@dataclass
class Replay:
    """One run. `play` raises AssertionError at the first row after which the agents and the model differ."""

    world: World
    rows: list[Row]
    job: str = ""
    done: list[str] = field(default_factory=list)
    led: dict[str, Led] = field(default_factory=dict)
    stops: dict[str, tuple[str, str]] = field(default_factory=lambda: dict(STOPS))

    def __post_init__(self) -> None:
        self.names = [r.name for r in self.rows]
        self.source, self.target = self.world.at, self.world.away
        for side, name in ((SOURCE, self.source), (TARGET, self.target)):
            agent = self.world.agent(name)
            self.led[side] = Led(agent, len(agent.fired()))

    def play(self) -> None:
        for side in (SOURCE, TARGET):
            self.led[side].go_on(self.next_stop(side, -1))
        self.job = self.world.hop_in_background()
        for i, row in enumerate(self.rows):
            self.do(i, row.name)
            self.done.append(row.name)
            if not row.name.startswith("SAY_"):  # a message is on its way: it may have come already
                self.compare(i, row)

    def end(self) -> str:
        """Let both agents run to the job's end; its phase."""
        for led in self.led.values():
            if led.agent.process.poll() is None:
                led.go_on()
        return self.world.wait_job(self.job)

    def give_up(self) -> None:
        """After a failure: kill both agents, as either may wait for a row that does not come."""
        for led in self.led.values():
            if led.agent.process.poll() is None:
                led.kill()

    # -- doing a row -----------------------------------------------------------------------------------

    def next_stop(self, side: str, i: int) -> str:
        """The stop after this agent's next row; none beyond its death or what it does by itself."""
        for j, name in enumerate(self.names[i + 1 :], i + 1):
            if name in self.stops and self.stops[name][0] == side:
                return self.stops[name][1]
            if name == "FAIL" and side == SOURCE:
                return f"source.{self.last_begun(j)}.undo.before"
            if name.startswith(side.upper()):
                return ""
        return ""

    def last_begun(self, i: int) -> str:
        """The last step that the source has begun before row i: the first that it undoes."""
        before = self.names[:i]
        return "MOVE_ADDRESS" if "HEAR_RESTORED" in before else "SEND" if "SENT" in before else "EXPORT"

    def do(self, i: int, name: str) -> None:
        act: Callable[[int], None] | None = getattr(self, f"_{name.lower()}", None)
        if act is not None:
            act(i)
        elif name in self.stops:
            self.step(i, *self.stops[name])
        elif name not in UNSEEN:
            raise AssertionError(f"this replay cannot play {name}")

    def step(self, i: int, side: str, stop: str) -> None:
        """Let an agent do its row, which ends at `stop`."""
        led = self.led[side]
        if led.at and led.at != stop:
            led.go_on(stop)
        led.reach(stop)

    def release(self, side: str, i: int, spec: str = "") -> None:
        led = self.led[side]
        if led.at:
            led.go_on(self.next_stop(side, i), spec)

    def _sent(self, i: int) -> None:
        """SHIP comes with it: no failpoint stands between the journal and the message."""
        self.release(SOURCE, i)

    def _hear_restored(self, i: int) -> None:
        self.release(TARGET, i)
        self.step(i, SOURCE, self.stops["HEAR_RESTORED"][1])

    def _prove_address(self, i: int) -> None:
        """Said at once: the agent waits nowhere."""
        self.led[TARGET].go_on(self.next_stop(TARGET, i), "target.reply.move_address=delay:0")
        self.led[TARGET].reach("target.reply.move_address")
        self.led[TARGET].at = ""

    def _say_commit(self, i: int) -> None:
        self.release(SOURCE, i)

    _say_discard = _say_commit

    def _hear_activated(self, i: int) -> None:
        self.release(TARGET, i)
        self.step(i, SOURCE, self.stops["HEAR_ACTIVATED"][1])

    _hear_lost = _hear_activated

    def _take_address_back(self, i: int) -> None:
        self.release(TARGET, i)
        self.step(i, SOURCE, self.stops["TAKE_ADDRESS_BACK"][1])

    def _thaw_discarded(self, i: int) -> None:
        self.release(TARGET, i)
        self.step(i, SOURCE, self.stops["THAW_DISCARDED"][1])

    def _fail(self, i: int) -> None:
        """The step at whose end the source waits fails; or it waits for an answer, and none comes."""
        led, undo = self.led[SOURCE], f"source.{self.last_begun(i)}.undo.before"
        if led.at and led.at != undo:
            by_itself = "ABORT" in self.done  # before the next step
            led.go_on(undo, "" if by_itself else f"{led.at}=error")
        led.reach(undo)

    def _abort(self, i: int) -> None:
        said = self.world.fleet.cli("abort", self.job).stdout
        assert "rolled back" in said, said

    def _lose(self, i: int) -> None:
        """The answer that the target is about to give, and its session with it."""
        led = self.led[TARGET]
        if "TARGET_CRASHES" in self.done and not led.at:
            return  # it was lost with the agent
        assert led.at.startswith("target.reply."), f"at {led.at!r} there is no answer to lose"
        led.go_on(self.next_stop(TARGET, i), f"{led.at}=error")

    def _source_crashes(self, i: int) -> None:
        self.led[SOURCE].kill()

    def _target_crashes(self, i: int) -> None:
        self.led[TARGET].kill()

    def _source_restarts(self, i: int) -> None:
        """Waits where it goes on: before the first undo, or once COMMIT is in its journal (again)."""
        committed = "COMMIT" in self.done
        stop = self.stops["COMMIT"][1] if committed else f"source.{self.last_begun(i)}.undo.before"
        self.restart(SOURCE, stop)
        self.led[SOURCE].reach(stop)

    def _target_restarts(self, i: int) -> None:
        """What it has not journalled as restored it throws away before it listens, and must not wait then."""
        stop, (restored, _, discarded) = self.next_stop(TARGET, i), self.rows[i].target
        holds = restored and not discarded
        self.restart(TARGET, stop if holds else "")
        if not holds:
            self.led[TARGET].go_on(stop)

    def restart(self, side: str, stop: str) -> None:
        led = self.led[side]
        if stop:
            led.go_on(stop)
        self.world.fleet.restart_agent(led.agent)

    def _target_dies(self, i: int) -> None:
        """Off the network, every process killed, all sockets gone."""
        self.led[TARGET].agent.host.delete()

    def _thaw_target_gone(self, i: int) -> None:
        self.declare_gone()
        self.step(i, SOURCE, self.stops["THAW_TARGET_GONE"][1])

    def _lose_to_dead_target(self, i: int) -> None:
        self.release(SOURCE, i - 1)
        self.declare_gone()
        self.step(i, SOURCE, self.stops["LOSE_TO_DEAD_TARGET"][1])

    def declare_gone(self) -> None:
        """What the operator says once the cloud has told it."""
        fleet = self.world.fleet
        argv = [sys.executable, "-c", DECLARE_GONE, str(fleet.inventory), self.source, self.job, self.target]
        fleet.operator.run(argv, env=fleet.env())

    def _source_pod_dies(self, i: int) -> None:
        self.kill_pod(self.source)

    def _target_pod_dies(self, i: int) -> None:
        self.kill_pod(self.target)

    def kill_pod(self, node: str) -> None:
        process = self.world.fleet.pods[self.world.pods[node].name].process
        process.kill()
        process.wait(10)

    def _release(self, i: int) -> None:
        self.release(SOURCE, i)
        if self.led[TARGET].at:
            self.release(TARGET, i)
        wait_for(lambda: not self.journal(SOURCE).exists(), "the source's journal to go")

    # -- comparing -------------------------------------------------------------------------------------

    def compare(self, i: int, row: Row) -> None:
        """Agents may need a moment; that they never come to what the model says is the failure."""
        wanted = self.wanted(i, row)
        end = time.monotonic() + PATIENCE_S
        while (found := self.found(wanted)) != wanted:
            if time.monotonic() > end:
                raise AssertionError(f"after {' '.join(self.done)}:\n the model says {wanted}\n there is {found}")
            time.sleep(0.02)

    def wanted(self, i: int, row: Row) -> dict[str, Any]:
        wanted: dict[str, Any] = {"live at source": row.live[0]}
        if "TARGET_DIES" not in self.done:
            wanted["live at target"] = row.live[1]
            wanted["target's journal"] = chosen(TARGET_DECISIONS, row.target)
            if row.name in SEE_ADDRESS:
                wanted["address at"] = self.target if row.address_at_target else self.source
        if row.name == "TARGET_RESTARTS" and row.target[2]:
            wanted["target's journal"] = set()  # it ends a discard before it listens
        if "RELEASE" in self.done:
            wanted.pop("target's journal", None)  # FINISH is on its way
        elif self.source_decides(i):
            wanted["source's journal"] = chosen(SOURCE_DECISIONS, row.source)
        return wanted

    def source_decides(self, i: int) -> bool:
        """False where ABORT is in the journal a row early or late: an agent that hears that a session broke fails at
        once, and one that was killed writes it when it is back."""
        crashes = [n for n in self.done if n.startswith("SOURCE_")]
        down = bool(crashes) and crashes[-1] == "SOURCE_CRASHES"
        waits = bool(self.led[SOURCE].at)
        return not down and (waits or "FAIL" not in self.names[i + 1 :])

    def found(self, wanted: dict[str, Any]) -> dict[str, Any]:
        look: dict[str, Callable[[], Any]] = {
            "live at source": lambda: self.live(self.source),
            "live at target": lambda: self.live(self.target),
            "source's journal": lambda: self.decisions(SOURCE) & set(SOURCE_DECISIONS),
            "target's journal": lambda: self.decisions(TARGET) & set(TARGET_DECISIONS),
            "address at": lambda: self.world.vpc.fabric.owner(V4),
        }
        return {what: look[what]() for what in wanted}

    def live(self, node: str) -> bool:
        """A connection in the node's pod that no gate shuts."""
        with Hold.open(self.world.agent(node).bpffs) as hold:
            open_to_all = set(hold.flow_states()) <= {FLOW_HERE}
        return open_to_all and established(self.world.pods[node], V4) > 0

    def journal(self, side: str) -> Path:
        led = self.led[side]
        return next(led.agent.state_dir.rglob(f"{side}-{self.job}.jsonl"), led.agent.state_dir / "none")

    def decisions(self, side: str) -> set[str]:
        try:
            lines = self.journal(side).read_text().splitlines()
        except FileNotFoundError:
            return set()
        return {x["decision"] for x in map(json.loads, lines) if x["kind"] == "decision"}


# Nothing to do, nothing that shows yet: a message on its way, the network's own doing, a record that goes.
UNSEEN = {"SHIP", "ADDRESS_MOVED", "COMMIT_AGAIN", "DISCARD_AGAIN", "FORGET", "SESSION_ENDED", "REFUSE_SHIP",
          "TARGET_POD_GONE"}  # fmt: skip

DECLARE_GONE = """
import asyncio, sys, time
from pathlib import Path
from google.protobuf.json_format import MessageToJson
from midstream_agent.contract import agent_pb2 as pb, agent_pb2_grpc as rpc
from midstream_cli.inventory import Inventory
from midstream_cli.main import connect

async def main(inventory, node, job, gone, epoch=time.time_ns() // 1_000_000):  # as the CLI
    async with connect(Inventory.load(Path(inventory)), node) as channel:
        request = pb.DeclareGoneRequest(job_id=job, node=gone, evidence="test:deleted", epoch=int(epoch))
        print(MessageToJson(await rpc.AgentStub(channel).DeclareGone(request), indent=None))

asyncio.run(main(*sys.argv[1:]))
"""


def chosen(names: tuple[str, ...], bits: tuple[bool, ...]) -> set[str]:
    return {name for name, bit in zip(names, bits, strict=True) if bit}


def established(pod: Pod, address: str) -> int:
    """Established connections of a pod on a floating IPv4 address, by /proc/net/tcp6 (the pod listens on [::])."""
    packed = bytes(10) + b"\xff\xff" + ipaddress.ip_address(address).packed
    local = "".join(packed[i : i + 4][::-1].hex() for i in range(0, 16, 4)).upper()
    v4 = ipaddress.ip_address(address).packed[::-1].hex().upper()
    lines = [x.split() for x in (pod.proc_net("tcp6") + pod.proc_net("tcp")).splitlines()]
    return sum(x[3] == ESTABLISHED and x[1].split(":")[0] in (local, v4) for x in lines if x[0] != "sl")


def wait_for(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE_S} s for {what}")
        time.sleep(0.01)
