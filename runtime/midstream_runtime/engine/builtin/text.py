"""From tokens to the text a client sees: whole characters only, and nothing that may be part of a stop
string."""

from __future__ import annotations

from collections.abc import Sequence

from midstream_runtime.engine.builtin.tokenizer import IncrementalDecoder, Tokenizer


class TextStream:
    """Text of one answer. Its whole state is `undecoded` and `held`, so that it travels with a migration."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], undecoded: bytes = b"", held: str = ""
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, undecoded)
        self._stop = [text for text in stop if text]
        self.held = held

    @property
    def undecoded(self) -> bytes:
        return self._decoder.pending

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string has ended the answer."""
        return self._release(self._decoder.push(token_id))

    def finish(self) -> str:
        """What is left when the answer ends for another reason than a stop string."""
        text, stopped = self._release(self._decoder.finish())
        held, self.held = self.held, ""
        return text if stopped else text + held

    def _release(self, new: str) -> tuple[str, bool]:
        if not self._stop:
            return new, False
        text = self.held + new
        # The one that is complete first ends the answer, so that it does not matter how the text was cut into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[: min(found)[1]], True
        keep = max(self._overlap(text, stop) for stop in self._stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` with which `stop` begins."""
        for size in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
