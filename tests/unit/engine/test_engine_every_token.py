"""A greedy answer that moves after any of its tokens is the answer that did not move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from midstream_runtime.contract.pool import checksum
from midstream_runtime.engine.protocol import EngineState, SamplingParams

TINY = Path(__file__).resolve().parents[3] / "runtime/midstream_runtime/engine/builtin/tiny"
TEXT = "It is a truth universally acknowledged, that"
LENGTH = 200


def copied(state: EngineState, source: Any, target: Any, *, share: bool) -> EngineState:
    """The state over the target's slots. `share`: full blocks are landed once, and found by their hash afterwards."""
    slots: list[int | None] = []
    for block in state.kv:
        name = source.name_of(block.slot) if share else None
        slot = target.find(name) if name is not None else None
        if slot is None:
            (slot,) = target.reserve(1)
            target.view.slot(slot)[:] = source.view.slot(block.slot)
            if name is not None:
                target.land(slot, name, checksum(target.view.slot(slot)))
        slots.append(slot)
    return state.with_slots(slots)


@pytest.mark.parametrize("how", ["copied", "shared", "damaged"])
def test_an_answer_that_moves_at_any_token_is_the_same(torch: ModuleType, how: str) -> None:
    """All moves go on beside one another in one target engine. `damaged` is the control: KV of the first block zeroed
    in the target, unchecked, changes answers."""
    from midstream_runtime.engine.builtin.load import build

    source, _ = build(TINY, pool_slots=64)
    target, _ = build(TINY, pool_slots=LENGTH * 20)
    ids = [source.tokenizer.bos_id, *source.tokenizer.encode(TEXT)]
    source.add("a", ids, SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True))
    whole: list[int] = []
    moved: dict[str, list[int]] = {}

    def go_on() -> None:
        for name, event in target.step():
            moved[name].append(event.token_id)
        target.seal_blocks()

    while not source.idle:
        whole += [event.token_id for _, event in source.step()]
        source.seal_blocks()
        if not whole or source.idle:
            continue
        state = source.pause(["a"])["a"]
        there = copied(replace(state, generated_ids=list(whole)), source.pool, target.pool, share=how == "shared")
        if how == "damaged":
            first = there.kv[0].slot
            assert first is not None
            target.pool.view.slot(first)[:] = bytes(target.pool.layout.slot_bytes)
        name = f"after {len(whole)}"
        moved[name] = list(whole)
        target.add_state(name, there)
        source.resume(["a"])
        go_on()
    while not target.idle:
        go_on()
    assert len(moved) == LENGTH - 1
    different = [name for name, tokens in moved.items() if tokens != whole]
    if how == "damaged":
        assert different, "the target does not use the KV that came"
        return
    assert different == []
    assert target.totals["prefill_tokens"] == 0, "everything came along"
    assert (target.totals["kv_blocks_shared"] > 0) == (how == "shared")
