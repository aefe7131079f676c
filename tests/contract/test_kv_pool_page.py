"""docs/kv-pool.md and the code's layout of the KV pool are the same."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from midstream_runtime.contract import pool

PAGE = (Path(__file__).resolve().parents[2] / "docs/kv-pool.md").read_text(encoding="utf-8")
LAYOUT = pool.PoolLayout(
    slots=5, block_tokens=16, layers=3, kv_heads=2, head_dim=8, dtype="float32", model_fingerprint="ab" * 16
)


def table(title: str) -> list[tuple[int, int, str]]:
    """(offset, bytes, field) of each row under a title."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return [(int(a), int(b), name) for a, b, name in re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", section, re.M)]


def of(layout: struct.Struct) -> list[tuple[int, int]]:
    """Offsets and sizes of a struct's fields."""
    found, at = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        for _ in range(1 if kind == "s" else int(count or 1)):
            size = struct.calcsize("<" + (count if kind == "s" else "") + kind)
            found.append((at, size))
            at += size
    return found


@pytest.mark.parametrize(("title", "layout"), [("Header", pool.HEADER), ("Index entry", pool.ENTRY)])
def test_tables_have_the_code_s_offsets(title: str, layout: struct.Struct) -> None:
    assert [(at, size) for at, size, _ in table(title)] == of(layout)


def test_every_field_of_the_header_is_what_its_name_says() -> None:
    data = LAYOUT.pack()
    wanted = {
        **{name: getattr(LAYOUT, name) for name in ("total_bytes", "index_offset", "data_offset", "slots")},
        **{name: getattr(LAYOUT, name) for name in ("slot_bytes", "block_tokens", "layers", "kv_heads")},
        **{name: getattr(LAYOUT, name) for name in ("head_dim", "dtype")},
        "magic": "MSKVPOOL", "version": pool.VERSION, "header_bytes": pool.HEADER_BYTES, "reserved": 0,
        "entry_bytes": pool.ENTRY_BYTES, "hash_scheme": pool.HASH_SCHEME, "model_fingerprint": LAYOUT.model_fingerprint,
        "pool_fingerprint": LAYOUT.fingerprint,
    }  # fmt: skip
    for at, size, name in table("Header"):
        raw, value = data[at : at + size], wanted.pop(name)
        got = raw.rstrip(b"\0").decode() if isinstance(value, str) else int.from_bytes(raw, "little")
        assert got == value, name
    assert not wanted


def test_states_are_the_code_s() -> None:
    row = next(line for line in PAGE.splitlines() if "| state |" in line)
    assert re.findall(r"(\d) ([A-Z]+)", row) == [(str(s.value), s.name) for s in pool.SlotState]
