"""What the gateway asks of an engine, and nothing more.

The gateway owns clients and their sockets, the engine owns tokens and KV cache; they are two processes,
because a busy Python thread beside the gateway would cost each wake-up milliseconds. An answer is moved to
another node by `pause` on the source, which hands out an `EngineState`, a copy of the KV slots that the state
names, and `generate(resume=...)` on the target. The token ids are the truth of an answer; KV is a cache of
them that saves the target a prefill.

Everything here is data and signatures: importable without torch, safe to import anywhere.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, named as OpenAI and vLLM name it. `temperature` 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int | None = None
    """None: the engine draws one and reports it in the state, so that a moved answer goes on with it."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of the text."""
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    """None: the model's own default (`generation_config.json`); 1.0: none. Counts the newest 256 tokens."""
    logprobs: bool = False
    unset: tuple[str, ...] = ()
    """Names that the client left out, for an engine that has defaults of its own for them."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SamplingParams:
        """Unknown names are refused (TypeError): a parameter dropped in silence would change the answer."""
        fields = dict(data)
        for name in ("stop", "unset"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class TokenEvent(NamedTuple):
    """One decoded token. Held-back text (a stop string may be beginning) comes with a later event."""

    token_id: int
    """-1 for an event that carries text or a finish only."""
    text: str
    """May be empty: half a UTF-8 character, a special token, or text that is held back."""
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    usage: RequestStats | None = None
    """Present with the last event of the answer."""


class RequestStats(NamedTuple):
    """Counts of one request; after a migration each engine counts its own `prefill_tokens` and
    `kv_tokens_used`."""

    prompt_tokens: int
    completion_tokens: int
    prefill_tokens: int
    """Tokens whose KV this engine had to compute before it could decode. 0 after a migration with KV."""
    kv_tokens_used: int
    """Tokens of KV taken over from the slots that came with the state."""


class KvBlock(NamedTuple):
    """One slot of the pool that holds KV of a request, in the order of its positions."""

    slot: int | None
    """None: this block did not come along; it and all behind it are computed again from the ids."""
    tokens: int
    """Filled positions; only the last block may be partly filled."""


@dataclass(frozen=True)
class EngineState:
    """An answer between two tokens. Independent of the node but for the slot numbers in `kv`."""

    prompt_ids: list[int]
    generated_ids: list[int]
    params: SamplingParams
    seed: int
    counter: int
    """Random numbers used so far; the next one is a function of (seed, counter) alone."""
    kv: list[KvBlock] = field(default_factory=list)
    """KV of the first sum(tokens) ids: all but the newest id when the request was decoding."""
    undecoded: bytes = b""
    """Bytes of an incomplete UTF-8 character at the end of the generated ids."""
    held_text: str = ""
    """Text that was decoded but not emitted, since a stop string may be beginning."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What only this kind of engine knows of an answer; JSON."""

    def with_slots(self, slots: Sequence[int | None]) -> EngineState:
        """The same state over other slot numbers, one for each block of `kv`."""
        if len(slots) != len(self.kv):
            raise ValueError(f"{len(slots)} KV slots for {len(self.kv)} blocks")
        return replace(self, kv=list(map(KvBlock, slots, (block.tokens for block in self.kv))))

    def to_json(self) -> dict[str, Any]:
        """JSON object; long integer lists are base64 of little-endian u32, since thousands of ids travel in a
        pause."""
        return {
            "prompt_ids": _pack(self.prompt_ids),
            "generated_ids": _pack(self.generated_ids),
            "params": self.params.to_json(),
            "seed": self.seed,
            "counter": self.counter,
            "kv_slots": _pack([_NO_SLOT if block.slot is None else block.slot for block in self.kv]),
            "kv_tokens": _pack([block.tokens for block in self.kv]),
            "undecoded": self.undecoded.hex(),
            "held_text": self.held_text,
            "extra": self.extra,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineState:
        slots, tokens = _unpack(data["kv_slots"]), _unpack(data["kv_tokens"])
        return cls(
            prompt_ids=_unpack(data["prompt_ids"]),
            generated_ids=_unpack(data["generated_ids"]),
            params=SamplingParams.from_json(data["params"]),
            seed=int(data["seed"]),
            counter=int(data["counter"]),
            kv=_blocks(slots, tokens),
            undecoded=bytes.fromhex(data["undecoded"]),
            held_text=str(data["held_text"]),
            extra=dict(data.get("extra", {})),
        )


_NO_SLOT = 0xFFFFFFFF


def _blocks(slots: list[int], tokens: list[int]) -> list[KvBlock]:
    """Of thousands, while a client waits."""
    if len(slots) != len(tokens):
        raise ValueError(f"{len(slots)} KV slots with {len(tokens)} fills")
    places: list[int | None] = [None if s == _NO_SLOT else s for s in slots] if _NO_SLOT in slots else [*slots]
    return list(map(KvBlock, places, tokens))


def _pack(values: Sequence[int]) -> str:
    return base64.b64encode(array("I", values).tobytes()).decode("ascii")


def _unpack(text: str) -> list[int]:
    values = array("I")
    values.frombytes(base64.b64decode(text, validate=True))
    return values.tolist()


@dataclass(frozen=True)
class PoolInfo:
    """The engine's KV pool as the handoff's `hello` tells it; layout in midstream_runtime.contract.pool."""

    fingerprint: str
    """Equal on two nodes: slots can be copied byte for byte."""
    slots: int
    slot_bytes: int
    data_offset: int
    block_tokens: int


@dataclass(frozen=True)
class EngineInfo:
    model: str
    fingerprint: str
    """Of the weights: the same ids give the same KV and, greedy, the same answer."""
    context: int
    """Longest prompt + answer, tokens."""
    vocab_size: int
    bos_id: int
    eos_id: int
    pace_ms: float
    device: str
    pool: PoolInfo | None
    """None: the engine's KV cannot be moved; answers are replayed from their ids."""


class Engine(Protocol):
    """All methods raise midstream_runtime.contract.errors; `Retryable` when the engine is gone or full for
    now."""

    async def info(self) -> EngineInfo: ...

    def pool_fd(self) -> int | None:
        """Memfd of the pool, owned by the engine object, valid after `info()`; dup() it to keep it."""

    async def tokenize(self, text: str) -> list[int]:
        """Ids of a completion's prompt, a begin token in front."""

    async def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a chat in the model's template, up to where the assistant begins."""

    def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        resume: EngineState | None = None,
    ) -> AsyncIterator[TokenEvent]:
        """Events of one answer. With `resume`, prompt_ids and params are the state's and the arguments are
        ignored; only tokens after the state come. Closing the iterator drops the request."""

    async def pause(self, ids: Sequence[str]) -> dict[str, EngineState]:
        """Stops at a token boundary. Every event up to it is in the iterators (or went to the sinks) before
        this returns. Unknown and finished ids are absent from the answer. KV slots stay the request's until
        `drop`."""

    async def resume(self, ids: Sequence[str]) -> None:
        """Goes on after `pause` as if nothing had happened."""

    async def drop(self, ids: Sequence[str]) -> None:
        """Forgets requests in any state and frees their slots; their iterators end. Unknown ids are fine."""

    async def reserve(self, n: int) -> list[int]:
        """Slots for KV that is about to arrive; the engine touches them no more until `free` or a resume
        names them."""

    async def free(self, slots: Sequence[int]) -> None:
        """Gives back reserved slots that no resumed request took."""

    async def stats(self) -> dict[str, Any]:
        """Running, waiting and paused requests, free slots, totals; `requests`: RequestStats by id."""


class KvSharing(Protocol):
    """Beside `Engine`, of one whose sealed blocks can have several owners: they are copied while answers go on."""

    async def kv(self, known: Mapping[str, int], limit: int) -> dict[str, list[int]]:
        """Slots of the requests' sealed blocks, from block `known[id]` on, at most `limit` in all. They stay
        until `unhold`, whatever becomes of the request. Requests without any are absent."""

    async def have(self, hashes: Sequence[bytes]) -> list[int | None]:
        """Where this pool has these blocks; what is there stays until `unhold`."""

    async def land(self, slots: Sequence[int], names: Sequence[tuple[bytes, bytes]]) -> None:
        """Reserved slots now hold whole blocks of these (hash, checksum): sealed, until `unhold`."""

    async def unhold(self, slots: Sequence[int]) -> None:
        """One hold less of each; a slot named twice was held twice."""
