"""Requests, their KV slots, and the order of work: continuous batching without any socket.

One thread calls everything here. `step()` decodes one token for each running request and some prefill for
those that are not there yet; between two steps every request is at a token boundary, which is where `pause`
finds it. KV of the newest token is not in the pool at a boundary: it is computed by the step that decodes the
next one."""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from midstream_runtime.contract.errors import Final
from midstream_runtime.contract.pool import ROOT_HASH, block_hash
from midstream_runtime.engine.builtin.model import PagedDecoder, Work, integers
from midstream_runtime.engine.builtin.sampling import PENALTY_WINDOW, Sampler, choose
from midstream_runtime.engine.builtin.text import TextStream
from midstream_runtime.engine.builtin.tokenizer import Tokenizer
from midstream_runtime.engine.protocol import (
    EngineState,
    FinishReason,
    KvBlock,
    RequestStats,
    SamplingParams,
    TokenEvent,
)
from midstream_runtime.pool import KvPool


@dataclass(frozen=True)
class CoreSettings:
    max_running: int = 512
    """Requests decoded in one step; more wait."""
    prefill_tokens: int = 128
    """Prompt tokens computed in one step, so that a long prompt delays the others by little."""
    repetition_penalty: float = 1.0
    """For requests that do not say."""


class Phase(Enum):
    WAITING = "waiting"
    """Not admitted: no lane or no KV slots yet."""
    RUNNING = "running"
    PAUSED = "paused"
    """At a token boundary; keeps lane and slots."""


@dataclass
class Request:
    """One answer. `ids` is the prompt and all that was generated."""

    request_id: str
    ids: list[int]
    prompt_length: int
    params: SamplingParams
    sampler: Sampler
    text: TextStream
    phase: Phase = Phase.WAITING
    lane: int = -1
    slots: list[int] = field(default_factory=list)
    kv_length: int = 0
    """Tokens of `ids` whose KV is in `slots`."""
    parent_hash: bytes = ROOT_HASH
    sealed: int = 0
    """Leading slots that are sealed."""
    prefill_tokens: int = 0
    kv_tokens_used: int = 0
    decoding: bool = False
    """Prefill is behind it, or was not needed."""

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_length

    def stats(self) -> RequestStats:
        return RequestStats(self.prompt_length, self.generated, self.prefill_tokens, self.kv_tokens_used)


Event = tuple[str, TokenEvent]


class EngineCore:
    """The engine behind its socket. Errors are of midstream_runtime.contract.errors."""

    def __init__(
        self, decoder: PagedDecoder, pool: KvPool, tokenizer: Tokenizer, settings: CoreSettings
    ) -> None:
        self.decoder, self.pool, self.tokenizer, self.settings = decoder, pool, tokenizer, settings
        self.context = decoder.config.max_position_embeddings
        self.requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: dict[str, Request] = {}
        self._unsealed: dict[str, Request] = {}
        self._lanes = list(range(settings.max_running - 1, -1, -1))
        self._recent = torch.full((settings.max_running, PENALTY_WINDOW), -1, dtype=torch.int64)
        self._block_tokens = pool.layout.block_tokens
        self.totals: Counter[str] = Counter()

    # Requests come and go

    def add(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, paused: bool = False
    ) -> None:
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._enter(self._request(request_id, EngineState(list(prompt_ids), [], params, seed, 0)), paused)

    def add_state(self, request_id: str, state: EngineState, *, paused: bool = False) -> None:
        """Goes on from a state. Slots that it names must be reserved; they are the request's from here on."""
        request = self._request(request_id, state)
        self._adopt(request, state.kv)
        self._enter(request, paused)

    def pause(self, request_ids: Iterable[str]) -> dict[str, EngineState]:
        """At the boundary where they are now. Idempotent."""
        states = {}
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is None:
                continue
            if request.phase is Phase.WAITING:
                self._waiting.remove(request)
            self._running.pop(request_id, None)
            request.phase = Phase.PAUSED
            states[request_id] = self._state(request)
        return states

    def resume(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None and request.phase is Phase.PAUSED:
                self._start(request)

    def drop(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                self._forget(request)

    # Work

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def step(self, interrupted: Callable[[], bool] = lambda: False) -> list[Event]:
        """One token for each decoding request. Raises Interrupted, after which everything is as before."""
        self._admit()
        works = self._plan()
        if not works:
            return []
        logits = self.decoder.step([work for _, work in works], interrupted)
        self.totals["steps"] += 1
        ready, rows = [], []
        for row, (request, work) in enumerate(works):
            self._computed(request, work)
            if request.kv_length == len(request.ids):
                ready.append(request)
                rows.append(row)
        return self._sample(ready, logits[rows]) if ready else []

    def sealed_slots(self, request_id: str, first: int) -> list[int]:
        """Slots of the request's sealed blocks from number `first` on; none for a request that is not there."""
        request = self.requests.get(request_id)
        return [] if request is None else request.slots[first : request.sealed]

    def seal_blocks(self, limit: int = 64) -> None:
        """Hashes up to `limit` full blocks. Apart from the step, so that it costs the time between two
        tokens, and that the many blocks of a moved answer do not delay its first token."""
        for request_id, request in list(self._unsealed.items()):
            full = request.kv_length // self._block_tokens
            while request.sealed < full and limit > 0:
                self._seal_next(request)
                limit -= 1
            if request.sealed < full:
                return
            del self._unsealed[request_id]

    def stats(self) -> dict[str, object]:
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "paused": len(self.requests) - len(self._running) - len(self._waiting),
            "free_slots": self.pool.free_slots,
            "slots": self.pool.layout.slots,
            "totals": dict(self.totals),
            "requests": {name: request.stats() for name, request in self.requests.items()},
        }

    # Inside

    def _request(self, request_id: str, state: EngineState) -> Request:
        params, ids = state.params, state.prompt_ids + state.generated_ids
        if request_id in self.requests:
            raise Final("request_exists", f"request {request_id} is already there: use another id")
        self._check(state, ids)
        penalty = params.repetition_penalty
        sampler = Sampler(
            params,
            self.settings.repetition_penalty if penalty is None else penalty,
            state.seed,
            state.counter,
        )
        if sampler.counts_needed:
            sampler.counts.update(state.generated_ids)
        text = TextStream(self.tokenizer, params.stop, state.undecoded, state.held_text)
        return Request(request_id, ids, len(state.prompt_ids), params, sampler, text)

    def _check(self, state: EngineState, ids: list[int]) -> None:
        """Refuses what this engine can never finish."""
        params = state.params
        if not state.prompt_ids:
            raise Final("empty_prompt", "a prompt needs at least one token")
        if min(ids) < 0 or max(ids) >= self.tokenizer.vocab_size:
            raise Final("bad_token", f"token ids must be 0..{self.tokenizer.vocab_size - 1}")
        if len(ids) >= self.context:
            raise Final("context_full", f"{len(ids)} tokens leave no room in a context of {self.context}")
        if params.max_tokens < 1 or params.temperature < 0 or not 0 < params.top_p <= 1:
            raise Final("bad_params", "max_tokens >= 1, temperature >= 0 and 0 < top_p <= 1 are needed")
        if len(state.generated_ids) >= params.max_tokens:
            raise Final("state_finished", f"this answer had its {params.max_tokens} tokens already")
        longest = min(len(state.prompt_ids) + params.max_tokens, self.context)
        if self._blocks(longest) > self.pool.layout.slots:
            raise Final(
                "pool_too_small",
                f"{longest} tokens never fit the KV pool: raise --pool-slots or ask for fewer",
            )

    def _enter(self, request: Request, paused: bool) -> None:
        self.requests[request.request_id] = request
        request.phase = Phase.PAUSED
        if request.slots and self._lanes:
            # A moved answer has its KV already: it must not queue behind new prompts.
            self._place(request)
        if not paused:
            self._start(request)

    def _start(self, request: Request) -> None:
        if request.lane >= 0:
            request.phase = Phase.RUNNING
            self._running[request.request_id] = request
        else:
            request.phase = Phase.WAITING
            self._waiting.append(request)

    def _adopt(self, request: Request, kv: Sequence[KvBlock]) -> None:
        """Takes the leading full blocks and at most one partial one; the rest goes back to the pool. Blocks
        that are sealed already are shared, when they are what the ids say."""
        named = [block.slot for block in kv if block.slot is not None]
        shared = [slot for slot in named if self.pool.name_of(slot) is not None]
        own = [slot for slot in named if self.pool.name_of(slot) is None]
        self.pool.adopt(own)
        self.pool.share(shared)
        usable, tokens, whole = self._usable(request, kv, set(shared))
        self.pool.release(named[len(usable) :])
        unsealed = set(own)
        self.decoder.load_slots([slot for slot in usable if slot in unsealed])
        request.slots, request.kv_length, request.kv_tokens_used = usable, tokens, tokens
        request.sealed, request.parent_hash = whole
        self.totals["kv_tokens_used"] += tokens
        self.totals["kv_blocks_shared"] += len(set(shared).intersection(usable))

    def _usable(
        self, request: Request, kv: Sequence[KvBlock], shared: set[int]
    ) -> tuple[list[int], int, tuple[int, bytes]]:
        """Slots in front that hold KV of the request's ids, their tokens, and how many of them are sealed from
        the beginning, with the last one's hash."""
        usable: list[int] = []
        tokens, size, sealed = 0, self._block_tokens, 0
        parent = whole_parent = ROOT_HASH
        last_shared = max((at for at, block in enumerate(kv) if block.slot in shared), default=-1)
        for at, block in enumerate(kv):
            if block.slot is None or not 0 < block.tokens <= size or tokens % size:
                break
            if tokens + block.tokens > len(request.ids) - 1:
                break
            if at <= last_shared:
                if block.tokens < size:
                    break
                parent = block_hash(parent, request.ids[tokens : tokens + size])
                if block.slot in shared and self.pool.name_of(block.slot) != parent:
                    self.totals["kv_hash_mismatch"] += 1
                    break
                if sealed == at and block.slot in shared:
                    sealed, whole_parent = at + 1, parent
            usable.append(block.slot)
            tokens += block.tokens
        return usable, tokens, (sealed, whole_parent)

    def _admit(self) -> None:
        """In order of arrival, while a lane and slots for the tokens so far are there, and one more slot for
        each request that runs. An answer that grows beyond what is free costs the newest one its slots
        (`_preempt`)."""
        spare = self.pool.free_slots - len(self._running)
        while self._waiting and self._lanes:
            request = self._waiting[0]
            spare -= self._blocks(len(request.ids) + 1) - len(request.slots) + 1
            if spare < 0 and self._running:
                return
            self._waiting.popleft()
            self._place(request)
            self._start(request)

    def _place(self, request: Request) -> None:
        request.lane = self._lanes.pop()
        # A ring: the id at position i of the answer is in place i % PENALTY_WINDOW.
        newest = request.ids[-PENALTY_WINDOW:]
        turn = len(request.ids) % PENALTY_WINDOW if len(newest) == PENALTY_WINDOW else 0
        ring = newest[len(newest) - turn :] + newest[: len(newest) - turn]
        self._recent[request.lane] = integers(ring + [-1] * (PENALTY_WINDOW - len(ring)))
        if request.slots:
            self.decoder.set_slots(request.lane, 0, request.slots)

    def _plan(self) -> list[tuple[Request, Work]]:
        """Everyone's next token, and prefill up to the budget. A request for which no slot is free sits the
        step out."""
        works, budget = [], self.settings.prefill_tokens
        for request in list(self._running.values()):
            if request.phase is not Phase.RUNNING:
                continue
            left = len(request.ids) - request.kv_length
            count = 1 if left == 1 else min(left, budget)
            if count == 0 or not self._provide(request, request.kv_length + count):
                continue
            if left > 1:
                budget -= count
            first = request.kv_length
            works.append((request, Work(request.lane, first, request.ids[first : first + count])))
        return works

    def _provide(self, request: Request, length: int) -> bool:
        missing = self._blocks(length) - len(request.slots)
        while missing > self.pool.free_slots:
            newest = next(reversed(self._running.values()))
            if newest is request:
                return False
            self._preempt(newest)
        if missing > 0:
            slots = self.pool.allocate(missing)
            self.decoder.set_slots(request.lane, len(request.slots), slots)
            request.slots += slots
        return True

    def _computed(self, request: Request, work: Work) -> None:
        """KV of `work` is in the pool: counts it and seals the blocks that are full."""
        request.kv_length += len(work.ids)
        if not request.decoding:
            # The newest generated token is no prefill: every engine computes it, moved or not.
            done = request.kv_length == len(request.ids)
            count = len(work.ids) - (1 if done and request.generated else 0)
            request.prefill_tokens += count
            self.totals["prefill_tokens"] += count
            request.decoding = done
        if request.kv_length // self._block_tokens > request.sealed:
            self._unsealed[request.request_id] = request

    def _preempt(self, request: Request) -> None:
        """Gives its slots to older requests; it will be computed again from its ids."""
        self.totals["preempted"] += 1
        self._running.pop(request.request_id)
        self._unsealed.pop(request.request_id, None)
        self.pool.release(request.slots)
        self._lanes.append(request.lane)
        request.slots, request.lane, request.kv_length, request.sealed = [], -1, 0, 0
        request.parent_hash, request.decoding, request.phase = ROOT_HASH, False, Phase.WAITING
        self._waiting.appendleft(request)

    def _seal_next(self, request: Request) -> None:
        first = request.sealed * self._block_tokens
        block = request.ids[first : first + self._block_tokens]
        request.parent_hash = self.pool.seal(request.slots[request.sealed], request.parent_hash, block)
        request.sealed += 1

    def _sample(self, ready: list[Request], logits: torch.Tensor) -> list[Event]:
        recent = self._recent[torch.tensor([request.lane for request in ready])]
        tokens, logprobs = choose(logits, [request.sampler for request in ready], recent)
        lanes = torch.tensor([request.lane for request in ready])
        places = torch.tensor([len(request.ids) % PENALTY_WINDOW for request in ready])
        self._recent[lanes, places] = torch.tensor(tokens)
        self.totals["tokens"] += len(tokens)
        return [
            self._event(request, token, logprob)
            for request, token, logprob in zip(ready, tokens, logprobs, strict=True)
        ]

    def _event(self, request: Request, token: int, logprob: float | None) -> Event:
        request.ids.append(token)
        request.sampler.accept(token)
        text, stopped = request.text.push(token)
        reason: FinishReason | None = None
        if stopped or (token == self.tokenizer.eos_id and not request.params.ignore_eos):
            reason = "stop"
        elif request.generated >= request.params.max_tokens or len(request.ids) >= self.context:
            reason = "length"
        if reason is None:
            return request.request_id, TokenEvent(token, text, None, logprob)
        if not stopped:
            text += request.text.finish()
        self._forget(request)
        return request.request_id, TokenEvent(token, text, reason, logprob, request.stats())

    def _state(self, request: Request) -> EngineState:
        size = self._block_tokens
        # Slots that were allocated for a step that did not happen hold nothing.
        used = self._blocks(request.kv_length)
        fills = [min(size, request.kv_length - at * size) for at in range(used)]
        for at in range(request.sealed, used):
            self.pool.note_open(request.slots[at], fills[at])
        return EngineState(
            prompt_ids=request.ids[: request.prompt_length],
            generated_ids=request.ids[request.prompt_length :],
            params=request.params,
            seed=request.sampler.seed,
            counter=request.sampler.counter,
            kv=[KvBlock(slot, fill) for slot, fill in zip(request.slots[:used], fills, strict=True)],
            undecoded=request.text.undecoded,
            held_text=request.text.held,
        )

    def _forget(self, request: Request) -> None:
        del self.requests[request.request_id]
        self._running.pop(request.request_id, None)
        self._unsealed.pop(request.request_id, None)
        if request.phase is Phase.WAITING:
            self._waiting.remove(request)
        self.pool.release(request.slots)
        if request.lane >= 0:
            self._lanes.append(request.lane)
        request.slots, request.lane = [], -1

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)
