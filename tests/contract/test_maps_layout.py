"""bpf/midstream_maps.h and its Python side say the same: sizes, offsets, constants."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from midstream_agent import hold_layout as layout

HEADER = Path(__file__).parents[2] / "bpf" / "midstream_maps.h"

# Python's struct and the C members it stands for, in order
STRUCTS = {
    "ms_flow_key": (layout.KEY, "local remote local_port remote_port"),
    "ms_flow_ctl": (layout.CTL, "state flags snd_nxt rcv_nxt tsval pad0 pad1 pad2"),
    "ms_flow_note": (
        layout.NOTE,
        "version flags seq ack window tsval tsecr data_seq data_len absorbed answered rst_seq data",
    ),
    "ms_addr_key": (layout.ADDR_KEY, "addr"),
    "ms_addr_ctl": (layout.ADDR_CTL, "state flags epoch vni peer pod_ifindex pod_mac seen pad"),
    "ms_copies": (layout.COPIES, "flow end last_ns full_ns"),
    "ms_conf": (layout.CONF, "nic_ifindex tunnel_ifindex probe_port nic_mac gateway_mac_v4 gateway_mac_v6 pad"),
}
CONSTANTS = {
    "MS_FLOW_LIVE": layout.FLOW_LIVE,
    "MS_FLOW_FROZEN": layout.FLOW_FROZEN,
    "MS_FLOW_HELD": layout.FLOW_HELD,
    "MS_FLOW_MOVED": layout.FLOW_MOVED,
    "MS_FLOW_HERE": layout.FLOW_HERE,
    "MS_CTL_TIMESTAMPS": layout.CTL_TIMESTAMPS,
    "MS_ADDR_LEAVING": layout.ADDR_LEAVING,
    "MS_ADDR_ARRIVING": layout.ADDR_ARRIVING,
    "MS_ADDR_SETTLED": layout.ADDR_SETTLED,
    "MS_ADDR_GONE": layout.ADDR_GONE,
    "MS_ADDR_TUNNEL": layout.ADDR_TUNNEL,
    "MS_ADDR_SYN_PEER": layout.ADDR_SYN_PEER,
    "MS_ADDR_SYN_HERE": layout.ADDR_SYN_HERE,
    "MS_ADDR_OUT_TUNNEL": layout.ADDR_OUT_TUNNEL,
    "MS_ADDR_OUT_DIRECT": layout.ADDR_OUT_DIRECT,
    "MS_BORN_HERE": layout.BORN_HERE,
    "MS_BORN_PEER": layout.BORN_PEER,
    "MS_MARK_TUNNEL": layout.MARK_TUNNEL,
    "MS_NOTE_SEG": layout.NOTE_SEG,
    "MS_NOTE_DATA": layout.NOTE_DATA,
    "MS_NOTE_RST": layout.NOTE_RST,
    "MS_NOTE_FIN": layout.NOTE_FIN,
    "MS_NOTE_TS": layout.NOTE_TS,
    "MS_NOTE_RST_SEEN": layout.NOTE_RST_SEEN,
    "MS_NOTE_DATA_MAX": layout.NOTE_DATA_MAX,
    "MS_MARK_ANSWER": layout.MARK_ANSWER,
    "MS_COUNTERS_MAX": layout.COUNTERS_MAX,
    "MS_COPIES_MAX": layout.COPIES_MAX,
    "MS_COPY_BURST": layout.COPY_BURST,
    "MS_COPY_NS_BYTE": layout.COPY_NS_BYTE,
    "MS_COPY_PAUSE_NS": layout.COPY_PAUSE_NS,
    "MS_R_MAX": len(layout.REASONS),
}


def c_values(folder: Path, expressions: list[str]) -> list[int]:
    """What the C compiler makes of the expressions."""
    lines = "".join(f'printf("%ld\\n", (long)({e}));' for e in expressions)
    source = folder / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{ {lines} }}\n'
    )
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", folder / "layout", source], check=True)
    return [
        int(n) for n in subprocess.run([folder / "layout"], check=True, capture_output=True).stdout.split()
    ]


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    python, members = STRUCTS[name]
    expressions = [f"offsetof(struct {name}, {m})" for m in members.split()]
    size, *offsets = c_values(tmp_path, [f"sizeof(struct {name})", *expressions])
    assert python.size == size
    formats = re.findall(
        r"\d*[a-zA-Z]", re.sub(r"(\d+)I", lambda m: "I" * int(m[1]), python.format)
    )
    at = [struct.calcsize("=" + "".join(formats[:i])) for i in range(len(formats))]
    assert at == offsets


def test_struct_members_are_all_named() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    for name, (_, members) in STRUCTS.items():
        body = re.search(rf"struct {name} {{(.*?)}};", text, re.S)
        assert body is not None
        assert re.findall(r"__\w+ (\w+)(?:\[\w+\])?;", body.group(1)) == members.split()


def test_constants_are_equal(tmp_path: Path) -> None:
    assert dict(zip(CONSTANTS, c_values(tmp_path, list(CONSTANTS)), strict=True)) == CONSTANTS


def test_reasons_have_their_names(tmp_path: Path) -> None:
    names = [f"MS_R_{reason.upper()}" for reason in layout.REASONS]
    assert c_values(tmp_path, names) == list(range(len(names)))


def test_maps_are_made_of_these_structs() -> None:
    sizes = {spec.name: (spec.key_size, spec.value_size) for spec in layout.MAPS}
    assert sizes == {
        "ms_flows": (layout.KEY.size, layout.CTL.size),
        "ms_notes": (layout.KEY.size, layout.NOTE.size),
        "ms_addrs": (layout.ADDR_KEY.size, layout.ADDR_CTL.size),
        "ms_births": (layout.KEY.size, layout.BIRTH.size),
        "ms_copies": (4, layout.COPIES.size),
        "ms_conf": (4, layout.CONF.size),
        "ms_counters": (4, 8),
    }
