"""The built-in engine with a decoder that computes nothing, and KV of Llama-3-8B's shape: `synthetic_engine.py SOCKET
SLOTS PACE_MS`, run by a Python with torch. For bench_kv.py: what a switch costs with 2 MiB a block, long contexts, and
no GPU. Everything but the arithmetic is the engine's own: pool, sealing, pause, adoption.

The next token is made of what the pool holds for the two before it, so KV that did not come would change the answer.
It is one that has text of its own: a token without any (half a character) is no event, and would look like a gap.
"""

from __future__ import annotations

import os
import signal
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runtime"))

import torch
from midstream_runtime.contract.pool import PoolLayout
from midstream_runtime.engine.builtin import model, server
from midstream_runtime.engine.builtin.core import CoreSettings, EngineCore
from midstream_runtime.engine.builtin.tokenizer import Tokenizer
from midstream_runtime.engine.protocol import EngineInfo, PoolInfo
from midstream_runtime.pool import KvPool

TINY = Path(server.__file__).parent / "tiny"
BLOCK_TOKENS, LAYERS, KV_HEADS, HEAD_DIM = 16, 32, 8, 128  # 2 MiB a block in float16
CONTEXT = 40_000


@dataclass
class Config:
    max_position_embeddings: int = CONTEXT


class Decoder:
    """As model.PagedDecoder, for who uses it; each token fills its row of all layers with its id."""

    def __init__(self, pool: KvPool, tokenizer: Tokenizer, lanes: int) -> None:
        self.config, self.pool, self.vocabulary = Config(), pool, tokenizer.vocab_size
        special = set(tokenizer.special_ids.values())
        self._said = [i for i in range(self.vocabulary) if i not in special and tokenizer.token_bytes(i).isalpha()]
        self._slots = pool.rows().view(pool.layout.slots, LAYERS * 2, BLOCK_TOKENS, KV_HEADS * HEAD_DIM)
        self._tables = [array("q") for _ in range(lanes)]

    def set_slots(self, lane: int, first_block: int, slots: Sequence[int]) -> None:
        self._tables[lane][first_block:] = array("q", slots)

    def load_slots(self, slots: Sequence[int]) -> None:
        """The pool is what is read."""

    def step(self, works: Sequence[model.Work], interrupted: Callable[[], bool] = lambda: False) -> torch.Tensor:
        logits = torch.zeros(len(works), self.vocabulary)
        for row, work in enumerate(works):
            for at, token in enumerate(work.ids, work.start):
                self._row(work.lane, at)[:] = token
            last = work.start + len(work.ids) - 1
            seen = [int(self._row(work.lane, at)[0, 0]) for at in (last, max(last - 1, 0))]
            logits[row, self._said[(seen[0] * 31 + seen[1] * 17 + 7) % len(self._said)]] = 1.0
        return logits

    def _row(self, lane: int, at: int) -> torch.Tensor:
        return self._slots[self._tables[lane][at // BLOCK_TOKENS], :, at % BLOCK_TOKENS]


def main() -> None:
    path, slots, pace_ms = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(TINY / "tokenizer.json")
    layout = PoolLayout(slots, BLOCK_TOKENS, LAYERS, KV_HEADS, HEAD_DIM, "float16", "synthetic".ljust(32, "0"))
    pool = KvPool(layout)
    decoder = Decoder(pool, tokenizer, lanes=4)
    core = EngineCore(decoder, pool, tokenizer, CoreSettings(max_running=4))  # type: ignore[arg-type]
    info = EngineInfo(
        model="synthetic", fingerprint=layout.model_fingerprint, context=CONTEXT, vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pace_ms=pace_ms, device="cpu",
        pool=PoolInfo(layout.fingerprint, slots, layout.slot_bytes, layout.data_offset, BLOCK_TOKENS),
    )  # fmt: skip
    engine = server.EngineServer(core, info, path, pace_ms)
    signal.set_wakeup_fd(engine.wakeup_fd)
    signal.signal(signal.SIGTERM, lambda *_: engine.stop())
    print(f"engine ready {os.getpid()}", flush=True)
    engine.run()


if __name__ == "__main__":
    main()
