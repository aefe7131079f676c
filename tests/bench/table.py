"""The figures under build/bench as Markdown tables, as docs/benchmarks.md has them: tests/bench/table.py [DIR]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rows import OUT

HEAD = "| figure | measured | goal | | reference, same run |\n|---|---:|---:|---|---|"


def line(row: dict[str, Any]) -> str:
    met = row["value"] <= row["goal"] if row["better"] == "lower" else row["value"] >= row["goal"]
    reference = f"{row['reference']}: {row['reference_value']:g}" if row["reference"] else ""
    goal = f"{'≤' if row['better'] == 'lower' else '≥'} {row['goal']:g}"
    return f"| {row['name']} | {row['value']:g} {row['unit']} | {goal} | {'met' if met else 'missed'} | {reference} |"


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if rows:
            print(f"\n### bench_{path.stem}.py\n\n{HEAD}", *map(line, rows), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
