"""What the operator makes of the agents' figures: nothing is invented, and what is assumed is said."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from midstream_agent.contract import agent_pb2 as pb
from midstream_operator import planning
from midstream_operator.context import Context
from midstream_operator.errors import Retryable
from midstream_operator.plan_model import Switchover
from midstream_operator.planning import NodeFacts, Reckoning
from midstream_operator.settings import Settings
from midstream_operator.view import Pod

MIB = 1 << 20


def pod(name: str, node: str) -> Pod:
    return Pod("llms", name, f"uid-{name}", node, {}, True, None, False, "llm", "Running")


A, B = pod("llm-0", "a"), pod("llm-1", "b")


def stream(n: int, kv_bytes: int = 64 * MIB, movable: bool = True, reason: str = "") -> pb.StreamFigures:
    return pb.StreamFigures(
        id=str(n), address="10.0.0.1", movable=movable, reason=reason, tokens=2000, kv_bytes=kv_bytes
    )


@dataclass
class Agents:
    """In place of gRPC: answers by pod, an error where there is none."""

    told: Mapping[str, pb.SurveyReply] = field(default_factory=dict)

    async def survey(self, node: str, ref: pb.PodRef, timeout_s: float) -> pb.SurveyReply:
        if ref.name not in self.told:
            raise Retryable("agent_unreachable", f"the agent on {node} does not answer")
        return self.told[ref.name]


def context(told: Mapping[str, pb.SurveyReply]) -> Context:
    return cast(Context, SimpleNamespace(settings=Settings(), agents=Agents(told), providers={}))


def reckon(told: Mapping[str, pb.SurveyReply], left_s: float | None = 115.0, **more: Any) -> Reckoning:
    deadline = None if left_s is None else datetime.now(UTC) + timedelta(seconds=left_s)
    options = {"switchover": Switchover.STEER, "by_api": True, "sharing": 1, **more}
    return asyncio.run(planning.for_job(context(told), A, B, deadline, **options))


ROOMY = pb.SurveyReply(pool_bytes=1 << 30, pool_free_bytes=1 << 30)


def test_figures_become_a_plan_and_assumptions_are_named() -> None:
    made = reckon({"llm-0": pb.SurveyReply(streams=[stream(1), stream(2)]), "llm-1": ROOMY})
    assert "2 streams move with 128.0 MiB of KV at 119.2 MiB/s" in made.words
    assert "assumed: 119.2 MiB/s out of a" in made.words and "assumed: a prefill of 1000 tokens/s" in made.words
    assert not made.replay


def test_what_was_measured_is_not_assumed() -> None:
    source = pb.SurveyReply(streams=[stream(1)], kv_bytes_per_s=512 * MIB)
    words = reckon({"llm-0": source, "llm-1": ROOMY}).words
    assert "at 512.0 MiB/s" in words and "MiB/s out of a" not in words


def test_jobs_of_one_node_share_its_way_out() -> None:
    source = pb.SurveyReply(streams=[stream(1)], kv_bytes_per_s=512 * MIB)
    assert "at 128.0 MiB/s" in reckon({"llm-0": source, "llm-1": ROOMY}, sharing=4).words


def test_without_time_for_a_copy_the_tokens_are_replayed() -> None:
    """The agents keep 15 s between a copy and the deadline: the plan says what they will do."""
    made = reckon({"llm-0": pb.SurveyReply(streams=[stream(1)]), "llm-1": ROOMY}, left_s=14.0)
    assert made.replay and "1 replay their tokens" in made.words and "is given up before any connection" in made.words


def test_a_target_that_tells_nothing_gets_no_kv_planned() -> None:
    made = reckon({"llm-0": pb.SurveyReply(streams=[stream(1)])})
    assert "assumed: no room for KV in llm-1, which told nothing: agent_unreachable" in made.words
    assert not made.replay, "the agents know better: they ask it before anything is frozen"


@pytest.mark.parametrize(
    ("pool_free", "share", "fits"), [(1 << 30, None, True), (1 << 30, 0.01, False), (32 * MIB, 0.9, False)]
)
def test_the_tighter_of_pool_and_engine_counts(pool_free: int, share: float | None, fits: bool) -> None:
    room = pb.SurveyReply(pool_bytes=1 << 30, pool_free_bytes=pool_free, load_known=share is not None)
    room.kv_free_share = share or 0.0
    words = reckon({"llm-0": pb.SurveyReply(streams=[stream(1)]), "llm-1": room}).words
    assert ("1 streams move with 64.0 MiB" in words) is fits


def test_a_source_that_tells_nothing_is_said() -> None:
    assert "no figures of llm-0 (agent_unreachable" in reckon({"llm-1": ROOMY}).words


def test_figures_that_make_no_sense_do_not_stop_the_move() -> None:
    made = reckon({"llm-0": pb.SurveyReply(streams=[stream(1), stream(1)]), "llm-1": ROOMY})
    assert made.words == "no plan, the pods' figures make no sense: two streams of a have one name"
    assert not made.replay


def test_without_a_deadline_there_is_nothing_to_give_up() -> None:
    words = reckon({"llm-0": pb.SurveyReply(streams=[stream(1), stream(2)]), "llm-1": ROOMY}, left_s=None).words
    assert words.startswith("no deadline: 2 streams with 128.0 MiB of KV, about 1.1 s")


def test_streams_that_cannot_move_are_named() -> None:
    source = pb.SurveyReply(streams=[stream(1), stream(2, movable=False, reason="kernel TLS")])
    words = reckon({"llm-0": source, "llm-1": ROOMY}).words
    assert "1 streams cannot move: kernel TLS" in words and "1 streams move with" in words


def test_addresses_that_agents_announce_take_no_calls() -> None:
    told = {"llm-0": pb.SurveyReply(streams=[stream(1)]), "llm-1": ROOMY}
    assert "EC2 calls" in reckon(told).words and "EC2 calls" not in reckon(told, by_api=False).words


def node_plan(told: Mapping[str, pb.SurveyReply], takers: list[Pod], seconds: float = 120) -> str:
    facts = NodeFacts("a", [A], {A.uid: takers}, True)
    return asyncio.run(planning.for_node(context(told), facts, seconds))


def test_a_node_is_planned_at_any_time() -> None:
    text = node_plan({"llm-0": pb.SurveyReply(streams=[stream(1)]), "llm-1": ROOMY}, [B])
    assert text.startswith("plan for a (Steer), 120 s before its deadline")
    assert "llm-0/1" in text and "MoveKV" in text and "llm-1" in text and "assumed: 119.2 MiB/s" in text


def test_a_node_whose_streams_nobody_takes_says_so() -> None:
    text = node_plan({"llm-0": pb.SurveyReply(streams=[stream(1)])}, [])
    assert "nobody can take over from llm-0" in text and "no target: no other Ready pod" in text


def test_a_node_with_nothing_to_move_says_so() -> None:
    text = asyncio.run(planning.for_node(context({}), NodeFacts("a", [], {}, True), 120))
    assert text == "nothing to move: no pod with a floating address runs on a"
