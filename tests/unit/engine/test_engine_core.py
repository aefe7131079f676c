"""Sampling, ends of answers, admission and slots, in this process without a socket."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from midstream_runtime.contract.errors import Final
from midstream_runtime.engine.protocol import EngineState, SamplingParams, TokenEvent

TINY = Path(__file__).resolve().parents[3] / "runtime/midstream_runtime/engine/builtin/tiny"
TEXT = "It is a truth universally acknowledged, that"


@pytest.fixture
def build(torch: ModuleType) -> Any:
    from midstream_runtime.engine.builtin.load import build

    def start(pool_slots: int = 128, **options: Any) -> Any:
        core, _ = build(TINY, pool_slots=pool_slots, **options)
        return core

    return start


def run(core: Any) -> dict[str, list[TokenEvent]]:
    answers: dict[str, list[TokenEvent]] = {}
    while not core.idle:
        for name, event in core.step():
            answers.setdefault(name, []).append(event)
        core.seal_blocks()
    return answers


def answer(core: Any, text: str = TEXT, **params: Any) -> list[TokenEvent]:
    core.add("a", [core.tokenizer.bos_id, *core.tokenizer.encode(text)], SamplingParams(**params))
    return run(core)["a"]


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


def shown(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_answer_ends_at_max_tokens_and_reports_its_usage(build: Any) -> None:
    core = build()
    events = answer(core, max_tokens=7, temperature=0.0)
    assert len(events) == 7
    assert [event.finish_reason for event in events] == [None] * 6 + ["length"]
    prompt = 1 + len(core.tokenizer.encode(TEXT))
    assert events[-1].usage == (prompt, 7, prompt, 0)
    assert core.pool.free_slots == core.pool.layout.slots


def test_answer_ends_with_the_end_token_unless_it_is_ignored(build: Any) -> None:
    core = build(pool_slots=512)
    prompt = "The train left the station and"
    ending = answer(core, prompt, max_tokens=2000, temperature=0.0)
    assert ending[-1].finish_reason == "stop"
    assert ending[-1].token_id == core.tokenizer.eos_id
    assert ending[-1].text == ""
    going_on = answer(core, prompt, max_tokens=len(ending) + 5, temperature=0.0, ignore_eos=True)
    assert ids(going_on)[: len(ending)] == ids(ending)
    assert going_on[-1].finish_reason == "length"


def test_stop_string_across_tokens_ends_the_answer_and_is_not_shown(build: Any) -> None:
    core = build()
    whole = shown(answer(core, max_tokens=40, temperature=0.0))
    stop = whole[30:41]
    events = answer(core, max_tokens=40, temperature=0.0, stop=(stop,))
    assert shown(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"


def test_held_back_text_travels_with_the_state(build: Any) -> None:
    """A move at every position of an answer in which a stop string has just begun."""
    core = build()
    whole = shown(answer(core, max_tokens=40, temperature=0.0))
    stop = whole[20:34]
    params = SamplingParams(max_tokens=40, temperature=0.0, stop=(stop, "never comes"))
    held = set()
    for position in range(1, 12):
        core.add("a", [core.tokenizer.bos_id, *core.tokenizer.encode(TEXT)], params)
        text = ""
        for _ in range(position):
            text += shown([event for _, event in core.step()])
        if not core.requests:
            break
        state = EngineState.from_json(core.pause(["a"])["a"].to_json())
        held.add(state.held_text)
        core.drop(["a"])
        core.add_state("a", state.with_slots([None] * len(state.kv)))
        assert text + shown(run(core)["a"]) == whole[: whole.index(stop)]
    assert len(held) > 2, "no move met held-back text"


def test_seed_decides_a_sampled_answer(build: Any) -> None:
    core = build()
    first, again, other = (
        ids(answer(core, max_tokens=30, temperature=1.0, seed=seed, ignore_eos=True)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_without_a_seed_answers_differ_and_the_state_knows_the_seed(build: Any) -> None:
    core = build()
    prompt = core.tokenizer.encode(TEXT)
    params = SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True)
    core.add("a", prompt, params)
    core.add("b", prompt, params)
    for _ in range(10):
        core.step()
    states = core.pause(["a", "b"])
    assert states["a"].generated_ids != states["b"].generated_ids
    core.drop(["a"])
    core.add(
        "a", prompt, SamplingParams(max_tokens=10, temperature=1.0, ignore_eos=True, seed=states["a"].seed)
    )
    core.drop(["b"])
    assert ids(run(core)["a"]) == states["a"].generated_ids[:10]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}], ids=["top_k", "top_p"])
def test_narrowest_sampling_is_greedy(build: Any, narrow: dict[str, Any]) -> None:
    core = build()
    greedy = ids(answer(core, max_tokens=30, temperature=0.0, ignore_eos=True))
    assert ids(answer(core, max_tokens=30, temperature=1.5, seed=1, ignore_eos=True, **narrow)) == greedy


def test_frequency_penalty_keeps_tokens_from_coming_again(build: Any) -> None:
    core = build()
    plain: dict[str, Any] = {
        "max_tokens": 60,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
    }
    looping = ids(answer(core, **plain))
    varied = ids(answer(core, **plain, frequency_penalty=100.0))
    assert len(set(varied)) == 60
    assert len(set(looping)) < 50


def test_logprobs_are_of_the_chosen_token(build: Any) -> None:
    core = build()
    events = answer(core, max_tokens=5, temperature=0.0, logprobs=True, repetition_penalty=1.0)
    assert all(event.logprob is not None and -20 < event.logprob <= 0 for event in events)
    assert answer(core, max_tokens=1, temperature=0.0)[0].logprob is None


def test_small_pool_serves_all_in_the_end(build: Any) -> None:
    """Twelve answers of 8 blocks in a pool of 20: some wait, some lose their slots and are computed again."""
    roomy, tight = build(pool_slots=256), build(pool_slots=20)
    for core in (roomy, tight):
        for index in range(12):
            params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
            core.add(str(index), core.tokenizer.encode(f"{TEXT} {index}"), params)
    expected, got = run(roomy), run(tight)
    assert {name: ids(events) for name, events in got.items()} == {
        name: ids(events) for name, events in expected.items()
    }
    assert tight.totals["preempted"] > 0, "the pool was not tight enough to see anything"
    assert tight.pool.free_slots == 20


def test_drop_gives_back_lanes_and_slots_in_every_phase(build: Any) -> None:
    core = build(max_running=2)
    for name in "abcd":
        core.add(name, core.tokenizer.encode(TEXT), SamplingParams(max_tokens=50))
    core.step()
    core.pause(["a", "d"])
    assert core.stats()["paused"] == 2
    core.drop(["a", "b", "c", "d", "unknown"])
    assert core.idle
    assert core.pool.free_slots == core.pool.layout.slots
    assert len(answer(core, max_tokens=5, temperature=0.0)) == 5


def test_pause_in_the_middle_of_a_prefill_carries_what_is_done(build: Any) -> None:
    core = build()
    prompt = core.tokenizer.encode(TEXT * 20)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    core.add("a", prompt, params)
    expected = ids(run(core)["a"])
    core.add("a", prompt, params)
    assert core.step() == []
    state = core.pause(["a"])["a"]
    done = sum(block.tokens for block in state.kv)
    assert 0 < done < len(prompt)
    core.resume(["a"])
    events = run(core)["a"]
    assert ids(events) == expected
    assert events[-1].usage is not None
    assert events[-1].usage.prefill_tokens == len(prompt)


@pytest.mark.parametrize(
    ("prompt", "params", "code"),
    [
        ([], {}, "empty_prompt"),
        ([5000], {}, "bad_token"),
        ([1] * 9000, {}, "context_full"),
        ([1], {"max_tokens": 0}, "bad_params"),
        ([1], {"top_p": 0.0}, "bad_params"),
        ([1], {"max_tokens": 5000}, "pool_too_small"),
    ],
)
def test_what_can_never_work_is_refused_by_name(
    build: Any, prompt: list[int], params: dict[str, Any], code: str
) -> None:
    core = build()
    with pytest.raises(Final, match=code):
        core.add("a", prompt, SamplingParams(**params))
    assert core.idle
    assert not core.requests


def test_model_folder_without_a_model_is_refused(torch: ModuleType, tmp_path: Path) -> None:
    from midstream_runtime.engine.builtin.load import build

    with pytest.raises(Final, match="bad_model"):
        build(tmp_path, pool_slots=4)
