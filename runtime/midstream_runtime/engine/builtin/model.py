"""The decoder over paged KV: what one engine step computes.

A step takes some tokens of many requests (one for those that decode, a run of them for those in prefill),
writes their keys and values into the pool's slots, and returns the logits after each request's last token.

An answer must not depend on who else is in the batch, on whether its KV was computed by a prefill or token
by token, or on the machine. Matrix products of different shapes add in different orders, so float32 results
differ in their last bits, and a greedy answer flips on a close call: over 38,400 tokens of the tiny model the
two best logits were closer than 1e-4 in 8 cases and than 1e-5 in 3. Therefore all arithmetic is float64
(differences of 1e-15), keys and values are rounded to the pool's dtype on every path before anyone reads
them, and logits are rounded to float32 before a token is chosen: a difference survives only where a value
lies within 1e-15 of a rounding boundary. tests/unit/engine/test_engine_identity.py measures it. For this
small model float64 costs twice the time of its matrix products, no more.

A step may be abandoned between layers (`interrupted`): what it wrote lies beyond the fill of its requests and
is written again by the next step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from midstream_runtime.contract.pool import PoolLayout
from midstream_runtime.device import Mover
from midstream_runtime.engine.builtin.dense import rope_tables
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
    """Matrices as [in, out], which BLAS takes without repacking when there are few rows. Folded into them:
    the norms' weights (and the root of the width), the scores' 1/sqrt(head_dim)."""

    qkv: torch.Tensor
    out: torch.Tensor
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
    """Block rows of keys and values in layer 0, flat [2, requests, blocks]."""
    mask: torch.Tensor | None
    """Added to the scores, [requests, 1, queries, length]. None: every row sees all."""


class PagedDecoder:
    """Not thread-safe. `pool_rows` is KvPool.rows(); on another device than the CPU the KV is mirrored
    there."""

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
        self._mover = Mover(pool_rows.view(layout.slots, -1), self.device)
        self._embedding = self._place(weights["model.embed_tokens.weight"])
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        norm = weights["model.norm.weight"].double() * config.hidden_size**0.5
        self._head = self._place((head.double() * norm).t())
        positions = torch.arange(config.max_position_embeddings)
        cos, sin = rope_tables(config, positions, _COMPUTE)
        sin[:, : config.head_dim // 2] *= -1
        self._cos, self._sin = cos.to(self.device), sin.to(self.device)
        per_kv = config.num_attention_heads // config.num_key_value_heads
        kv_of_head = torch.arange(config.num_attention_heads) // per_kv
        owned = kv_of_head[:, None] == torch.arange(config.num_key_value_heads)
        self._head_to_kv = owned.to(self.device, _COMPUTE)[None, :, :, None]
        self._layers = [self._fuse(weights, layer) for layer in range(config.num_hidden_layers)]
        blocks = -(-config.max_position_embeddings // layout.block_tokens)
        self._tables = torch.zeros(lanes, blocks, dtype=torch.int64)

    def set_slots(self, lane: int, first_block: int, slots: Sequence[int]) -> None:
        """Block table entries of a lane, from `first_block` on. Padding reads behind them: it must meet slots
        of the same request, since a NaN that somebody else put into a slot would survive the mask."""
        self._tables[lane, first_block : first_block + len(slots)] = integers(slots)
        self._tables[lane, first_block + len(slots) :] = slots[-1]

    def load_slots(self, slots: Sequence[int]) -> None:
        """KV that an agent wrote into the pool becomes visible to the device."""
        if self._mirrored and slots:
            self._mover.load(slots, self._rows.view(self.layout.slots, -1), slots)
            self._mover.wait()  # the slots may be released before the next step

    def step(self, works: Sequence[Work], interrupted: Callable[[], bool] = lambda: False) -> torch.Tensor:
        """float32 logits [len(works), vocab] on the CPU, after each work's last token."""
        with torch.no_grad():
            return self._step(works, interrupted)

    def _step(self, works: Sequence[Work], interrupted: Callable[[], bool]) -> torch.Tensor:
        order = sorted(range(len(works)), key=lambda i: (len(works[i].ids) > 1, works[i].start))
        ordered = [works[i] for i in order]
        ids = [token for work in ordered for token in work.ids]
        places = [n for work in ordered for i in range(len(work.ids)) for n in (work.lane, work.start + i)]
        lanes, positions = integers(places).view(-1, 2).unbind(1)
        targets = self._target_rows(lanes, positions)
        groups = self._groups(ordered)
        cos = self._cos[positions.to(self.device)][:, None]
        sin = self._sin[positions.to(self.device)][:, None]
        hidden = self._embedding[integers(ids).to(self.device)]
        written = []
        for number, layer in enumerate(self._layers):
            if interrupted():
                raise Interrupted
            rows = targets + number * 2 * self.layout.block_tokens
            hidden, new = self._layer(layer, number, hidden, cos, sin, rows, groups, interrupted)
            written.append((rows, new))
        if self._mirrored:
            self._write_back(written)
        ends = torch.tensor([len(work.ids) for work in ordered]).cumsum(0) - 1
        logits = _product(self._normed(hidden[ends.to(self.device)]), self._head)
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
        """Hidden states after the layer, and the keys and values that were written to `rows`."""
        config = self.config
        heads, size, count = config.num_attention_heads, config.head_dim, hidden.shape[0]
        qkv = _product(self._normed(hidden), layer.qkv).view(count, -1, size)
        turned = qkv[:, : heads + config.num_key_value_heads]
        torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin, out=turned)
        new = qkv[:, heads:].to(self._rows.dtype).reshape(-1, self._rows.shape[1])
        self._rows[rows] = new
        spread = (qkv[:, :heads, None] * self._head_to_kv).view(count, heads, -1)
        if len(groups) == 1:
            mixed = self._attend(groups[0], number, spread)
        else:
            mixed = torch.empty(count, spread[0].numel(), dtype=_COMPUTE, device=self.device)
            for group in groups:
                if interrupted():
                    raise Interrupted
                last_row = group.first_row + group.requests * group.queries
                mixed[group.first_row : last_row] = self._attend(
                    group, number, spread[group.first_row : last_row]
                )
        hidden = hidden + _product(mixed, layer.out)
        gate, up = _product(self._normed(hidden), layer.gate_up).chunk(2, dim=1)
        return hidden + _product(F.silu(gate).mul_(up), layer.down), new

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """RMS norm without its weight, which is folded into the matrix that follows."""
        # mean(x^2) + eps, times the width: the root of the width is in the matrix as well.
        scale = hidden.square().sum(-1, keepdim=True).add_(self.config.rms_norm_eps * hidden.shape[1])
        return hidden * scale.rsqrt_()

    def _attend(self, group: _Group, number: int, query: torch.Tensor) -> torch.Tensor:
        """Attention output [requests * queries, heads * kv_heads * head_dim] of one group.

        `query` [rows, heads, kv_heads * head_dim] is zero outside the head's own KV head, so that one product
        a request serves all heads: on a CPU the number of small products decides the time, not their size.
        The output's parts of other KV heads meet zeros in `_Layer.out`."""
        heads, width = self.config.num_attention_heads, self._rows.shape[1]
        blocks = self._rows.view(-1, self.layout.block_tokens * width)
        gathered = blocks.index_select(0, group.rows + 2 * number).to(_COMPUTE)
        keys, values = gathered.view(2, group.requests, -1, width)[:, :, : group.length]
        if group.queries > 1:
            query = query.view(group.requests, group.queries, heads, width).transpose(1, 2)
            query = query.reshape(group.requests, heads * group.queries, width)
        scores = torch.bmm(query, keys.transpose(1, 2))
        if group.mask is not None:
            by_head = scores.view(group.requests, heads, group.queries, group.length)
            by_head += group.mask
        mixed = torch.bmm(scores.softmax(-1), values)
        if group.queries > 1:
            mixed = mixed.view(group.requests, heads, group.queries, width).transpose(1, 2)
        return mixed.reshape(group.requests * group.queries, heads * width)

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
        block_tokens = self.layout.block_tokens
        longest = max(work.start for work in chunk) + queries
        count = -(-longest // block_tokens)
        table = self._tables[torch.tensor([work.lane for work in chunk]), :count]
        rows = (table * (2 * self.layout.layers))[None] + torch.arange(2).view(2, 1, 1)
        rows = rows.view(-1).to(self.device)
        if len(chunk) == queries == 1:
            return _Group(first_row, 1, 1, longest, rows, None)
        last = torch.tensor([work.start for work in chunk])[:, None] + torch.arange(queries)
        hidden = torch.arange(longest) > last[..., None]
        mask = torch.zeros(hidden.shape, dtype=_COMPUTE).masked_fill_(hidden, float("-inf"))
        return _Group(first_row, len(chunk), queries, longest, rows, mask[:, None].to(self.device))

    def _target_rows(self, lanes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token rows in layer 0 of the tokens' keys and values, flat [tokens, 2]."""
        block_tokens = self.layout.block_tokens
        slots = self._tables[lanes, torch.div(positions, block_tokens, rounding_mode="floor")]
        block_rows = (slots * (2 * self.layout.layers))[:, None] + torch.arange(2)
        return (block_rows * block_tokens + (positions % block_tokens)[:, None]).view(-1).to(self.device)

    def _write_back(self, written: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for rows, new in written:
            self._pool_rows[rows.cpu()] = new.cpu()

    def _fuse(self, weights: Weights, layer: int) -> _Layer:
        def get(name: str) -> torch.Tensor:
            return weights[f"model.layers.{layer}.{name}.weight"]

        config = self.config
        heads, size, root = config.num_attention_heads, config.head_dim, config.hidden_size**0.5
        input_norm = get("input_layernorm").double() * root
        post_norm = get("post_attention_layernorm").double() * root
        query = get("self_attn.q_proj").double() * size**-0.5
        qkv = torch.cat([query, get("self_attn.k_proj").double(), get("self_attn.v_proj").double()])
        gate_up = torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")]).double()
        out = get("self_attn.o_proj").double().t().reshape(heads, 1, size, -1)
        out = out * self._head_to_kv[0, :, :, :, None].cpu()
        return _Layer(
            qkv=self._place((qkv * input_norm).t()),
            out=self._place(out.reshape(-1, config.hidden_size)),
            gate_up=self._place((gate_up * post_norm).t()),
            down=self._place(get("mlp.down_proj").t()),
        )

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, _COMPUTE).contiguous()


def integers(values: Sequence[int]) -> torch.Tensor:
    """int64 tensor, at a third of what torch.tensor takes for a list."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """A single row goes through BLAS's matrix-vector product, at a third of the time."""
    if rows.shape[0] == 1:
        return torch.mv(matrix.t(), rows[0])[None]
    return torch.mm(rows, matrix)
