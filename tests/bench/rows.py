"""The rows that every benchmark writes: one a goal, with its reference from the same run.

    {name, unit, value, goal, better: "lower" | "higher", n, p50, p99, reference, reference_value}

`value` is the median of `n` values unless said otherwise. `reference` names what it was compared with.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

OUT = Path(__file__).resolve().parents[2] / "build" / "bench"


def row(
    name: str,
    unit: str,
    values: Sequence[float],
    goal: float,
    better: Literal["lower", "higher"],
    *,
    value: float | None = None,
    reference: str | None = None,
    reference_value: float | None = None,
) -> dict[str, Any]:
    ordered = sorted(values)
    median = statistics.median(ordered)
    return {
        "name": name,
        "unit": unit,
        "value": round(median if value is None else value, 3),
        "goal": goal,
        "better": better,
        "n": len(ordered),
        "p50": round(median, 3),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 3),
        "reference": reference,
        "reference_value": None if reference_value is None else round(reference_value, 3),
    }


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write build/bench/NAME.json and print each figure beside its goal."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for r in rows:
        met = r["value"] <= r["goal"] if r["better"] == "lower" else r["value"] >= r["goal"]
        beside = f"   {r['reference']}: {r['reference_value']}" if r["reference"] else ""
        print(
            f"{'met   ' if met else 'MISSED'} {r['name']:34} {r['value']:>12} {r['unit']:9} "
            f"goal {r['goal']:<8} p50 {r['p50']} p99 {r['p99']} n {r['n']}{beside}",
            flush=True,
        )
