"""What an agent and a pod say to each other first, and what two pods must have in common."""

from __future__ import annotations

from typing import Any

from midstream_runtime.contract import handoff as wire
from midstream_runtime.contract.errors import Final

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.handoff import HandoffClient


async def greet(handoff: HandoffClient | None, node: str) -> Any:
    """Say hello to a pod; refuse by name one that speaks another protocol."""
    assert handoff is not None
    answer = await handoff.ask("hello", {"version": wire.VERSION, "min_version": wire.MIN_VERSION, "node": node})
    version, minimum = answer.header.get("version", 0), answer.header.get("min_version", 0)
    if version < wire.MIN_VERSION or minimum > wire.VERSION:
        answer.close()
        raise Final(
            "handoff_version",
            f"the pod speaks handoff {minimum}..{version}, this agent {wire.MIN_VERSION}..{wire.VERSION}: "
            "use matching runtime and agent images",
        )
    return answer


def fingerprint_of(header: dict[str, Any]) -> str:
    model = header.get("model") or {}
    return str(model.get("fingerprint", ""))


def pool_fingerprint_of(header: dict[str, Any]) -> str:
    pool = header.get("pool") or {}
    return str(pool.get("fingerprint", ""))


def check_same_software(hello: dict[str, Any], req: pb.PeerPrepare) -> None:
    if hello.get("pod_kind", "") != req.pod_kind:
        raise Final("target_kind", f"the target pod is a {hello.get('pod_kind')!r}, the source a {req.pod_kind!r}")
    if fingerprint_of(hello) != req.model_fingerprint:
        raise Final(
            "target_model", "the target pod serves another model (or other weights): choose a pod of the same workload"
        )


def check_mtu(ours_bytes: int, theirs_bytes: int) -> None:
    """Both ends of a stream have agreed on segments that fit the source's NIC."""
    if ours_bytes < theirs_bytes:
        raise Final(
            "mtu_smaller",
            f"the target's NIC has an MTU of {ours_bytes} bytes, the source's {theirs_bytes}: segments of its streams "
            "would not fit; choose another target, or give both the same (--mtu)",
        )


def listening_ports(hello: dict[str, Any]) -> set[int]:
    return {int(x["port"]) for x in hello.get("listeners", [])}


async def fds_of(handoff: HandoffClient, job_id: str) -> list[int]:
    """The job's sockets once more from the pod; none when the pod does not know the job (any more)."""
    try:
        answer = await handoff.ask("fds", {"job": job_id})
    except Final as e:
        if e.code != "unknown_job":
            raise
        return []
    return answer.take_fds()
