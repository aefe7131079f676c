"""An answer's KV leaves the device through the pool and comes back in, and the answer is the same.

The built-in engine runs on the CPU too (with a mirror, as if it were a device); so does a Llama of transformers, whose
weights are random, since there is no network: its answers are nonsense that depends on every token before.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from midstream_runtime.contract.pool import PoolLayout
from midstream_runtime.engine.protocol import EngineState, SamplingParams

TINY = Path(__file__).resolve().parents[2] / "runtime/midstream_runtime/engine/builtin/tiny"
BLOCK, PROMPT_TOKENS, TOKENS = 16, 100, 60


def finish(core: Any, name: str, steps: int = -1) -> list[int]:
    tokens = []
    while not core.idle and steps:
        tokens += [event.token_id for _, event in core.step()]
        core.seal_blocks()
        steps -= 1
    return tokens


def carried(state: EngineState, source: Any, target: Any) -> EngineState:
    """The agents' part: slots of one pool to slots of the other."""
    slots = target.pool.reserve(len(state.kv))
    for block, slot in zip(state.kv, slots, strict=True):
        target.pool.view.slot(slot)[:] = source.pool.view.slot(block.slot)
    return state.with_slots(slots)


@pytest.mark.parametrize("wiped", [False, True], ids=["moved", "wiped"])
def test_the_engines_answer_goes_on_from_the_pool(torch: ModuleType, device: Any, wiped: bool) -> None:
    """`wiped` is the control: zeroes in the pool change the answer."""
    from midstream_runtime.engine.builtin.load import build

    source, target, whole = (
        build(TINY, pool_slots=64, device=device.type, mirror=True, max_running=4)[0] for _ in range(3)
    )
    ids = [whole.tokenizer.bos_id, *whole.tokenizer.encode("It is a truth universally acknowledged, that")]
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    whole.add("a", ids, params)
    wanted = finish(whole, "a")
    source.add("a", ids, params)
    begun = finish(source, "a", steps=TOKENS // 2)
    there = carried(source.pause(["a"])["a"], source, target)
    if wiped:
        for block in there.kv:
            assert block.slot is not None
            target.pool.view.slot(block.slot)[:] = bytes(target.pool.layout.slot_bytes)
    target.add_state("a", there)
    assert (begun + finish(target, "a") == wanted) == (not wiped)
    assert target.totals["prefill_tokens"] == 0, "nothing was computed again"
    for core in source, target, whole:
        core.pool.close()


def pairs_of(cache: Any) -> list[tuple[Any, Any]]:
    """Keys and values of each layer, [1, kv heads, tokens, head_dim], of any version of transformers."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    if hasattr(cache, "key_cache"):
        return list(zip(cache.key_cache, cache.value_cache, strict=True))
    return list(cache)


@pytest.mark.parametrize("wiped", [False, True], ids=["moved", "wiped"])
def test_the_kv_of_a_real_model_goes_through_the_pool(torch: ModuleType, device: Any, wiped: bool) -> None:
    from midstream_runtime.device import Mover
    from midstream_runtime.pool import KvPool

    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        pytest.skip("no transformers (probe: import)")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
    layout = PoolLayout(
        PROMPT_TOKENS // BLOCK + 1, BLOCK, 4, 4, 32, str(dtype).removeprefix("torch."), "real".ljust(32, "0")
    )
    pool = KvPool(layout)
    pool.pin()
    mover = Mover(pool.rows().view(layout.slots, -1), device)
    prompt = torch.arange(PROMPT_TOKENS, device=device)[None] * 37 % 1000
    with torch.no_grad():
        first = model(prompt, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        blocks = to_blocks(torch, pairs_of(first.past_key_values), layout)
        wanted = greedy(torch, model, token, cache_of(transformers, blocks, layout))
        slots = list(range(layout.slots))[::-1]
        mover.save(blocks, slots)
        mover.wait()
        if wiped:
            pool.rows().zero_()
        back = torch.full_like(blocks, float("nan"))
        mover.load(slots, back)
        mover.wait()
        got = greedy(torch, model, token, cache_of(transformers, back, layout))
    assert len(set(wanted)) > 5, "the model must say different things"
    assert (got == wanted) == (not wiped)
    pool.close()


def greedy(torch: ModuleType, model: Any, token: Any, cache: Any) -> list[int]:
    tokens = []
    for _ in range(TOKENS):
        step = model(token, past_key_values=cache, use_cache=True)
        cache, token = step.past_key_values, step.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
    return tokens


def to_blocks(torch: ModuleType, pairs: list[tuple[Any, Any]], layout: PoolLayout) -> Any:
    """[blocks, elements] in the pool's order: layer, key and value, token, KV head, head_dim."""
    whole = torch.stack([torch.stack((k[0], v[0])) for k, v in pairs]).transpose(2, 3)
    missing = layout.slots * layout.block_tokens - whole.shape[2]
    whole = torch.nn.functional.pad(whole, (0, 0, 0, 0, 0, missing))
    split = whole.unflatten(2, (layout.slots, layout.block_tokens))
    return split.permute(2, 0, 1, 3, 4, 5).reshape(layout.slots, -1).contiguous()


def cache_of(transformers: ModuleType, blocks: Any, layout: PoolLayout) -> Any:
    """What the model takes, of such blocks; their padding is left out."""
    shape = layout.slots, layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim
    whole = blocks.view(shape).permute(1, 2, 4, 0, 3, 5).flatten(3, 4)[:, :, :, :PROMPT_TOKENS]
    cache = transformers.DynamicCache()
    for number, (keys, values) in enumerate(whole):
        cache.update(keys[None].contiguous(), values[None].contiguous(), number)
    return cache
