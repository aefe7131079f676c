"""One answer of a vLLM server: which ids it has, which text was shown, where it can go on.

The server sends text and ids, but not which text belongs to which id: half a character is held back until its other
half comes. So an answer goes on from its newest *settled* id, one whose text is known to be out. The ids behind it
are generated again, and text that was shown already (`shown`) is compared and skipped.

    prompt ids | ... settled ids | unsettled ids        what the server is asked to continue: prompt + settled
                                 '-- shown text --'     compared with what it generates first

How an answer goes on (docs/vllm.md has the table):

    ids      settled ids become part of the prompt; nothing is computed twice but the tail of the last KV block
    replay   from the prompt alone, with the same seed: for parameters that a new prompt would lose (penalties that
    count
             the answer's own tokens, a client's seed). Where the server then writes something else than was shown, the
             answer goes on from its ids: a stream never stops for that.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from midstream_runtime.engine.protocol import EngineState, FinishReason, RequestStats, SamplingParams, TokenEvent
from midstream_runtime.engine.stops import StopText

Mode = Literal["ids", "replay"]


class Diverged(Exception):
    """The server generated other text than was shown."""


def mode_of(params: SamplingParams) -> Mode:
    """Which way an answer with these parameters goes on."""
    counts_own_tokens = params.presence_penalty != 0 or params.frequency_penalty != 0
    seeded = params.seed is not None and not greedy(params)
    return "replay" if counts_own_tokens or seeded else "ids"


def greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 and "temperature" not in params.unset


@dataclass
class Answer:
    prompt_ids: list[int]
    params: SamplingParams
    mode: Mode
    seed: int | None
    """Given by the client, or drawn here for an answer that may have to be replayed."""
    ids: list[int] = field(default_factory=list)
    """Generated so far."""
    settled: int = 0
    shown: str = ""
    """Text of ids[settled:] (of all ids with `replay`) that was handed on, before stop strings are looked for."""
    held: str = ""
    delivered: int = 0
    """Ids of which the gateway has heard; the others are new."""
    skip: str = field(default="", init=False)
    """What of `shown` the server has still to repeat."""
    finished: bool = field(default=False, init=False)
    kv_tokens: int = field(default=0, init=False)
    """That came with the answer."""
    asked_tokens: int = field(default=0, init=False)
    """Length of the prompt that the server was given last."""
    _before: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._stops = StopText(self.params.stop, self.held)

    @classmethod
    def new(cls, prompt_ids: Sequence[int], params: SamplingParams) -> Answer:
        mode = mode_of(params)
        seed = params.seed
        if mode == "replay" and seed is None and not greedy(params):
            seed = secrets.randbits(62)
        return cls(list(prompt_ids), params, mode, seed)

    # -- state that travels --------------------------------------------------------------------------------

    def state(self) -> EngineState:
        """Without KV: see `kv_ids`."""
        return EngineState(
            prompt_ids=list(self.prompt_ids),
            generated_ids=list(self.ids),
            params=self.params,
            seed=self.seed or 0,
            counter=0,
            held_text=self._stops.held,
            extra={
                "engine": "vllm", "mode": self.mode, "seeded": self.seed is not None, "settled": self.settled,
                "shown": self.shown,
            },
        )  # fmt: skip

    @classmethod
    def restore(cls, state: EngineState) -> Answer:
        extra = state.extra
        settled = int(extra["settled"])
        if not 0 <= settled <= len(state.generated_ids):
            raise ValueError(f"{settled} settled ids of {len(state.generated_ids)}")
        return cls(
            list(state.prompt_ids),
            state.params,
            "replay" if extra["mode"] == "replay" else "ids",
            state.seed if extra["seeded"] else None,
            list(state.generated_ids),
            settled,
            str(extra["shown"]),
            state.held_text,
            len(state.generated_ids),
        )

    @property
    def kv_ids(self) -> list[int]:
        """The ids whose KV is of use where the answer goes on."""
        return self.prompt_ids if self.mode == "replay" else self.prompt_ids + self.ids[: self.settled]

    # -- what the server is asked --------------------------------------------------------------------------

    def begin(self) -> list[int]:
        """The ids to continue. What the server sends from here on repeats what is behind them."""
        self._before = list(self.ids)
        if self.mode == "replay":
            self.settled = 0
        del self.ids[self.settled :]
        self.skip = self.shown
        self.asked_tokens = len(self.kv_ids)
        return self.kv_ids

    def settle(self) -> None:
        """The text of all ids is out."""
        self.settled = len(self.ids)
        if self.mode == "ids":
            self.shown = ""

    def fall_back(self) -> None:
        """The server wrote something else than was shown: go on from the ids of what was shown."""
        self.mode, self.seed, self.ids, self.delivered = "ids", None, self._before, len(self._before)
        self.settle()

    def body(self, model: str, prompt: Sequence[int]) -> dict[str, Any]:
        params = self.params
        fields: dict[str, Any] = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": params.max_tokens - len(self.ids),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": self.seed,
            "ignore_eos": params.ignore_eos,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
            "logprobs": 0 if params.logprobs else None,
            "stream": True,
            "return_token_ids": True,
        }
        return {k: v for k, v in fields.items() if v is not None and k not in params.unset}

    # -- what the server sends -----------------------------------------------------------------------------

    def take(self, chunk: Mapping[str, Any]) -> list[TokenEvent]:
        """Events of one chunk of the stream; Diverged when it is not what was shown."""
        if not chunk.get("choices"):
            return []
        choice = chunk["choices"][0]
        new, text = list(choice.get("token_ids") or ()), str(choice.get("text") or "")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        fresh = self._fresh(text)
        self.ids += new
        if self.mode == "replay":
            self.shown += fresh
        elif text and not self.skip and len(new) == 1:
            # One id, and its text is out: nothing is held back behind it.
            self.settled, self.shown = len(self.ids), ""
        else:
            self.shown += fresh
        return self._events(new, fresh, logprobs, choice.get("finish_reason"))

    def _fresh(self, text: str) -> str:
        """The part of `text` that was not shown before."""
        if not self.skip:
            return text
        known = min(len(self.skip), len(text))
        if text[:known] != self.skip[:known]:
            raise Diverged
        self.skip = self.skip[known:]
        return text[known:]

    def _events(self, new: list[int], text: str, logprobs: Sequence[float], reason: str | None) -> list[TokenEvent]:
        shown, stopped = (self._stops.finish(text), False) if reason else self._stops.push(text)
        end: FinishReason | None = None
        if stopped or reason == "stop":
            end = "stop"
        elif reason is not None:
            end = "length" if reason == "length" else "error"
        values = [*logprobs, *[None] * (len(new) - len(logprobs))]
        known = max(0, self.delivered - (len(self.ids) - len(new)))
        events = [TokenEvent(name, "", None, value) for name, value in zip(new[known:], values[known:], strict=True)]
        self.delivered = max(self.delivered, len(self.ids))
        if not events and (shown or end):
            events.append(TokenEvent(-1, ""))
        if events:
            self.finished = end is not None
            events[-1] = events[-1]._replace(text=shown, finish_reason=end, usage=self.stats() if end else None)
        return events

    def stats(self) -> RequestStats:
        return RequestStats(
            len(self.prompt_ids), len(self.ids), max(0, self.asked_tokens - self.kv_tokens), self.kv_tokens
        )

    def give_up(self, reason: FinishReason) -> list[TokenEvent]:
        """The event that ends an answer to which the server adds nothing."""
        self.finished = True
        return [TokenEvent(-1, self._stops.finish(""), reason, None, self.stats())]
