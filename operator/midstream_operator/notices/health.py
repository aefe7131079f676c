"""Whether a source of notices can be heard: it must never be silent without being named."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(slots=True)
class Health:
    name: str
    error: str = ""  # empty: it answers
    since_s: float = 0.0  # Unix time of the first failure of this kind
    queue_age_s: float = 0.0  # of the last message, where there is a queue

    def well(self) -> None:
        self.error, self.since_s = "", 0.0

    def ill(self, error: str) -> None:
        if not self.error:
            self.since_s = time.time()
        self.error = error

    def __str__(self) -> str:
        return f"{self.name}: {f'{self.error} (for {time.time() - self.since_s:.0f} s)' if self.error else 'ok'}"
