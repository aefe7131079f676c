"""Stop strings over text that comes in pieces; `held` is the whole state, so that it travels with a migration."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    def __init__(self, stop: Sequence[str], held: str = "") -> None:
        self._stop = [text for text in stop if text]
        self.held = held
        """Text that may be the beginning of a stop string, and is not shown until that is known."""

    def push(self, new: str) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string has ended the answer."""
        if not self._stop:
            return new, False
        text = self.held + new
        # The one that is complete first ends the answer, so that it does not matter how the text was cut into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self, new: str) -> str:
        """What is left when the answer ends for another reason."""
        text, stopped = self.push(new)
        held, self.held = self.held, ""
        return text if stopped else text + held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
