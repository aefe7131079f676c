"""From tokens to the text a client sees: whole characters only, and nothing that may be part of a stop
string."""

from __future__ import annotations

from collections.abc import Sequence

from midstream_runtime.engine.builtin.tokenizer import IncrementalDecoder, Tokenizer
from midstream_runtime.engine.stops import StopText


class TextStream:
    """Text of one answer. Its whole state is `undecoded` and `held`, so that it travels with a migration."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], undecoded: bytes = b"", held: str = ""
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, undecoded)
        self._stops = StopText(stop, held)

    @property
    def undecoded(self) -> bytes:
        return self._decoder.pending

    @property
    def held(self) -> str:
        return self._stops.held

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string has ended the answer."""
        return self._stops.push(self._decoder.push(token_id))

    def finish(self) -> str:
        """What is left when the answer ends for another reason than a stop string."""
        return self._stops.finish(self._decoder.finish())
