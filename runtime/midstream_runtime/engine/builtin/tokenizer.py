"""Byte-level BPE: text to token ids and back, without a third-party library.

The engine, the training script and the tests share this module, so it must stay free of torch. Ids are laid
out as 256 single bytes, then one id a merge in the order of training, then the special tokens. Every text has
an encoding (bytes are tokens), and every sequence of ids has bytes; only complete UTF-8 sequences may be
shown to a client, which is `IncrementalDecoder`'s business."""

from __future__ import annotations

import codecs
import json
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)(?![a-z])| ?[^\W\d_]+| ?\d+| ?[^\s\w]+| ?_+|\s+(?!\S)|\s+")

BOS, END, SYSTEM, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = (BOS, END, SYSTEM, USER, ASSISTANT)


def split_words(text: str) -> list[str]:
    """Pieces inside which merges may happen; their concatenation is `text`."""
    return _WORD.findall(text)


class Tokenizer:
    """Immutable after construction; safe to share between threads."""

    def __init__(self, merges: list[tuple[int, int]]) -> None:
        self.merges = merges
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._bytes: list[bytes] = [bytes([value]) for value in range(256)]
        for left, right in merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])
        first_special = len(self._bytes)
        self.special_ids = {name: first_special + i for i, name in enumerate(SPECIALS)}
        self._bytes.extend(b"" for _ in SPECIALS)
        self.vocab_size = len(self._bytes)
        self.bos_id = self.special_ids[BOS]
        self.eos_id = self.special_ids[END]
        self._encode_word = lru_cache(maxsize=65536)(self._merge)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("kind") != "midstream-bpe" or data.get("version") != 1:
            raise ValueError(f"{path} is no version 1 midstream-bpe tokenizer: train the model again")
        return cls([(left, right) for left, right in data["merges"]])

    def save(self, path: Path) -> None:
        data = {"kind": "midstream-bpe", "version": 1, "specials": list(SPECIALS), "merges": self.merges}
        path.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. The names of special tokens inside a text are text: a prompt cannot forge a
        role."""
        ids: list[int] = []
        for word in split_words(text):
            ids.extend(self._encode_word(word))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; special tokens have none."""
        return self._bytes[token_id]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def _merge(self, word: str) -> tuple[int, ...]:
        ids = list(word.encode("utf-8", errors="replace"))
        while len(ids) > 1:
            rank, at = min((self._rank.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(ids)))
            if rank == 1 << 30:
                break
            ids[at : at + 2] = [256 + rank]
        return tuple(ids)


class IncrementalDecoder:
    """Bytes of successive tokens in, text out, never half a character.

    An invalid byte becomes U+FFFD as soon as it is known to be invalid; an incomplete sequence waits for its
    rest."""

    def __init__(self, tokenizer: Tokenizer, pending: bytes = b"") -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._utf8.setstate((pending, 0))

    @property
    def pending(self) -> bytes:
        """Bytes of the incomplete character, the decoder's whole state."""
        return self._utf8.getstate()[0]

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Text of what is still incomplete at the end of the answer."""
        return self._utf8.decode(b"", final=True)
