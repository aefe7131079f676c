"""Puts an engine together from a model folder: weights, tokenizer, pool, decoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from midstream_runtime.contract.errors import Final
from midstream_runtime.contract.pool import PoolLayout
from midstream_runtime.engine.builtin.core import CoreSettings, EngineCore
from midstream_runtime.engine.builtin.model import PagedDecoder
from midstream_runtime.engine.builtin.tokenizer import Tokenizer
from midstream_runtime.engine.builtin.weights import ModelConfig, fingerprint, load_weights
from midstream_runtime.engine.protocol import EngineInfo, PoolInfo
from midstream_runtime.pool import KvPool

_CACHED_PART = 4
"""One part in so many of the pool may hold blocks that nobody owns: a system prompt that the next migration
need not bring. The rest is wiped as it is freed, so that a step seldom waits for it."""


def build(
    folder: Path,
    *,
    pool_slots: int,
    block_tokens: int = 16,
    kv_dtype: str = "float16",
    pace_ms: float = 0.0,
    device: str = "cpu",
    max_running: int = 512,
    threads: int = 1,
    mirror: bool | None = None,
) -> tuple[EngineCore, EngineInfo]:
    """Raises Final when the folder holds no model that this engine runs."""
    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        config = ModelConfig.load(folder / "config.json")
        weights = load_weights(folder / "model.safetensors")
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, KeyError, ValueError) as error:
        raise Final("bad_model", f"{folder} holds no model for the built-in engine: {error}") from error
    name = fingerprint(config, weights)
    layout = PoolLayout(
        slots=pool_slots,
        block_tokens=block_tokens,
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=kv_dtype,
        model_fingerprint=name,
    )
    pool = KvPool(layout, cached_slots=pool_slots // _CACHED_PART)
    if device != "cpu":
        pool.pin()
    decoder = PagedDecoder(
        config, weights, layout, pool.rows(), lanes=max_running, device=device, mirror=mirror
    )
    settings = CoreSettings(
        max_running=max_running, repetition_penalty=float(generation.get("repetition_penalty", 1.0))
    )
    core = EngineCore(decoder, pool, tokenizer, settings)
    info = EngineInfo(
        model=f"midstream-{folder.name}",
        fingerprint=name,
        context=config.max_position_embeddings,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pace_ms=pace_ms,
        device=device,
        pool=PoolInfo(layout.fingerprint, pool_slots, layout.slot_bytes, layout.data_offset, block_tokens),
    )
    return core, info
