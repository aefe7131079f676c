"""One line that says where a MigrationJob is: redrawn in place on a terminal, a line a change elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

PHASES = ("Pending", "Preparing", "Switching", "Committing", "Succeeded")
WIDTH = 20


def line(job: dict[str, Any], seconds: float) -> str:
    status = job.get("status") or {}
    phase = status.get("phase", "Pending")
    source, target = status.get("source") or {}, status.get("target") or {}
    way = f"{source['nodeName']} -> {target['nodeName']}" if target else ""
    parts = [bar(phase), f"{phase:<10}", f"{source.get('step', ''):<12}", way, _kv(status), _streams(status)]
    if phase == "Pending" and status.get("message"):
        parts.append(status["message"][:60])
    return f"{'  '.join(p for p in parts if p.strip())}  {seconds:.1f} s"


def bar(phase: str) -> str:
    """Full at the end, whichever it is."""
    done = PHASES.index(phase) if phase in PHASES else len(PHASES) - 1
    filled = WIDTH * done // (len(PHASES) - 1)
    return f"[{'#' * filled}{'.' * (WIDTH - filled)}]"


def _kv(status: dict[str, Any]) -> str:
    kv = status.get("kv") or {}
    total = kv.get("bytesTotal", 0)
    done = min(kv.get("bytesSent", 0) + kv.get("bytesShared", 0), total)
    return f"KV {100 * done // total}% of {total / 1e6:.1f} MB" if total else ""


def _streams(status: dict[str, Any]) -> str:
    counts = status.get("streams") or {}
    return f"{counts['migrated']}/{counts['total']} streams" if counts.get("total") else ""


class Progress:
    def __init__(self, out: Callable[[str], Any], live: bool) -> None:
        self._out = out
        self._live = live
        self._began: float | None = None
        self._shown = ""
        self._drawn = False

    def show(self, job: dict[str, Any], at_s: float) -> None:
        self._began = at_s if self._began is None else self._began
        text = line(job, at_s - self._began)
        if self._live:
            sys.stdout.write(f"\r\x1b[K{text}")
            sys.stdout.flush()
            self._drawn = True
        elif (what := text.rpartition("  ")[0]) != self._shown:
            self._shown = what
            self._out(text)

    def end(self) -> None:
        """The next line begins on a line of its own."""
        if self._drawn:
            sys.stdout.write("\n")
            sys.stdout.flush()
