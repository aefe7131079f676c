"""Agents without a node: `python simulated_agents.py TLS_FOLDER`, a process of its own, many agents in it.

There is no kernel here to hold a thousand nodes, so their agents are simulated: the real contract over real gRPC with
mutual TLS on port 9443 of an address each, and as strict as the real agent in all that an operator can see: only the
operator's certificate commands; an older epoch, a second job of a pod, an unknown pod, an address that leads to
another pod are refused by the real names; a job id that is known is followed, not begun again; an abort counts until
COMMIT; a restarted agent has forgotten the jobs that had ended. What it does not do is move bytes.

Told what to do by JSON lines on stdin, one answer line for each: see `Town.do`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_agent.notices import Board, Said

PORT = 9443
OPERATOR = "midstream-operator"
OPTIONS = [
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),  # as the real agent's
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # the port of another test run's agent is no port to share
]
JOB_ID = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")
STEPS = (
    ("CONNECT", pb.PHASE_PREPARING),
    ("PREPARE", pb.PHASE_PREPARING),
    ("PAUSE", pb.PHASE_PREPARING),
    ("HOLD", pb.PHASE_SWITCHING),
    ("EXPORT", pb.PHASE_SWITCHING),
    ("SEND", pb.PHASE_SWITCHING),
    ("MOVE_ADDRESS", pb.PHASE_SWITCHING),
    ("COMMIT", pb.PHASE_COMMITTING),
    ("RELEASE", pb.PHASE_COMMITTING),
)
COMMIT = [name for name, _ in STEPS].index("COMMIT")
STREAMS = 3  # of each pod
TOKENS, KV_BYTES = 2_000, 64 << 20  # of each stream
ENDED = frozenset({pb.PHASE_SUCCEEDED, pb.PHASE_ROLLED_BACK, pb.PHASE_FAILED, pb.PHASE_ABORTED})


class Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")


@dataclass
class Record:
    request: pb.MigrateRequest
    report: pb.JobReport
    events: list[pb.MigrateEvent] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    abort: bool = False
    gone: str = ""

    def add(self, step: str, what: str, message: str = "", end: bool = False) -> None:
        event = pb.MigrateEvent(phase=self.report.phase, step=step, what=what, message=message)
        if end:
            event.report.CopyFrom(self.report)
        self.events.append(event)
        self.news.set()

    async def follow(self) -> AsyncIterator[pb.MigrateEvent]:
        seen = 0
        while True:
            while seen < len(self.events):
                yield self.events[seen]
                seen += 1
                if self.events[seen - 1].HasField("report"):
                    return
            self.news.clear()
            await self.news.wait()


@dataclass
class SimulatedAgent(rpc.AgentServicer):
    town: Town
    node: str
    address: str
    pods: set[str] = field(default_factory=set)
    routes: dict[str, str] = field(default_factory=dict)  # address -> pod uid
    epochs: dict[str, int] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    server: aio.Server | None = None
    board: Board = field(default_factory=Board)
    metadata: list[str] | None = None  # addresses of its interface, as IMDS has them

    async def start(self) -> None:
        tls = self.town.tls
        key, cert = (tls / f"{self.node}.key").read_bytes(), (tls / f"{self.node}.pem").read_bytes()
        credentials = grpc.ssl_server_credentials([(key, cert)], (tls / "ca.pem").read_bytes(), True)
        self.server = aio.server(options=OPTIONS)
        rpc.add_AgentServicer_to_server(self, self.server)
        self.server.add_secure_port(f"{self.address}:{PORT}", credentials)
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None

    # -- what the operator may ask -----------------------------------------------------------------------

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:
        await self._admit(context, "Describe", request)
        return pb.DescribeReply(
            node=self.node, version="simulated", protocol=1, boot_id="boot", floating_addresses=sorted(self.routes)
        )

    async def AttachAddress(self, request: pb.AttachAddressRequest, context: Any) -> pb.AttachAddressReply:
        await self._admit(context, "AttachAddress", request)
        try:
            self._check_epoch(f"address:{request.address}", request.epoch)
            self._check_pod(request.pod.uid)
            if self.routes.get(request.address, request.pod.uid) != request.pod.uid:
                raise Refused("address_taken", f"{request.address} leads to another pod of this node")
            self.routes[request.address] = request.pod.uid
        except Refused as e:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(e))
        return pb.AttachAddressReply()

    async def DetachAddress(self, request: pb.DetachAddressRequest, context: Any) -> pb.DetachAddressReply:
        await self._admit(context, "DetachAddress", request)
        try:
            self._check_epoch(f"address:{request.address}", request.epoch)
            self._check_pod(request.pod.uid)
            if self.routes.get(request.address) == request.pod.uid:
                del self.routes[request.address]
        except Refused as e:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(e))
        return pb.DetachAddressReply()

    async def Migrate(self, request: pb.MigrateRequest, context: Any) -> AsyncIterator[pb.MigrateEvent]:
        await self._admit(context, "Migrate", request)
        try:
            record = self.records.get(request.job_id) or self._begin(request)
        except Refused as e:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(e))
            return
        async for event in record.follow():
            yield event

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        await self._admit(context, "Status", request)
        if request.job_id and request.job_id not in self.records:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "unknown_job: this agent knows no such job")
        return pb.StatusReply(jobs=[r.report for k, r in self.records.items() if request.job_id in ("", k)])

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortReply:
        await self._admit(context, "Abort", request)
        record = self.records.get(request.job_id)
        if record is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "unknown_job: this agent knows no such job")
            raise AssertionError("aborted")
        if record.report.phase in ENDED:
            return pb.AbortReply(accepted=False, message=f"job {request.job_id} has ended")
        if record.report.phase == pb.PHASE_COMMITTING:
            text = f"job {request.job_id} is past the point of no return: it goes on"
            return pb.AbortReply(accepted=False, message=text)
        record.abort = True
        self.town.wake()
        return pb.AbortReply(accepted=True, message=f"job {request.job_id} is being rolled back")

    async def DeclareGone(self, request: pb.DeclareGoneRequest, context: Any) -> pb.DeclareGoneReply:
        await self._admit(context, "DeclareGone", request)
        record = self.records.get(request.job_id)
        try:
            self._check_gone_epoch(request)
        except Refused as e:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(e))
        if record is None and (reply := self._take_over(request)) is not None:
            return reply
        if record is None or record.request.target_node.name != request.node:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "unknown_job: no running job goes there")
            raise AssertionError("aborted")
        record.gone = request.evidence
        self.town.wake()
        return pb.DeclareGoneReply()

    def _take_over(self, request: pb.DeclareGoneRequest) -> pb.DeclareGoneReply | None:
        """As a target, of what a source that is gone had sent; None: nothing of the job had come here."""
        source = self.town.agents.get(request.node)
        record = source.records.get(request.job_id) if source else None
        if source is None or record is None or record.request.target_node.name != self.node:
            return None
        if not any(e.step == "SEND" and e.what == "done" for e in record.events):
            return None
        for address in source._addresses(record):
            self.routes[address] = record.request.target_pod.uid
            del source.routes[address]
        return pb.DeclareGoneReply(streams=STREAMS, message=f"{STREAMS} streams are live here, 0 are lost")

    async def Notices(self, request: pb.NoticesRequest, context: Any) -> AsyncIterator[pb.Notice]:
        await self._admit(context, "Notices", request)
        async for notice in self.board.listen():
            yield notice

    async def Survey(self, request: pb.SurveyRequest, context: Any) -> pb.SurveyReply:
        await self._admit(context, "Survey", request)
        try:
            self._check_pod(request.pod.uid)
        except Refused as e:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(e))
        streams = [
            pb.StreamFigures(id=str(n), address=address, movable=True, tokens=TOKENS, kv_bytes=KV_BYTES)
            for address in sorted(a for a, uid in self.routes.items() if uid == request.pod.uid)
            for n in range(STREAMS)
        ]
        return pb.SurveyReply(streams=streams, pool_bytes=1 << 30, pool_free_bytes=1 << 29)

    async def Warm(self, request: pb.WarmRequest, context: Any) -> pb.WarmReply:
        """What has been copied once is there; nothing else changes."""
        await self._admit(context, "Warm", request)
        try:
            self._check_epoch(f"pod:{request.pod.uid}", request.epoch)
            self._check_pod(request.pod.uid)
            if why := self._unreachable(request):
                raise Refused(why, f"{request.target_node.name} cannot take KV")
        except Refused as e:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(e))
        there = (request.pod.uid, request.target_pod.uid)
        sent, shared = (0, STREAMS * KV_BYTES) if there in self.town.warm else (STREAMS * KV_BYTES, 0)
        self.town.warm.add(there)
        return pb.WarmReply(streams=STREAMS, kv=pb.KvCounts(bytes_sent=sent, bytes_shared=shared))

    async def Metadata(self, request: pb.MetadataRequest, context: Any) -> pb.MetadataReply:
        await self._admit(context, "Metadata", request)
        if self.metadata is None:
            return pb.MetadataReply(absent="simulated: no EC2 instance")
        return pb.MetadataReply(addresses=self.metadata)

    async def Doctor(self, request: pb.DoctorRequest, context: Any) -> pb.DoctorReply:
        await self._admit(context, "Doctor", request)
        findings = [
            pb.Finding(check="bpf", severity="ok", message="hold programs"),
            pb.Finding(check="conntrack", severity="error", message="loose is off", remedy="sysctl loose=1"),
        ]
        return pb.DoctorReply(findings=findings if self.node == "sick" else findings[:1])

    # -- as strict as the real one -------------------------------------------------------------------------

    async def _admit(self, context: Any, call: str, request: Any) -> None:
        names = {n.decode() for n in context.auth_context().get("x509_subject_alternative_name", [])}
        if OPERATOR not in names:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"not_operator: the caller is {sorted(names)}")
        self.town.asked.append(
            {
                "node": self.node,
                "call": call,
                "job": getattr(request, "job_id", ""),
                "epoch": getattr(request, "epoch", 0),
                "address": getattr(request, "address", ""),
                "kv": pb.KvMode.Name(request.kv_mode) if isinstance(request, pb.MigrateRequest) else "",
                "target": request.target_pod.uid if isinstance(request, pb.MigrateRequest | pb.WarmRequest) else "",
                "deadline_ms": getattr(request, "deadline_unix_ms", 0),
            }
        )

    def _check_epoch(self, what: str, epoch: int) -> None:
        seen = self.epochs.get(what, 0)
        if epoch < seen:
            raise Refused("stale_epoch", f"command with epoch {epoch} for {what} is older than {seen}")
        self.epochs[what] = epoch

    def _check_gone_epoch(self, request: pb.DeclareGoneRequest) -> None:
        """Newer than whoever began the job, at either end, and than the last such word."""
        what = f"gone:{request.job_id}"
        records = (agent.records.get(request.job_id) for agent in self.town.agents.values())
        self.epochs[what] = max(self.epochs.get(what, 0), *(r.request.epoch for r in records if r is not None), 0)
        self._check_epoch(what, request.epoch)

    def _check_pod(self, uid: str) -> None:
        if uid not in self.pods:
            raise Refused("unknown_pod", f"no process of pod {uid} runs on this node")

    def _begin(self, request: pb.MigrateRequest) -> Record:
        if not JOB_ID.match(request.job_id):
            raise Refused("bad_job_id", f"job id {request.job_id!r}")
        self._check_epoch(f"pod:{request.pod.uid}", request.epoch)
        for job_id, other in self.records.items():
            if other.request.pod.uid == request.pod.uid and other.report.phase not in ENDED:
                raise Refused("pod_busy", f"job {job_id} is moving this pod already")
        report = pb.JobReport(
            job_id=request.job_id,
            phase=pb.PHASE_PENDING,
            source_node=self.node,
            target_node=request.target_node.name,
            switchover="Wait" if request.switchover == pb.SWITCHOVER_WAIT else "Steer",
        )
        record = self.records[request.job_id] = Record(request, report)
        self._spawn(self._run(record))
        return record

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, record: Record, first: int = 0) -> None:
        for i, (step, phase) in enumerate(STEPS[first:], first):
            if i < COMMIT and (record.abort or self._too_late(record)):
                self._back(record, "aborted" if record.abort else "deadline_passed", step)
                return
            if step == "MOVE_ADDRESS" and record.request.switchover != pb.SWITCHOVER_WAIT:
                continue  # the address follows after COMMIT
            record.report.phase = phase
            record.add(step, "begin")
            why = await self._at(record, step, i)
            if why:
                self._back(record, why, step)
                return
            record.add(step, "done")
        self._through(record)

    def _too_late(self, record: Record) -> bool:
        deadline = record.request.deadline_unix_ms
        return bool(deadline) and time.time() * 1000 > deadline

    async def _at(self, record: Record, step: str, i: int) -> str:
        """Do the step; the code of the error if it fails."""
        await self.town.gate(record, step, i < COMMIT)
        if i < COMMIT and record.abort:
            return "aborted"
        if step == "CONNECT":
            return self._connect(record)
        return self.town.failing.get(step, "") if i < COMMIT else ""

    def _connect(self, record: Record) -> str:
        request = record.request
        if request.pod.uid not in self.pods:
            return "unknown_pod"
        if request.pod.uid in self.town.bare:
            return "no_handoff"
        if not self._addresses(record):
            return "no_floating_ip"
        return self._unreachable(request)

    def _unreachable(self, request: pb.MigrateRequest | pb.WarmRequest) -> str:
        target = self.town.agents.get(request.target_node.name)
        if target is None or target.server is None or request.target_node.endpoint != f"{target.address}:{PORT}":
            return "peer_unreachable"
        return "" if request.target_pod.uid in target.pods else "unknown_pod"

    def _addresses(self, record: Record) -> list[str]:
        here = [a for a, uid in self.routes.items() if uid == record.request.pod.uid]
        return [a for a in here if not record.request.addresses or a in record.request.addresses]

    def _back(self, record: Record, code: str, step: str) -> None:
        report = record.report
        if step == "MOVE_ADDRESS":
            record.add(step, "undo")
        refused = step in ("CONNECT", "PREPARE")
        report.phase = pb.PHASE_ABORTED if code == "aborted" else pb.PHASE_FAILED if refused else pb.PHASE_ROLLED_BACK
        report.reason, report.message = code, f"{step}: {code}"
        report.streams.total = STREAMS
        report.streams.rolled_back = 0 if refused else STREAMS
        record.add("", "end", end=True)

    def _through(self, record: Record) -> None:
        request, report = record.request, record.report
        target = self.town.agents[request.target_node.name]
        for address in self._addresses(record):
            del self.routes[address]
            target.routes[address] = request.target_pod.uid
        report.phase = pb.PHASE_SUCCEEDED
        report.streams.total = report.streams.migrated = STREAMS
        report.kv.bytes_total = report.kv.bytes_sent = 4096
        report.kv.rounds = 1
        report.hold_ms, report.point_of_no_return_ms = 3.5, 2.0
        for step, _ in STEPS:
            report.steps.add(name=step, took_ms=0.5, outcome="done")
        report.message = f"{STREAMS} streams moved from {self.node} to {request.target_node.name}"
        record.add("", "end", end=True)

    async def restart(self) -> None:
        """Ended jobs are forgotten; open ones go back, or forward when they were committed, as the journal says."""
        await self.stop()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for job_id, record in list(self.records.items()):
            if record.report.phase in ENDED:
                del self.records[job_id]
            elif record.report.phase == pb.PHASE_COMMITTING:
                self._spawn(self._run(record, COMMIT))
            else:
                self._back(record, "agent_restarted", "restart")
        await self.start()


@dataclass
class Town:
    tls: Path
    agents: dict[str, SimulatedAgent] = field(default_factory=dict)
    bare: set[str] = field(default_factory=set)  # pods without a gateway
    failing: dict[str, str] = field(default_factory=dict)  # step -> code
    stops: set[str] = field(default_factory=set)  # jobs wait before these steps
    asked: list[dict[str, Any]] = field(default_factory=list)
    warm: set[tuple[str, str]] = field(default_factory=set)  # (pod, target pod) whose KV has gone ahead
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def gate(self, record: Record, step: str, may_abort: bool) -> None:
        while step in self.stops and not (may_abort and record.abort):
            await self._changed.wait()

    async def do(self, said: dict[str, Any]) -> Any:
        """One command: {"do": NAME, ...}."""
        match said["do"]:
            case "agent":
                agent = self.agents[said["node"]] = SimulatedAgent(self, said["node"], said["address"])
                await agent.start()
            case "pod":
                self.agents[said["node"]].pods.add(said["uid"])
                if said.get("bare"):
                    self.bare.add(said["uid"])
            case "pod-gone":
                agent = self.agents[said["node"]]
                agent.pods.discard(said["uid"])
                agent.routes = {a: u for a, u in agent.routes.items() if u != said["uid"]}
            case "notice":
                agent = self.agents[said["node"]]
                agent.board.instance_id = f"i-{said['node']}"
                end = datetime.now(UTC) + timedelta(seconds=said["left_s"]) if "left_s" in said else None
                details = tuple(sorted(said.get("details", {}).items()))
                agent.board.put(said["kind"], [Said(said["kind"], deadline=end, details=details)])
            case "metadata":
                self.agents[said["node"]].metadata = said["addresses"]
            case "no-notices":
                self.agents[said["node"]].board.standing.clear()
            case "stop-at":
                self.stops = set(said["steps"])
                self.wake()
            case "fail-at":
                self.failing = dict(said["steps"])
            case "restart":
                await self.agents[said["node"]].restart()
            case "die":
                await self.agents[said["node"]].stop()
            case "rise":
                await self.agents[said["node"]].start()
            case "epoch":
                self.agents[said["node"]].epochs[said["what"]] = said["epoch"]
            case "route":
                self.agents[said["node"]].routes[said["address"]] = said["uid"]
            case "lose-route":
                self.agents[said["node"]].routes.pop(said["address"], None)
            case "routes":
                return {name: agent.routes for name, agent in self.agents.items()}
            case "asked":
                return self.asked
            case other:
                raise ValueError(f"no command {other!r}")
        return None


async def main(tls: Path) -> None:
    town = Town(tls)
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("ready", flush=True)
    async for line in reader:
        print(json.dumps({"ok": await town.do(json.loads(line))}), flush=True)
    for agent in town.agents.values():
        await agent.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
