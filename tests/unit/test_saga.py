"""The saga's loop: order of steps and undos, what is journalled, what is retried."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from midstream_agent import failpoints, saga
from midstream_agent.journal import Journal
from midstream_runtime.contract.errors import Final, Retryable


@dataclass
class Ctx:
    journal: Journal
    side: str = "source"
    log: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    fail: dict[str, Exception] = field(default_factory=dict)
    abort: bool = False

    def note(self, step: str, what: str, message: str = "") -> None:
        self.notes.append((step, what))

    def check_abort(self) -> None:
        if self.abort:
            raise Final("aborted", "stop")

    def act(self, name: str) -> None:
        self.log.append(name)
        if (error := self.fail.pop(name, None)) is not None:
            raise error


def step(name: str, final: bool = False) -> saga.Step[Ctx]:
    async def do(ctx: Ctx) -> None:
        ctx.act(f"{name}.do")

    async def undo(ctx: Ctx) -> None:
        ctx.act(f"{name}.undo")

    return saga.Step(name, do, None if final else undo)


STEPS = (step("A"), step("B"), step("C"), step("COMMIT", final=True), step("RELEASE", final=True))


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[Ctx]:
    journal = Journal.create(tmp_path, "source", "j", {})
    yield Ctx(journal)
    journal.close()


def run(ctx: Ctx) -> saga.Clock:
    clock = saga.Clock()
    asyncio.run(saga.run(STEPS, ctx, clock))
    return clock


def test_all_steps_run_in_order_and_leave_their_timing(ctx: Ctx) -> None:
    clock = run(ctx)
    assert ctx.log == ["A.do", "B.do", "C.do", "COMMIT.do", "RELEASE.do"]
    assert [(t.name, t.outcome) for t in clock.steps] == [(s.name, "done") for s in STEPS]


@pytest.mark.parametrize("failing", ["A", "B", "C"])
def test_a_failure_before_commit_undoes_the_failed_step_and_all_before_it_in_reverse(ctx: Ctx, failing: str) -> None:
    ctx.fail[f"{failing}.do"] = Final("broken", "no")
    with pytest.raises(saga.Failed) as e:
        run(ctx)
    begun = ["A", "B", "C"][: "ABC".index(failing) + 1]
    assert ctx.log == [f"{n}.do" for n in begun] + [f"{n}.undo" for n in reversed(begun)]
    assert (e.value.step, e.value.cause.code) == (failing, "broken")
    assert ctx.journal.decided("ABORT") is not None


def test_commit_is_retried_and_never_undone(ctx: Ctx) -> None:
    ctx.fail["COMMIT.do"] = Retryable("peer_unreachable", "later")
    run(ctx)
    assert ctx.log == ["A.do", "B.do", "C.do", "COMMIT.do", "COMMIT.do", "RELEASE.do"]
    assert ctx.journal.decided("ABORT") is None


def test_an_undo_that_fails_for_now_is_tried_again(ctx: Ctx) -> None:
    ctx.fail = {"B.do": Final("broken", "no"), "B.undo": Retryable("later", "later")}
    with pytest.raises(saga.Failed):
        run(ctx)
    assert ctx.log == ["A.do", "B.do", "B.undo", "B.undo", "A.undo"]


def test_an_undo_that_fails_for_good_does_not_keep_the_others_from_being_undone(ctx: Ctx) -> None:
    ctx.fail = {"B.do": Final("broken", "no"), "B.undo": Final("stuck", "cannot")}
    with pytest.raises(saga.Failed):
        run(ctx)
    assert ctx.log == ["A.do", "B.do", "B.undo", "A.undo"]
    assert ("B", "undo failed") in ctx.notes


def test_abort_takes_effect_between_two_steps(ctx: Ctx) -> None:
    ctx.abort = True
    with pytest.raises(saga.Failed):
        run(ctx)
    assert ctx.log == ["A.undo"]


def test_intent_is_in_the_journal_before_the_act(ctx: Ctx) -> None:
    ctx.fail["B.do"] = Final("broken", "no")
    with pytest.raises(saga.Failed):
        run(ctx)
    assert ctx.journal.began("B") and not ctx.journal.began("C")


def test_a_failpoint_fires_once_and_tells_where(ctx: Ctx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "failpoints"
    monkeypatch.setenv("MIDSTREAM_FAILPOINT_LOG", str(log))
    failpoints.arm("source.B.do.after=error")
    with pytest.raises(saga.Failed) as e:
        run(ctx)
    assert e.value.cause.code == "failpoint"
    assert log.read_text() == "source.B.do.after\n"
    assert failpoints.names() == []


def test_an_unknown_failpoint_action_is_refused() -> None:
    with pytest.raises(ValueError, match="kill, error, hang, wait or delay"):
        failpoints.arm("source.B.do.after=explode")


def test_a_failpoint_that_waits_goes_on_as_it_is_armed_next(
    ctx: Ctx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "arm"
    monkeypatch.setenv("MIDSTREAM_FAILPOINT_FILE", str(file))
    monkeypatch.setenv("MIDSTREAM_FAILPOINT_LOG", str(tmp_path / "fired"))
    failpoints.arm("source.B.do.before=wait")

    async def step_by_step() -> None:
        job = asyncio.create_task(saga.run(STEPS, ctx, saga.Clock()))
        while not (tmp_path / "fired").exists():
            await asyncio.sleep(0)
        assert ctx.log == ["A.do"]
        file.write_text("source.B.do.before=error")
        with pytest.raises(saga.Failed) as e:
            await job
        assert e.value.step == "B" and not file.exists()

    asyncio.run(step_by_step())
    assert "B.do" not in ctx.log
