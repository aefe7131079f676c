"""`midstream migrate POD [--to NODE]`, `status`, `plan NODE`, `abort`, `doctor`; installed as `kubectl midstream`, too.

In a cluster they go through the Kubernetes API (cluster.py). With --inventory they speak to the agents themselves:
the operator's word, given by hand, where there is no operator.

Exit status: 0 done, 1 the job did not succeed or a check failed, 2 the command cannot be carried out as given.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_agent.contract.nodes import next_to

from midstream_cli.inventory import Inventory, UsageError

SWITCHOVERS = {"auto": pb.SWITCHOVER_UNSPECIFIED, "wait": pb.SWITCHOVER_WAIT, "steer": pb.SWITCHOVER_STEER}
KV_MODES = {"auto": pb.KV_MODE_AUTO, "copy": pb.KV_MODE_COPY, "replay": pb.KV_MODE_REPLAY}
_PLAIN = ("Pending", "Preparing", "Switching", "Committing", "Succeeded", "Failed", "Aborted")
PHASES = {getattr(pb, f"PHASE_{name.upper()}"): name for name in _PLAIN}
PHASES |= {pb.PHASE_ROLLED_BACK: "RolledBack", pb.PHASE_UNSPECIFIED: "Unknown"}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="midstream", description="move serving pods between nodes while they stream")
    default = os.environ.get("MIDSTREAM_INVENTORY")
    top.add_argument(
        "--inventory",
        type=Path,
        default=Path(default) if default else None,
        help="JSON file of nodes and pods: speak to the agents in it and not to a cluster ($MIDSTREAM_INVENTORY)",
    )
    top.add_argument("-n", "--namespace", default="", help="of the pods; default: the kubeconfig's")
    top.add_argument("--context", help="of the kubeconfig")
    top.add_argument("--kubeconfig", help="default: $KUBECONFIG, ~/.kube/config")
    top.add_argument("--operator-namespace", default="midstream-system", help="where Midstream is installed")
    commands = top.add_subparsers(dest="command", required=True)
    migrate = commands.add_parser("migrate", help="move a pod's streams to another node")
    migrate.add_argument("pod")
    migrate.add_argument("--to", default="", metavar="NODE")
    migrate.add_argument("--target-pod", default="", metavar="POD")
    migrate.add_argument("--address", action="append", default=[], help="only this floating IP (repeatable)")
    migrate.add_argument("--switchover", choices=SWITCHOVERS, default="auto")
    migrate.add_argument("--kv", choices=KV_MODES, default="auto")
    migrate.add_argument(
        "--deadline-s", type=float, default=0.0, help="give up before the point of no return after this"
    )
    migrate.add_argument("--dry-run", action="store_true")
    migrate.add_argument("--report", type=Path, help="write the job's report to this file, as JSON")
    migrate.add_argument("--job", default="", help="job id; the same id again follows the running job")
    migrate.add_argument("--no-wait", action="store_true", help="in a cluster: create the MigrationJob and return")
    attach = commands.add_parser("attach", help="bring a floating IP to a pod (without an operator)")
    attach.add_argument("pod")
    attach.add_argument("address")
    status = commands.add_parser("status", help="jobs, and why one failed or waits")
    status.add_argument("job", nargs="?", default="")
    status.add_argument("-A", "--all-namespaces", action="store_true", help="in a cluster")
    plan = commands.add_parser("plan", help="in a cluster: what a notice would do to a node's streams now")
    plan.add_argument("node")
    plan.add_argument("--seconds", type=int, default=120, help="from the notice to the end of the node; default: 120")
    abort = commands.add_parser("abort", help="stop a job before its point of no return")
    abort.add_argument("job")
    doctor = commands.add_parser("doctor", help="what each node lacks, with the remedy")
    doctor.add_argument("--bundle", type=Path, help="in a cluster: also write this .tar.gz for whoever helps you")
    return top


def job_request(inventory: Inventory, args: argparse.Namespace) -> tuple[str, pb.MigrateRequest]:
    """The source node's endpoint, and what to ask it."""
    pod = inventory.pod(args.pod)
    if not args.to and not args.target_pod:
        raise UsageError("say where to: --to NODE or --target-pod POD")
    target = inventory.target(pod, args.to, args.target_pod)
    request = pb.MigrateRequest(
        job_id=args.job or f"{pod.name}-{secrets.token_hex(4)}",
        epoch=time.time_ns() // 1_000_000,
        pod=pod.ref,
        target_pod=target.ref,
        target_node=inventory.node(target.node),
        addresses=args.address,
        switchover=SWITCHOVERS[args.switchover],
        kv_mode=KV_MODES[args.kv],
        deadline_unix_ms=int((time.time() + args.deadline_s) * 1000) if args.deadline_s else 0,
        dry_run=args.dry_run,
    )
    return pod.node, request


def connect(inventory: Inventory, node: str) -> aio.Channel:
    """A channel to the node's agent, with the operator's certificate."""
    try:
        files = [p.read_bytes() for p in (inventory.ca, inventory.key, inventory.cert)]
    except OSError as e:
        raise UsageError(f"cannot read the TLS files that the inventory names: {e}") from e
    options = [("grpc.ssl_target_name_override", node), ("grpc.enable_http_proxy", 0)]
    return aio.secure_channel(inventory.node(node).endpoint, grpc.ssl_channel_credentials(*files), options)


async def migrate(inventory: Inventory, args: argparse.Namespace, out: Callable[[str], Any] = print) -> int:
    node, request = job_request(inventory, args)
    out(f"job {request.job_id}: {args.pod} from {node} to {request.target_node.name}")
    async with connect(inventory, node) as channel:
        report: pb.JobReport | None = None
        async for event in rpc.AgentStub(channel).Migrate(request):
            if event.HasField("report"):
                report = event.report
            else:
                out(f"  {event.at_ms:9.2f} ms  {event.step:<13} {event.what:<8} {event.message}".rstrip())
    if report is None:
        out("the agent ended the call without a report: ask `midstream status`")
        return 1
    _print_report(report, out)
    if args.report:
        args.report.write_text(json_format.MessageToJson(report), encoding="utf-8")
    return 0 if report.phase == pb.PHASE_SUCCEEDED else 1


def _print_report(report: pb.JobReport, out: Callable[[str], Any]) -> None:
    counts = report.streams
    out(f"{PHASES[report.phase]}{f' ({report.reason})' if report.reason else ''}: {report.message}")
    reasons = f" ({', '.join(report.unmovable_reasons)})" if report.unmovable_reasons else ""
    out(
        f"  streams: {counts.total} total, {counts.migrated} migrated, {counts.rolled_back} rolled back, "
        f"{counts.unmovable} unmovable{reasons}, {counts.lost} lost"
    )
    if report.kv.bytes_total:
        out(f"  KV: {_kv(report.kv)}")


def _kv(kv: pb.KvCounts) -> str:
    text = f"{kv.bytes_total / 1e6:.1f} MB, {kv.bytes_sent / 1e6:.1f} sent, {kv.bytes_shared / 1e6:.1f} shared"
    again = f", {kv.blocks_recomputed} blocks computed again" if kv.blocks_recomputed else ""
    return f"{text}{again}{f' ({kv.reason})' if kv.reason else ''}"


async def status(inventory: Inventory, args: argparse.Namespace, out: Callable[[str], Any] = print) -> int:
    found = 0
    for node in inventory.endpoints:
        async with connect(inventory, node) as channel:
            reply = await rpc.AgentStub(channel).Status(pb.StatusRequest())
        for report in reply.jobs:
            if args.job in ("", report.job_id):
                found += 1
                way = f"{report.source_node} -> {report.target_node}"
                why = f"{report.reason}: {report.message}" if report.reason else report.message
                out(f"{report.job_id:<28} {PHASES[report.phase]:<11} {way}  {why}")
    if args.job and not found:
        out(f"no agent knows job {args.job}")
    return 0 if found or not args.job else 1


async def attach(inventory: Inventory, args: argparse.Namespace, out: Callable[[str], Any] = print) -> int:
    """Have the pod's agent plumb the address and announce it; the pool's owner has assigned it to the node."""
    pod = inventory.pod(args.pod)
    epoch = time.time_ns() // 1_000_000
    request = pb.AttachAddressRequest(pod=pod.ref, address=args.address, announce=True, epoch=epoch)
    async with connect(inventory, pod.node) as channel:
        await rpc.AgentStub(channel).AttachAddress(request)
    out(f"{args.address} leads to {pod.name} on {pod.node}")
    return 0


async def abort(inventory: Inventory, args: argparse.Namespace, out: Callable[[str], Any] = print) -> int:
    for node in inventory.endpoints:
        async with connect(inventory, node) as channel:
            try:
                reply = await rpc.AgentStub(channel).Abort(pb.AbortRequest(job_id=args.job))
            except aio.AioRpcError as e:
                if "unknown_job" in (e.details() or ""):
                    continue
                raise
        out(reply.message)
        return 0 if reply.accepted else 1
    out(f"no agent knows job {args.job}")
    return 1


async def doctor(inventory: Inventory, args: argparse.Namespace, out: Callable[[str], Any] = print) -> int:
    bad = 0
    for node in inventory.endpoints:
        peers = [pb.NodeRef(name=n, endpoint=inventory.endpoints[n]) for n in next_to(node, inventory.endpoints)]
        try:
            async with connect(inventory, node) as channel:
                reply = await rpc.AgentStub(channel).Doctor(pb.DoctorRequest(peers=peers))
        except aio.AioRpcError as e:
            out(f"{node}: error agent: {e.details()}; remedy: is the agent running at {inventory.endpoints[node]}?")
            bad += 1
            continue
        for f in reply.findings:
            bad += f.severity == "error"
            out(f"{node}: {f.severity:<7} {f.check}: {f.message}{'; remedy: ' + f.remedy if f.remedy else ''}")
    return 1 if bad else 0


async def plan(inventory: Inventory, args: argparse.Namespace, out: Callable[[str], Any] = print) -> int:
    raise UsageError("the planner is the operator's: without a cluster say where to with `migrate POD --to NODE`")


COMMANDS = {
    "migrate": migrate, "attach": attach, "status": status, "plan": plan, "abort": abort, "doctor": doctor,
}  # fmt: skip


def _said(e: aio.AioRpcError) -> str:
    """What an agent answered, or that none did."""
    details = e.details() or str(e.code())
    if e.code() == grpc.StatusCode.UNAVAILABLE and "connect" in details:
        return f"no agent answers ({details}): is it running on that node? Its log says why not; try `midstream doctor`"
    return f"the agent refused: {details}"


async def _command(args: argparse.Namespace) -> int:
    if args.inventory is not None:
        return await COMMANDS[args.command](Inventory.load(args.inventory), args)
    try:
        from midstream_cli import cluster
    except ImportError as e:
        raise UsageError(f"{e}: pip install 'midstream[operator]', or give --inventory") from e
    return await cluster.run(args)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return asyncio.run(_command(args))
    except UsageError as e:
        print(f"midstream: {e}", file=sys.stderr)
        return 2
    except aio.AioRpcError as e:
        print(f"midstream: {_said(e)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
