"""Trains the built-in engine's model: `python3 runtime/train/train_tiny.py --out FOLDER`.

Steps, all seeded: fetch the text (corpus.py), train the byte-level BPE, pack chapters and chat-shaped
excerpts into token streams, train the decoder with AdamW in float32 on the CPU, write the folder that the
engine loads. About 16 minutes on one core with OpenBLAS (`libopenblas0-serial`); with Debian's reference BLAS
it takes ten times as long. A run with the same torch, BLAS and thread count gives the same weights; another
BLAS gives equally good ones."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

# Both are read by the imports below.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import corpus  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from midstream_runtime.engine.builtin.dense import dense_logits  # noqa: E402
from midstream_runtime.engine.builtin.tokenizer import SPECIALS, Tokenizer, split_words  # noqa: E402
from midstream_runtime.engine.builtin.weights import (  # noqa: E402
    ModelConfig,
    Weights,
    random_weights,
    save_weights,
)

Word = tuple[int, ...]


def train_bpe(text: str, vocab_size: int) -> Tokenizer:
    """Most frequent pair first; ties go to the smaller pair, so that the result depends on the text alone."""
    counts = Counter(split_words(text))
    words: list[Word] = [tuple(word.encode()) for word in counts]
    weight = list(counts.values())
    pairs: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += weight[index]
            where[pair].add(index)
    merges: list[tuple[int, int]] = []
    while len(merges) < vocab_size - 256 - len(SPECIALS):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new_id = 256 + len(merges)
        merges.append(best)
        for index in where.pop(best):
            before, words[index] = words[index], merge(words[index], best, new_id)
            for pair in pairwise(before):
                pairs[pair] -= weight[index]
            for pair in pairwise(words[index]):
                pairs[pair] += weight[index]
                where[pair].add(index)
        del pairs[best]
    return Tokenizer(merges)


def merge(word: Word, pair: tuple[int, int], new_id: int) -> Word:
    out: list[int] = []
    at = 0
    while at < len(word):
        if word[at : at + 2] == pair:
            out.append(new_id)
            at += 2
        else:
            out.append(word[at])
            at += 1
    return tuple(out)


def chat_excerpt(rng: random.Random, tokenizer: Tokenizer, chapter: list[str]) -> list[int]:
    """The user says how a passage begins, the assistant goes on for some paragraphs and ends."""
    first = rng.randrange(len(chapter))
    passage = "\n\n".join(chapter[first : first + rng.randint(1, 6)])
    cut = passage.find(" ", rng.randint(10, 120))
    question, answer = (passage[:cut], passage[cut:]) if cut > 0 else ("Go on.", passage)
    special = tokenizer.special_ids
    return [
        tokenizer.bos_id,
        special["<|user|>"],
        *tokenizer.encode(question),
        tokenizer.eos_id,
        special["<|assistant|>"],
        *tokenizer.encode(answer.strip()),
        tokenizer.eos_id,
    ]


def token_stream(tokenizer: Tokenizer, books: list[list[list[str]]], seed: int, chats: int) -> torch.Tensor:
    """All chapters in random order with `chats` excerpts between them, as one row of ids."""
    rng = random.Random(seed)
    chapters = [chapter for book in books for chapter in book]
    pieces = [
        [tokenizer.bos_id, *tokenizer.encode("\n\n".join(chapter)), tokenizer.eos_id] for chapter in chapters
    ]
    pieces += [chat_excerpt(rng, tokenizer, rng.choice(chapters)) for _ in range(chats)]
    rng.shuffle(pieces)
    return torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)


def positions_with_gap(rng: random.Random, length: int, limit: int) -> torch.Tensor:
    """Positions that jump once, so that distances far beyond the trained length are not unheard of (PoSE)."""
    positions = torch.arange(length)
    positions[rng.randrange(1, length) :] += rng.randrange(limit - length)
    return positions


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = 100
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def train(config: ModelConfig, stream: torch.Tensor, args: argparse.Namespace) -> Weights:
    rng = random.Random(args.seed)
    weights = random_weights(config, args.seed)
    for tensor in weights.values():
        tensor.requires_grad_(True)
    matrices = [tensor for tensor in weights.values() if tensor.dim() > 1]
    vectors = [tensor for tensor in weights.values() if tensor.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    started, recent = time.monotonic(), 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        starts = [rng.randrange(len(stream) - args.length - 1) for _ in range(args.batch)]
        rows = torch.stack([stream[start : start + args.length + 1] for start in starts])
        far = rng.random() < 0.2
        positions = positions_with_gap(rng, args.length, config.max_position_embeddings) if far else None
        logits = dense_logits(config, weights, rows[:, :-1], positions)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            tokens = (step + 1) * args.batch * args.length
            seconds = time.monotonic() - started
            print(
                f"step {step} loss {recent:.3f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s", flush=True
            )
        if step % 500 == 499:
            write(config, weights, args.out)
    return weights


def write(config: ModelConfig, weights: Weights, out: Path) -> None:
    save_weights(
        {name: tensor.detach().half() for name, tensor in weights.items()}, out / "model.safetensors"
    )
    config.save(out / "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, default=Path("build/train"), help="where the text's package is kept"
    )
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    books = [corpus.chapters(lines) for lines in corpus.novels(corpus.fetch(args.cache))]
    text = "\n\n".join(paragraph for book in books for chapter in book for paragraph in chapter)
    tokenizer = train_bpe(text, args.vocab)
    tokenizer.save(args.out / "tokenizer.json")
    stream = token_stream(tokenizer, books, args.seed, chats=800)
    print(f"{len(text)} characters, {len(stream)} tokens", flush=True)
    config = ModelConfig(
        vocab_size=args.vocab,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    write(config, train(config, stream, args), args.out)
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "repetition_penalty": 1.3,
    }
    (args.out / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
