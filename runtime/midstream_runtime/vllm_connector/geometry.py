"""Which vLLM and which models the connector serves, and how their KV tensors map to the pool's layout.

vLLM hands each layer's cache over as a view [block][kv head][token][key and value, head_dim each], whatever the
attention backend stores underneath. The pool's slots are [layer][key, value][token][kv head][head_dim], so that a
block means the same on every backend. What does not fit is refused by name when the server starts, never in the
middle of an answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from midstream_runtime.contract.errors import Final
from midstream_runtime.contract.pool import ELEMENT_BYTES, PoolLayout

TESTED = ("0.32",)
"""Minor versions of vLLM with which the tests run. The connector interface is vLLM's public one, but marked as subject
to change: another version needs "allow_untested_vllm": true."""
SAMPLE_BYTES = 1 << 20
DEFAULT_SLOTS = 1024
DEFAULT_SOCKET = "/run/midstream/pool.sock"


@dataclass(frozen=True)
class Options:
    """kv_connector_extra_config."""

    pool_slots: int = DEFAULT_SLOTS
    """Blocks that the pool holds, beside vLLM's own cache; each is as large as one of vLLM's."""
    pool_socket: str = DEFAULT_SOCKET
    weights_id: str = ""
    """Equal where the weights are equal; empty: taken from the weight files."""
    allow_untested_vllm: bool = False

    @classmethod
    def of(cls, config: Any, version: str) -> Options:
        """Final by name for what this connector does not serve."""
        transfer = config.kv_transfer_config
        extra = dict(transfer.kv_connector_extra_config or {})
        known = [f.name for f in fields(cls)]
        if unknown := sorted(extra.keys() - set(known)):
            raise Final("vllm_option", f"kv_connector_extra_config: unknown {unknown}; there are {', '.join(known)}")
        options = cls(**extra)
        if type(options.pool_slots) is not int or options.pool_slots < 1:
            raise Final("vllm_option", f"pool_slots {options.pool_slots!r} must be a number of at least 1")
        check_version(version, options.allow_untested_vllm)
        check_parallel(config)
        if transfer.kv_load_failure_policy != "recompute":
            raise Final("vllm_load_policy", 'set "kv_load_failure_policy": "recompute", or a lost block ends an answer')
        return options

    def layout(self, config: Any, kv_cache_config: Any) -> PoolLayout:
        model = config.model_config
        name = self.weights_id or weights_id(model.model, model.revision, str(model.dtype))
        return layout_of(kv_cache_config, self.pool_slots, hashlib.sha256(name.encode()).hexdigest()[:32])


def describe(config: Any, layout: PoolLayout) -> dict[str, Any]:
    """What the gateway must know of this server's pool."""
    pool = {
        "fingerprint": layout.fingerprint, "slots": layout.slots, "slot_bytes": layout.slot_bytes,
        "data_offset": layout.data_offset, "block_tokens": layout.block_tokens,
    }  # fmt: skip
    return {"fingerprint": layout.model_fingerprint, "context": config.model_config.max_model_len, "pool": pool}


def check_version(version: str, allow_untested: bool) -> None:
    found = re.match(r"\d+\.\d+", version)
    if allow_untested or (found and found[0] in TESTED):
        return
    raise Final(
        "vllm_version",
        f"vLLM {version} has not been tested with this connector ({', '.join(TESTED)}.x has): use that, or set "
        '"allow_untested_vllm": true in kv_connector_extra_config',
    )


def check_parallel(config: Any) -> None:
    """One worker in the engine's process writes the pool."""
    parallel = config.parallel_config
    if parallel.world_size != 1 or parallel.data_parallel_size != 1:
        raise Final(
            "vllm_parallel",
            f"world size {parallel.world_size}, data parallel {parallel.data_parallel_size}: the connector serves one "
            "worker a server; leave it out (answers are then replayed from their ids) or use one GPU a server",
        )


def layout_of(kv_cache_config: Any, slots: int, fingerprint: str) -> PoolLayout:
    """Final("vllm_kv_layout") where the cache is not plain attention over one group of equal layers."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise _unfit(f"{len(groups)} groups of layers with caches of their own")
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ != "FullAttentionSpec" or getattr(spec, "sliding_window", None):
        raise _unfit(f"a cache of the kind {type(spec).__name__}")
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in ELEMENT_BYTES:
        raise _unfit(f"elements of the type {dtype}")
    if getattr(spec, "head_size_v", spec.head_size) != spec.head_size:
        raise _unfit("keys and values of different sizes")
    return PoolLayout(
        slots=slots,
        block_tokens=spec.block_size,
        layers=len(groups[0].layer_names),
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        dtype=dtype,
        model_fingerprint=fingerprint,
    )


def layer_views(caches: Mapping[str, torch.Tensor], names: list[str], layout: PoolLayout) -> list[torch.Tensor]:
    """Of each layer [block][kv head][token][2 * head_dim], in the order of the model's layers."""
    views = []
    for name in names:
        cache = caches[name]
        if cache.dim() != 4 or cache.shape[1:] != (layout.kv_heads, layout.block_tokens, 2 * layout.head_dim):
            raise _unfit(f"a layer's view of the shape {tuple(cache.shape)}")
        views.append(cache)
    return views


def in_slot_order(block: torch.Tensor) -> torch.Tensor:
    """[kv head][token][key and value] of one block as [key, value][token][kv head][head_dim]; a view."""
    heads, tokens, both = block.shape
    return block.view(heads, tokens, 2, both // 2).permute(2, 1, 0, 3)


def weights_id(model: str, revision: str | None, dtype: str) -> str:
    """32 hex digits that are equal where the weights are: over the config, and of each weight file its size, its head
    and samples of 1 MiB. Reading all of a 140 GB model would hold the start up for minutes."""
    folder = Path(model)
    if not folder.is_dir():
        folder = _cached(model, revision)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.gguf")])
    if not files:
        raise Final(
            "vllm_weights",
            f"no weight files of {model!r} to tell weights apart by: set weights_id in kv_connector_extra_config to a "
            "name that is equal on all pods with these weights",
        )
    digest = hashlib.sha256(dtype.encode())
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.exists() else b"")
    for path in files:
        _sample(path, digest)
    return digest.hexdigest()[:32]


def _sample(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
        for at in sorted({0, size // 3, size * 2 // 3, max(0, size - SAMPLE_BYTES)}):
            file.seek(at)
            digest.update(file.read(SAMPLE_BYTES))


def _cached(model: str, revision: str | None) -> Path:
    """The folder of a hub's model that vLLM has downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else Path(model)


def _unfit(what: str) -> Final:
    return Final(
        "vllm_kv_layout",
        f"the KV pool cannot hold {what}: start the server without the connector; answers are then replayed",
    )
