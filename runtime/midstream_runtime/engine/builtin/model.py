"""The decoder over paged KV: what one engine step computes.

A step takes some tokens of many requests (one for those that decode, a run of them for those in prefill), writes their
keys and values into the pool's slots, and returns the logits after each request's last token.

An answer must not depend on who else is in the batch, on whether its KV was computed by a prefill or token by token, or
on the machine. Matrix products of different shapes add in different orders, so float32 results differ in their last bits,
and a greedy answer flips on a close call. Therefore all arithmetic is float64 (differences of 1e-15), keys and values are
rounded to the pool's dtype on every path before anyone reads them, and logits are rounded to float32 before a token is
chosen: a difference survives only if a value lies within 1e-15 of a rounding boundary. tests/unit/test_engine_identity.py
measures it. float64 costs this small model twice the time of its matrix products, no more.

A step may be abandoned between layers (`interrupted`): what it wrote lies beyond the fill of its requests and is written
again by the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from midstream_runtime.contract.pool import PoolLayout
from midstream_runtime.engine.builtin.dense import rms_norm, rope_tables
from midstream_runtime.engine.builtin.weights import ModelConfig, Weights

_COMPUTE = torch.float64
_DECODE_CHUNK = 32
"""Requests whose KV is gathered at a time: small enough for the cache of one core."""


class Interrupted(Exception):
    """The step was abandoned between layers; nothing has happened."""


@dataclass(frozen=True)
class Work:
    """One request's part of a step."""

    lane: int
    """Row of the block tables."""
    start: int
    """Position of the first token."""
    ids: Sequence[int]
    """Tokens at start, start + 1, ...; their slots are in the lane's table already."""


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class _Group:
    """Rows of a step that attend together: `requests` x `queries` rows, over `length` gathered positions."""

    first_row: int
    requests: int
    queries: int
    length: int
    rows: torch.Tensor
    """Block rows of keys and values in layer 0, flat [2, requests, kv_heads, blocks]."""
    mask: torch.Tensor
    """Added to the scores, [requests, 1, queries, length]."""


class PagedDecoder:
    """Not thread-safe. `pool_rows` is KvPool.rows(); on another device than the CPU the KV is mirrored there."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layout: PoolLayout,
        pool_rows: torch.Tensor,
        *,
        lanes: int,
        device: str = "cpu",
        mirror: bool | None = None,
    ) -> None:
        self.config, self.layout, self.device = config, layout, torch.device(device)
        self._pool_rows = pool_rows
        self._mirrored = self.device.type != "cpu" if mirror is None else mirror
        self._rows = pool_rows.to(self.device, copy=True) if self._mirrored else pool_rows
        self._layers = [self._fuse(weights, layer) for layer in range(config.num_hidden_layers)]
        self._embedding = self._place(weights["model.embed_tokens.weight"])
        self._norm = self._place(weights["model.norm.weight"])
        self._head = self._place(weights["lm_head.weight"]) if "lm_head.weight" in weights else self._embedding
        positions = torch.arange(config.max_position_embeddings)
        self._cos, self._sin = (table.to(self.device) for table in rope_tables(config, positions, _COMPUTE))
        blocks = -(-config.max_position_embeddings // layout.block_tokens)
        self._tables = torch.zeros(lanes, blocks, dtype=torch.int64)

    def set_slots(self, lane: int, first_block: int, slots: Sequence[int]) -> None:
        """Block table entries of a lane, from `first_block` on."""
        self._tables[lane, first_block : first_block + len(slots)] = torch.tensor(list(slots))

    def load_slots(self, slots: Sequence[int]) -> None:
        """KV that an agent wrote into the pool becomes visible to the device."""
        if self._mirrored:
            view = self._pool_rows.view(self.layout.slots, -1)
            mirror = self._rows.view(self.layout.slots, -1)
            index = torch.tensor(list(slots))
            mirror[index.to(self.device)] = view[index].to(self.device)

    @torch.no_grad()
    def step(self, works: Sequence[Work], interrupted: Callable[[], bool] = lambda: False) -> torch.Tensor:
        """float32 logits [len(works), vocab] on the CPU, after each work's last token."""
        order = sorted(range(len(works)), key=lambda i: (len(works[i].ids) > 1, works[i].start))
        ordered = [works[i] for i in order]
        ids = [token for work in ordered for token in work.ids]
        places = [(work.lane, work.start + i) for work in ordered for i in range(len(work.ids))]
        lanes, positions = torch.tensor(places).unbind(1)
        targets = self._target_rows(lanes, positions)
        groups = self._groups(ordered)
        cos = self._cos[positions.to(self.device)][:, None]
        sin = self._sin[positions.to(self.device)][:, None]
        hidden = self._embedding[torch.tensor(ids, device=self.device)]
        written = []
        for number, layer in enumerate(self._layers):
            if interrupted():
                raise Interrupted
            rows = targets + number * 2 * self.layout.kv_heads * self.layout.block_tokens
            hidden, new = self._layer(layer, number, hidden, cos, sin, rows, groups, interrupted)
            written.append((rows, new))
        if self._mirrored:
            self._write_back(written)
        ends = torch.tensor([len(work.ids) for work in ordered]).cumsum(0) - 1
        logits = F.linear(rms_norm(hidden[ends.to(self.device)], self._norm, self.config.rms_norm_eps), self._head)
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order)] = torch.arange(len(order))
        return logits.to(torch.float32).cpu()[back]

    def _layer(
        self,
        layer: _Layer,
        number: int,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: torch.Tensor,
        groups: list[_Group],
        interrupted: Callable[[], bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        count, eps = hidden.shape[0], config.rms_norm_eps
        qkv = F.linear(rms_norm(hidden, layer.input_norm, eps), layer.qkv).view(count, -1, size)
        turned = qkv[:, : heads + kv_heads]
        half = size // 2
        swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
        turned = torch.addcmul(turned * cos, swapped, sin)
        new = torch.cat((turned[:, heads:], qkv[:, heads + kv_heads :]), dim=1).to(self._rows.dtype)
        new = new.view(-1, size)
        self._rows[rows] = new
        mixed = torch.empty(count, heads * size, dtype=_COMPUTE, device=self.device)
        for group in groups:
            if interrupted():
                raise Interrupted
            last_row = group.first_row + group.requests * group.queries
            part = self._attend(group, number, turned[group.first_row : last_row, :heads])
            mixed[group.first_row : last_row] = part
        hidden = torch.addmm(hidden, mixed, layer.out)
        gate_up = F.linear(rms_norm(hidden, layer.post_norm, eps), layer.gate_up)
        inner = config.intermediate_size
        hidden = torch.addmm(hidden, F.silu(gate_up[:, :inner]) * gate_up[:, inner:], layer.down)
        return hidden, new

    def _attend(self, group: _Group, number: int, query: torch.Tensor) -> torch.Tensor:
        """Attention output [requests * queries, heads * head_dim] of one group."""
        config = self.config
        kv_heads, size = config.num_key_value_heads, config.head_dim
        per_kv = config.num_attention_heads // kv_heads
        blocks = self._rows.view(-1, self.layout.block_tokens * size)
        gathered = blocks.index_select(0, group.rows + number * 2 * kv_heads).to(_COMPUTE)
        keys, values = gathered.view(2, group.requests * kv_heads, group.length, size)
        query = query.reshape(group.requests, group.queries, kv_heads, per_kv, size).permute(0, 2, 3, 1, 4)
        query = query.reshape(group.requests * kv_heads, per_kv * group.queries, size)
        scores = torch.bmm(query, keys.transpose(1, 2)).mul_(size**-0.5)
        by_head = scores.view(group.requests, kv_heads * per_kv, group.queries, group.length)
        by_head += group.mask
        mixed = torch.bmm(scores.softmax(-1), values)
        mixed = mixed.view(group.requests, kv_heads, per_kv, group.queries, size).permute(0, 3, 1, 2, 4)
        return mixed.reshape(group.requests * group.queries, -1)

    def _groups(self, ordered: list[Work]) -> list[_Group]:
        decoding = sum(1 for work in ordered if len(work.ids) == 1)
        groups, row = [], 0
        chunks = [ordered[at : min(at + _DECODE_CHUNK, decoding)] for at in range(0, decoding, _DECODE_CHUNK)]
        chunks += [[work] for work in ordered[decoding:]]
        for chunk in chunks:
            groups.append(self._group(chunk, row))
            row += sum(len(work.ids) for work in chunk)
        return groups

    def _group(self, chunk: list[Work], first_row: int) -> _Group:
        queries = len(chunk[0].ids)
        block_tokens, kv_heads = self.layout.block_tokens, self.layout.kv_heads
        longest = max(work.start for work in chunk) + queries
        count = -(-longest // block_tokens)
        table = self._tables[torch.tensor([work.lane for work in chunk]), :count]
        rows = (table * (self.layout.layers * 2 * kv_heads))[None, :, None, :]
        rows = rows + torch.arange(2 * kv_heads).view(2, 1, kv_heads, 1)
        last = torch.tensor([work.start for work in chunk])[:, None] + torch.arange(queries)
        hidden = torch.arange(count * block_tokens) > last[..., None]
        mask = torch.zeros(hidden.shape, dtype=_COMPUTE).masked_fill_(hidden, float("-inf"))
        return _Group(
            first_row=first_row,
            requests=len(chunk),
            queries=queries,
            length=count * block_tokens,
            rows=rows.reshape(-1).to(self.device),
            mask=mask[:, None].to(self.device),
        )

    def _target_rows(self, lanes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Pool rows in layer 0 of the tokens' keys and values, flat [tokens, 2, kv_heads]."""
        block_tokens, heads = self.layout.block_tokens, 2 * self.layout.kv_heads
        slots = self._tables[lanes, torch.div(positions, block_tokens, rounding_mode="floor")]
        block_rows = (slots * (self.layout.layers * heads))[:, None] + torch.arange(heads)
        return (block_rows * block_tokens + (positions % block_tokens)[:, None]).view(-1).to(self.device)

    def _write_back(self, written: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for rows, new in written:
            self._pool_rows[rows.cpu()] = new.cpu()

    def _fuse(self, weights: Weights, layer: int) -> _Layer:
        def get(name: str) -> torch.Tensor:
            return weights[f"model.layers.{layer}.{name}.weight"]

        return _Layer(
            input_norm=self._place(get("input_layernorm")),
            qkv=self._place(torch.cat([get(f"self_attn.{name}_proj") for name in "qkv"])),
            out=self._place(get("self_attn.o_proj").t()),
            post_norm=self._place(get("post_attention_layernorm")),
            gate_up=self._place(torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")])),
            down=self._place(get("mlp.down_proj").t()),
        )

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, _COMPUTE).contiguous()
