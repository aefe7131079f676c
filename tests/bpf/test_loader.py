"""The loader: what it finds, keeps, refuses, and says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bpf_loader import ROOT, run_loader
from bpf_packets import Packet
from midstream_agent import bpf, hold_load
from midstream_agent.hold import Hold
from midstream_agent.hold_layout import CTL, FLOW_HELD, MAPS, PROGRAMS
from midstream_runtime.contract.errors import Final

HELD = CTL.pack(FLOW_HELD, 0, 5000, 1000, 777, 0, 0, 0)


def pins(bpffs: Path) -> set[str]:
    return {p.name for p in bpffs.iterdir() if p.suffix != ".debug"}  # the kernel's own, in every bpffs


def test_reload_keeps_holds_and_brings_new_programs(loader: Callable[..., Path]) -> None:
    bpffs = loader()
    key = Packet().key()
    with Hold.open(bpffs) as hold:
        hold.create_notes(key, 1)
        hold.set_flows(key, HELD, 1)
        old = {program.id for program in hold.programs().values()}
    run_loader("load", "--bpffs", str(bpffs))
    with Hold.open(bpffs) as hold:
        assert hold.flow_keys() == hold.note_keys() == [key]
        assert not old & {program.id for program in hold.programs().values()}
    assert pins(bpffs) == {*PROGRAMS, *(spec.name for spec in MAPS)}


def test_maps_of_another_layout_are_refused_and_left_alone(loader: Callable[..., Path]) -> None:
    bpffs = loader()
    other = replace(MAPS[0], value_size=MAPS[0].value_size + 8)
    fd = other.create()
    bpf.obj_pin(fd, bpffs / other.name)
    os.close(fd)
    with pytest.raises(Final, match="hold_layout"):
        Hold.open(bpffs)
    before = {name: bpf.prog_info(bpf.obj_get(bpffs / name)).id for name in PROGRAMS}
    message = run_loader("load", "--bpffs", str(bpffs), check=False)
    assert "hold_layout" in message
    assert "hold unload --bpffs" in message
    assert bpf.map_spec(bpf.obj_get(bpffs / other.name)) == other
    assert {name: bpf.prog_info(bpf.obj_get(bpffs / name)).id for name in PROGRAMS} == before


def test_broken_sources_leave_the_running_programs_alone(
    loader: Callable[..., Path], broken: Callable[[str, str, str], Path]
) -> None:
    bpffs = loader()
    with Hold.open(bpffs) as hold:
        before = hold.programs()
    sources = broken("midstream.c", "return ms_work(skb, MS_EGRESS);", "return nonsense;")
    message = run_loader("load", "--bpffs", str(bpffs), "--sources", str(sources), check=False)
    assert "bpf_build_failed" in message
    assert "nonsense" in message
    with Hold.open(bpffs) as hold:
        assert hold.programs() == before


def test_another_struct_size_does_not_compile(
    loader: Callable[..., Path], broken: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    sources = broken("midstream_maps.h", "#define MS_NOTE_DATA_MAX 2048", "#define MS_NOTE_DATA_MAX 1024")
    message = run_loader("load", "--bpffs", str(loader()), "--sources", str(sources), check=False)
    assert "ms_flow_note: loader and header differ" in message


def test_unload_removes_the_pins(loader: Callable[..., Path]) -> None:
    bpffs = loader()
    for _ in range(2):
        run_loader("unload", "--bpffs", str(bpffs))
    assert pins(bpffs) == set()
    with pytest.raises(Final, match="hold_not_loaded"):
        Hold.open(bpffs)


def test_bpffs_is_mounted_where_there_is_none() -> None:
    """On /sys/fs/bpf, in a mount namespace of its own."""
    script = (
        "umount -l /sys/fs/bpf 2>/dev/null; umount -l /sys/fs/bpf 2>/dev/null;"
        f" {sys.executable} -m midstream_agent.hold load --bpffs /sys/fs/bpf/a/b && stat -f -c %t /sys/fs/bpf"
    )
    path = os.pathsep.join([str(ROOT / "agent"), str(ROOT / "runtime")])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "cafe4a11"


def test_no_capability_is_said_by_name(tmp_path: Path, bpffs: Path) -> None:
    no_caps = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    message = run_loader("load", "--bpffs", str(tmp_path), check=False, prefix=no_caps)
    assert "no_bpffs" in message
    assert "CAP_SYS_ADMIN" in message
    fresh = bpffs / "fresh"
    fresh.mkdir()
    message = run_loader("load", "--bpffs", str(fresh), check=False, prefix=no_caps)
    fresh.rmdir()
    assert "no_capability" in message
    assert "CAP_BPF" in message


def test_headers_of_the_environment_are_taken(
    loader: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = hold_load.find_headers()
    if headers.source is None:
        pytest.skip("the running kernel has headers of its own")
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(headers.source))
    assert hold_load.find_headers() == headers
    loader()


def test_agent_side_never_loads_bcc() -> None:
    code = "import sys, midstream_agent.hold; print([m for m in sys.modules if m.split('.')[0] == 'bcc'])"
    path = os.pathsep.join([str(ROOT / "agent"), str(ROOT / "runtime")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True
    )
    assert done.stdout.strip() == b"[]"
