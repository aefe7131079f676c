"""Choosing the next token, for all requests of a step at once.

Random numbers are a function of (seed, counter): the sampler's whole state is those two integers, and it is
carried to another node exactly. A token depends on its own row of logits only, never on the other requests of
the batch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from midstream_runtime.engine.protocol import SamplingParams

PENALTY_WINDOW = 256
"""Newest tokens that the repetition penalty looks at."""


def uniform(seed: int, counter: int) -> float:
    """53 random bits in [0, 1)."""
    key = (seed & (1 << 64) - 1).to_bytes(8, "little")
    digest = hashlib.blake2b(counter.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass
class Sampler:
    """State of one request's choices."""

    params: SamplingParams
    repetition_penalty: float
    seed: int
    counter: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated, kept only where a penalty needs it."""

    @property
    def counts_needed(self) -> bool:
        return bool(self.params.presence_penalty or self.params.frequency_penalty)

    def accept(self, token: int) -> None:
        if self.counts_needed:
            self.counts[token] += 1

    def draw(self) -> float:
        value = uniform(self.seed, self.counter)
        self.counter += 1
        return value


def choose(
    logits: torch.Tensor, samplers: Sequence[Sampler], recent: torch.Tensor
) -> tuple[list[int], list[float | None]]:
    """Next token of each row, and its log probability where it was asked for.

    `logits` [rows, vocab] float32 is changed; `recent` [rows, PENALTY_WINDOW] holds ids, -1 where there are
    fewer. Log probabilities are of the model's own distribution, before penalties and temperature."""
    wanted = [row for row, sampler in enumerate(samplers) if sampler.params.logprobs]
    original = logits[wanted].log_softmax(-1) if wanted else None
    _penalise(logits, samplers, recent)
    tokens: list[int] = logits.argmax(-1).tolist()
    random = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    if random:
        for row, token in zip(
            random, _sample(logits[random], [samplers[row] for row in random]), strict=True
        ):
            tokens[row] = token
    logprobs: list[float | None] = [None] * len(tokens)
    if original is not None:
        for index, row in enumerate(wanted):
            logprobs[row] = float(original[index, tokens[row]])
    return tokens, logprobs


def _penalise(logits: torch.Tensor, samplers: Sequence[Sampler], recent: torch.Tensor) -> None:
    rows = [row for row, sampler in enumerate(samplers) if sampler.repetition_penalty != 1.0]
    if rows:
        penalty = torch.tensor([samplers[row].repetition_penalty for row in rows])[:, None]
        # Where there are fewer ids, the first one stands in: writing a value twice changes nothing.
        ids = recent[rows]
        ids = torch.where(ids < 0, ids[:, :1], ids)
        seen = logits[rows].gather(1, ids)
        part = logits[rows].scatter(1, ids, torch.where(seen > 0, seen / penalty, seen * penalty))
        logits[rows] = part
    for row, sampler in enumerate(samplers):
        if sampler.counts:
            index = torch.tensor(list(sampler.counts.keys()))
            count = torch.tensor(list(sampler.counts.values()), dtype=logits.dtype)
            params = sampler.params
            logits[row, index] -= params.presence_penalty + params.frequency_penalty * count


def _sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Temperature, then top_k, then top_p, then the inverse of the cumulative distribution at the request's
    own draw."""
    vocab = logits.shape[1]
    temperature = torch.tensor([s.params.temperature for s in samplers], dtype=torch.float64)[:, None]
    top_k = torch.tensor([s.params.top_k if s.params.top_k > 0 else vocab for s in samplers])[:, None]
    top_p = torch.tensor([s.params.top_p for s in samplers], dtype=torch.float64)[:, None]
    draws = torch.tensor([s.draw() for s in samplers], dtype=torch.float64)[:, None]
    ordered, order = torch.sort(logits.double() / temperature, dim=1, descending=True, stable=True)
    probability = ordered.softmax(1)
    before = probability.cumsum(1) - probability
    outside = (torch.arange(vocab) >= top_k) | (before >= top_p)
    outside[:, 0] = False
    cumulative = probability.masked_fill(outside, 0.0).cumsum(1)
    picked = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp_(max=vocab - 1)
    chosen: list[int] = order.gather(1, picked).view(-1).tolist()
    return chosen
