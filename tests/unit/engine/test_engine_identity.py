"""An answer depends on its prompt alone: not on the batch, the way its KV came to be, or a move.

Runs the engine's core in this process, on Debian's torch. The full measurement (`MIDSTREAM_LONG=1`) takes
minutes; its short form runs always."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from midstream_runtime.engine.protocol import EngineState, KvBlock, SamplingParams

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "runtime/midstream_runtime/engine/builtin/tiny"
LONG = bool(os.environ.get("MIDSTREAM_LONG"))
PROMPTS = 64
TOKENS = 400 if LONG else 60
OPENINGS = (
    "Emma was",
    "It is a truth",
    "The carriage",
    "My dear Fanny,",
    "No one",
    "She had",
    "1 2 3",
    "\u00e9t\u00e9 \U0001f600",
)


@pytest.fixture
def build(torch: ModuleType) -> Any:
    from midstream_runtime.engine.builtin.load import build

    def start(**options: Any) -> Any:
        core, _ = build(TINY, **{"pool_slots": PROMPTS * (TOKENS + 64) // 16 + 64, **options})
        return core

    return start


def params(index: int, tokens: int = TOKENS) -> SamplingParams:
    """Greedy with and without the penalty, and seeded sampling, in turns."""
    if index % 4 == 3:
        return SamplingParams(max_tokens=tokens, temperature=0.9, top_p=0.95, seed=index, ignore_eos=True)
    penalty = 1.0 if index % 4 == 2 else None
    return SamplingParams(max_tokens=tokens, temperature=0.0, repetition_penalty=penalty, ignore_eos=True)


def prompt(core: Any, index: int) -> list[int]:
    text = f"{OPENINGS[index % len(OPENINGS)]} {index} " + "and so on " * (index % 7)
    return [core.tokenizer.bos_id, *core.tokenizer.encode(text)]


def finish(core: Any, steps: int | None = None) -> dict[str, list[int]]:
    """Runs until idle, or for some steps; tokens by request."""
    answers: dict[str, list[int]] = {}
    while not core.idle and steps != 0:
        for name, event in core.step():
            answers.setdefault(name, []).append(event.token_id)
        core.seal_blocks()
        steps = None if steps is None else steps - 1
    return answers


def alone(core: Any, index: int) -> list[int]:
    core.add("alone", prompt(core, index), params(index))
    return finish(core)["alone"]


def in_batch(core: Any) -> dict[int, list[int]]:
    for index in range(PROMPTS):
        core.add(str(index), prompt(core, index), params(index))
    return {int(name): answer for name, answer in finish(core).items()}


def test_same_answer_alone_and_among_others(build: Any) -> None:
    core = build()
    answers = in_batch(core)
    for index in range(PROMPTS if LONG else 16):
        assert alone(core, index) == answers[index], f"prompt {index} has another answer when it is alone"


def carried(state: EngineState, source: Any, target: Any) -> EngineState:
    slots = target.pool.reserve(len(state.kv))
    for block, slot in zip(state.kv, slots, strict=True):
        target.pool.view.slot(slot)[:] = source.pool.view.slot(block.slot)
    return state.with_slots(slots)


@pytest.mark.parametrize("with_kv", [True, False], ids=["kv moved", "kv recomputed"])
def test_same_answer_after_many_moves_of_a_whole_batch(build: Any, with_kv: bool) -> None:
    cores = [build(), build()]
    expected = in_batch(cores[0])
    answers: dict[int, list[int]] = {index: [] for index in range(PROMPTS)}
    source, target = cores
    for index in range(PROMPTS):
        source.add(str(index), prompt(source, index), params(index))
    while source.requests:
        for name, tokens in finish(source, steps=23).items():
            answers[int(name)] += tokens
        for name, state in source.pause(list(source.requests)).items():
            moved = EngineState.from_json(state.to_json())
            moved = carried(moved, source, target) if with_kv else moved.with_slots([None] * len(moved.kv))
            target.add_state(name, moved)
        source.drop(list(source.requests))
        assert source.pool.free_slots == source.pool.layout.slots
        source, target = target, source
    assert answers == expected


def test_same_answer_for_other_block_sizes_and_prefill_chunks(build: Any) -> None:
    core, wide = build(), build(block_tokens=32)
    object.__setattr__(wide.settings, "prefill_tokens", 5)
    for index in range(8):
        assert alone(core, index) == alone(wide, index)


def test_same_answer_when_a_step_is_abandoned(build: Any) -> None:
    from midstream_runtime.engine.builtin.model import Interrupted

    core = build()
    expected = alone(core, 1)
    core.add("disturbed", prompt(core, 1), params(1))
    answer: list[int] = []
    polls = 0

    def interrupted() -> bool:
        nonlocal polls
        polls += 1
        return polls % 5 == 0

    while not core.idle:
        try:
            answer += [event.token_id for _, event in core.step(interrupted)]
        except Interrupted:
            continue
    assert answer == expected


def test_same_answer_with_the_kv_mirrored_on_a_device(build: Any) -> None:
    """The CUDA path's copies, on the CPU."""
    plain, mirrored, other = build(), build(mirror=True), build(mirror=True)
    expected = alone(plain, 1)
    assert alone(mirrored, 1) == expected
    mirrored.add("moved", prompt(mirrored, 1), params(1))
    head = finish(mirrored, steps=30)["moved"]
    state = mirrored.pause(["moved"])["moved"]
    other.add_state("moved", carried(state, mirrored, other))
    assert head + finish(other)["moved"] == expected
    assert other.totals["prefill_tokens"] == 0


def test_zeroed_kv_changes_the_answer(build: Any) -> None:
    """The negative control: without it the tests above would pass for an engine that ignores the slots."""
    source, target = build(), build()
    changed = 0
    for index in range(8):
        expected = alone(source, index)
        source.add("moved", prompt(source, index), params(index))
        head = finish(source, steps=TOKENS // 2)["moved"]
        moved = carried(source.pause(["moved"])["moved"], source, target)
        source.drop(["moved"])
        for block in moved.kv:
            target.pool.view.slot(block.slot)[:] = bytes(target.pool.layout.slot_bytes)
        target.add_state("moved", moved)
        changed += head + finish(target)["moved"] != expected
    assert changed == 8


def test_flipped_byte_is_seen_by_the_checksum(build: Any) -> None:
    core = build()
    core.add("moved", prompt(core, 0), params(0))
    finish(core, steps=40)
    state = core.pause(["moved"])["moved"]
    for block in state.kv:
        assert isinstance(block, KvBlock) and block.slot is not None
        assert core.pool.view.checksum_hex(block.slot) == core.pool.view.actual_checksum(block.slot).hex()
    damaged = core.pool.view.slot(state.kv[1].slot)
    damaged[100] ^= 1
    assert core.pool.view.info(state.kv[1].slot).checksum != core.pool.view.actual_checksum(state.kv[1].slot)


def test_paged_logits_are_the_dense_model_s(torch: ModuleType) -> None:
    """Greedy choices of the paged decoder against all positions at once in float64, with exact KV."""
    from midstream_runtime.engine.builtin.dense import dense_logits
    from midstream_runtime.engine.builtin.load import build
    from midstream_runtime.engine.builtin.weights import ModelConfig, load_weights

    core, _ = build(TINY, pool_slots=64, kv_dtype="float64")
    ids = prompt(core, 5)
    core.add(
        "a", ids, SamplingParams(max_tokens=100, temperature=0.0, repetition_penalty=1.0, ignore_eos=True)
    )
    answer = finish(core)["a"]
    weights = {name: tensor.double() for name, tensor in load_weights(TINY / "model.safetensors").items()}
    logits = dense_logits(ModelConfig.load(TINY / "config.json"), weights, torch.tensor([ids + answer]))[0]
    best = logits.float().argmax(-1).tolist()
    assert best[len(ids) - 1 : -1] == answer


def test_weights_are_a_llama_to_transformers(torch: ModuleType) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="no transformers: pip install transformers torch"
    )
    from midstream_runtime.engine.builtin.dense import dense_logits
    from midstream_runtime.engine.builtin.tokenizer import Tokenizer
    from midstream_runtime.engine.builtin.weights import ModelConfig, load_weights

    reference = transformers.LlamaForCausalLM.from_pretrained(TINY, torch_dtype=torch.float64).eval()
    weights = {name: tensor.double() for name, tensor in load_weights(TINY / "model.safetensors").items()}
    ids = torch.tensor(
        [Tokenizer.load(TINY / "tokenizer.json").encode("It is a truth universally acknowledged, that")]
    )
    with torch.no_grad():
        ours, theirs = (
            dense_logits(ModelConfig.load(TINY / "config.json"), weights, ids),
            reference(ids).logits,
        )
    assert torch.allclose(ours, theirs.double(), atol=1e-4)
