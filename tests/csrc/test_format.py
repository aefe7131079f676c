"""docs/checkpoint-format.md is true: its tables are the sources' constants, and a reader made of them works."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from midstream_agent import tcp
from midstream_runtime.contract.errors import Final

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "checkpoint-format.md").read_text()
FORMAT_C = (ROOT / "csrc" / "src" / "format.c").read_text()
OPTIONS_C = (ROOT / "csrc" / "src" / "options.c").read_text()
SEEDS = sorted((ROOT / "csrc" / "fuzz" / "seeds").glob("*.ckpt"))
SIZES = {"u8": "<B", "u16": "<H", "be16": ">H", "u32": "<I", "u64": "<Q"}


def table(heading: str) -> list[dict[str, str]]:
    """Rows of the first table below a heading."""
    section = DOC.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def constant(name: str) -> int:
    found = re.search(rf"^#define {name} (\d+)", FORMAT_C, re.M)
    assert found, name
    return int(found[1])


def size_of(kind: str) -> int:
    return int(kind.split()[1]) if kind.startswith("bytes") else struct.calcsize(SIZES[kind])


def read(rows: list[dict[str, str]], data: bytes) -> dict[str, Any]:
    """The fixed fields of a table."""
    found: dict[str, Any] = {}
    for row in rows:
        at, kind = int(row["offset"]), row["type"]
        raw = data[at : at + size_of(kind)]
        found[row["name"]] = raw if kind.startswith("bytes") else struct.unpack(SIZES[kind], raw)[0]
    return found


def records(data: bytes) -> list[dict[str, bytes]]:
    """Sections by name, as the page tells."""
    names = {int(row["tag"]): row["name"] for row in table("Sections")}
    found, at = [], 24
    while at < len(data) - 8:
        end = at + 4 + struct.unpack_from("<I", data, at)[0]
        at, record = at + 4, {}
        while at < end:
            tag, flags, size = struct.unpack_from("<HHI", data, at)
            assert flags == 0
            record[names[tag]] = data[at + 8 : at + 8 + size]
            at += 8 + size
        assert at == end
        assert list(record) == list(names.values())
        found.append(record)
    return found


HEADER = [row for row in table("Header and checksum") if row["offset"].isdigit() and row["type"]]


def test_header_and_versions_are_those_of_the_source() -> None:
    version = constant("VERSION")
    assert f"this one knows {version}" in DOC
    for heading in ("Header and checksum", "Sections", "FLOW", "OPTIONS"):
        assert {int(row["since"]) for row in table(heading)} <= set(range(1, version + 1))
    assert sum(size_of(row["type"]) for row in HEADER) == constant("HEADER_BYTES") == 24
    assert constant("TRAILER_BYTES") == 8
    assert f'MAGIC "{HEADER[0]["meaning"].strip("`")}"' in FORMAT_C
    assert int(HEADER[1]["meaning"]) == version


def test_tags_are_those_of_the_source() -> None:
    source = re.search(r"enum tag \{(.*?)\}", FORMAT_C, re.S)
    assert source
    names = [name.split("=")[0].strip().removeprefix("TAG_") for name in source[1].split(",") if name.strip()]
    assert names[-1] == "END"
    assert [(row["tag"], row["name"]) for row in table("Sections")] == [
        (str(i), name) for i, name in enumerate(names[:-1], start=1)
    ]
    assert re.search(r"TAG_FLOW = 1\b", source[1])


def test_flow_has_no_gaps_and_the_order_of_the_source() -> None:
    rows = table("FLOW")
    offsets = list(itertools.accumulate((size_of(row["type"]) for row in rows), initial=0))
    assert [int(row["offset"]) for row in rows] == offsets[:-1]
    assert offsets[-1] == constant("FLOW_BYTES") == int(table("Sections")[0]["bytes"])
    numbers = re.search(r"uint32_t numbers\[\] = \{(.*?)\}", FORMAT_C, re.S)
    assert numbers
    in_source = [name.split(".")[-1] for name in re.findall(r"f->([\w.]+)", numbers[1])]
    assert [row["name"] for row in rows if row["type"] == "u32"] == in_source


def test_options_are_those_of_the_source() -> None:
    in_source = re.findall(r"\[OPT_\w+\]\s*=\s*\{\s*(\d+),\s*(K_\w+),(.*?)\}", OPTIONS_C, re.S)
    kinds = {"K_INT": "int", "K_LINGER_ON": "int", "K_LINGER_S": "int", "K_U64": "u64", "K_TIMEVAL": "us"}
    rows = table("OPTIONS")
    assert len(in_source) == len(rows) > 0
    for row, (number, kind, rest) in zip(rows, in_source, strict=True):
        assert (row["number"], row["kind"]) == (number, kinds[kind])
        assert re.search(rf"\b{row['option']}\b", rest), row


@pytest.mark.parametrize("path", SEEDS, ids=lambda p: p.stem)
def test_the_page_reads_what_the_library_reads(path: Path) -> None:
    data = path.read_bytes()
    batch = tcp.Batch.decode(data)
    header = read(HEADER, data)
    assert (header["magic"], header["version"], header["flags"]) == (b"MSTCPCKP", constant("VERSION"), 0)
    assert (header["count"], header["length"]) == (len(batch), len(data))
    numbers = {int(row["number"]) for row in table("OPTIONS")}
    for record, info in zip(records(data), batch.infos(), strict=True):
        flow = read(table("FLOW"), record["FLOW"])
        assert tcp.STATES[flow["state"]] == info.state
        assert flow["zero"] == bytes(3)
        assert (flow["local"], flow["local_port"]) == (tcp.mapped(info.local[0]), info.local[1])
        assert (flow["remote"], flow["remote_port"]) == (tcp.mapped(info.remote[0]), info.remote[1])
        for name in ("family", "write_seq", "rcv_nxt", "tsval", "mss", "snd_wnd", "rcv_wnd", "min_rtt_us"):
            assert flow[name] == getattr(info, name), name
        assert (flow["write_seq"] - flow["outq"]) % 2**32 == info.snd_una
        assert (flow["write_seq"] - flow["nsd"]) % 2**32 == info.snd_nxt
        assert (len(record["SEND"]), len(record["RECV"])) == (info.send_bytes, info.recv_bytes)
        options = dict(struct.iter_unpack("<Iq", record["OPTIONS"]))
        assert set(options) <= numbers and {1, 2, 29} <= set(options)
        assert record["CONGESTION"].decode().isalnum()
    assert batch.encode() == data


def test_seeds_are_of_every_state_and_family() -> None:
    infos = [info for path in SEEDS for info in tcp.Batch.decode(path.read_bytes()).infos()]
    assert {info.state for info in infos} == set(tcp.STATES.values())
    assert {(info.family, ":" in info.local[0]) for info in infos} == {(4, False), (6, True), (6, False)}


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [(8, 2, "tcp_newerformat"), (10, 1, "tcp_newerformat"), (0, 0, "tcp_damaged"), (16, 1, "tcp_damaged")],
    ids=["version", "flags", "magic", "length"],
)
def test_other_headers_are_refused_by_name(at: int, value: int, code: str) -> None:
    data = bytearray(SEEDS[0].read_bytes())
    data[at] = value
    with pytest.raises(Final) as refused:
        tcp.Batch.decode(bytes(data))
    assert refused.value.code == code


def test_each_damaged_byte_is_noticed() -> None:
    whole = (ROOT / "csrc/fuzz/seeds/v4-closing.ckpt").read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 0x10
        with pytest.raises(Final):
            tcp.Batch.decode(bytes(data))
