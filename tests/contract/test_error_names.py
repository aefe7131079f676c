"""Every error name in the agent and the runtime is explained in docs/errors.md."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"Final", "Retryable"}


def _names(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FAMILIES and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
    return found


def test_every_error_name_is_documented() -> None:
    documented = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    used: set[str] = set()
    for folder in ("agent/midstream_agent", "operator", "runtime/midstream_runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= _names(path)
    assert len(used) > 40, "the search itself must find something"
    assert sorted(n for n in used if f"`{n}`" not in documented) == []
