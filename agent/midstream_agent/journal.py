"""The journal of one job on one node: what was intended and decided, written before it is done.

It guards against crashes of the agent, not of the node: files are keyed by the kernel's boot id, and a
journal of another boot is history (its sockets and holds are gone with the kernel that held them). So a write only
has to reach the kernel, which keeps it when this process is killed; nothing waits for a disk while clients wait.

One JSON object a line, written with one write(2). `intent` and `done` lines tell how far a step came; `decision`
lines are the ones that docs/architecture.md rules by, and come before the act they announce:

    source: SENT, then COMMIT or ABORT, then RELEASED; each batch of a job has a journal of its own
    target: RESTORED, then ACTIVATED or DISCARDED
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DECISIONS = frozenset({"SENT", "COMMIT", "ABORT", "RELEASED", "RESTORED", "ACTIVATED", "DISCARDED", "GONE"})
FINAL = frozenset({"RELEASED", "ABORT_DONE", "ACTIVATED_DONE", "DISCARDED"})


class Journal:
    """Append-only record of one job. The file is the owner's until `remove`."""

    def __init__(self, path: Path, lines: list[dict[str, Any]]) -> None:
        self.path = path
        self.lines = lines
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the job

    @classmethod
    def create(cls, folder: Path, side: str, job_id: str, facts: dict[str, Any]) -> Journal:
        """Begin the journal of `job_id`; `facts` must hold all that a restarted agent needs."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        journal = cls(folder / f"{side}-{job_id}.jsonl", [])
        journal._write({"kind": "begin", "side": side, "job": job_id, **facts})
        return journal

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Open an existing journal. A torn last line (the agent died while writing) is dropped."""
        lines: list[dict[str, Any]] = []
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for line in whole.splitlines():
            lines.append(json.loads(line))
        if len(whole) != len(raw):
            os.truncate(path, len(whole))
        return cls(path, lines)

    def intent(self, step: str, action: str) -> None:
        self._write({"kind": "intent", "step": step, "action": action})

    def done(self, step: str, action: str) -> None:
        self._write({"kind": "done", "step": step, "action": action})

    def decide(self, decision: str, **data: Any) -> None:
        """Write a decision before the act that follows from it. bytes are stored as base64."""
        body = {k: _pack(v) for k, v in data.items()}
        self._write({"kind": "decision", "decision": decision, **body})

    def decided(self, decision: str) -> dict[str, Any] | None:
        """The data of `decision` as it was written last, if it was."""
        for line in reversed(self.lines):
            if line["kind"] == "decision" and line["decision"] == decision:
                return {k: _unpack(v) for k, v in line.items()}
        return None

    @property
    def facts(self) -> dict[str, Any]:
        return self.lines[0] if self.lines else {}

    def began(self, step: str) -> bool:
        return any(x["kind"] == "intent" and x["step"] == step and x["action"] == "do" for x in self.lines)

    def blob_path(self, name: str) -> Path:
        return self.path.with_suffix(f".{name}")

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The job ended: nothing of it is needed after a crash.

        By name and not by a pattern: `a.*` are also the files of job `a.b`, and each pattern stays in memory (fnmatch).
        """
        self.close()
        for path in self.path.parent.iterdir():
            if path.stem == self.path.stem:
                path.unlink(missing_ok=True)

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._file.write(json.dumps({"at": round(time.time(), 6), **line}).encode() + b"\n")


class Unwritten(Journal):
    """Of what a restarted agent need not know: nothing of it outlives the process."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull), [])

    def remove(self) -> None:
        self.close()


def journals(folder: Path, side: str) -> Iterator[Path]:
    """Journals of this boot that a restarted agent must look at."""
    if folder.is_dir():
        yield from sorted(folder.glob(f"{side}-*.jsonl"))


def boot_folder(state_dir: Path, boot_id: str) -> Path:
    return state_dir / "journal" / (boot_id or kernel_boot_id())


def kernel_boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _pack(value: Any) -> Any:
    return {"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"b64"}:
        return base64.b64decode(value["b64"])
    return value
