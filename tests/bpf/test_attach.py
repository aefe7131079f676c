"""Filters come and go beside those of others."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from bpf_loader import run_loader
from midstream_agent.hold import Hold
from midstream_runtime.contract.errors import Final

NAME = f"ms{os.getpid()}-tc"
PATH = f"/run/netns/{NAME}"
# bytecode that says TC_ACT_OK, which ends the chain
FOREIGN_OK = ("handle", "1", "bpf", "bytecode", "1,6 0 0 0", "direct-action")
FOREIGN_DROP = ("handle", "1", "bpf", "bytecode", "1,6 0 0 2", "direct-action")
FOREIGN_KIND = ("u32", "match", "u32", "0", "0")


def inside(*argv: str) -> str:
    return subprocess.run(
        ["nsenter", f"--net={PATH}", *argv], check=True, capture_output=True, text=True
    ).stdout


def tc_filter(side: str, prio: int, *what: str, protocol: str = "all") -> None:
    inside("tc", "filter", "add", "dev", "lo", side, "prio", str(prio), "protocol", protocol, *what)


def filters() -> list[str]:
    """Filters of the interface, one line each."""
    lines = []
    for side in ("ingress", "egress"):
        lines += inside("tc", "filter", "show", "dev", "lo", side).splitlines()
    return [line for line in lines if " handle 0x" in line or "flowid" in line]


def has_clsact() -> bool:
    return "clsact" in inside("tc", "qdisc", "show", "dev", "lo")


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    subprocess.run(["ip", "netns", "add", NAME], check=True)
    try:
        inside("ip", "link", "set", "lo", "up")
        yield
    finally:
        subprocess.run(["ip", "netns", "del", NAME], check=True)


def test_attach_is_idempotent(hold: Hold) -> None:
    for _ in range(3):
        hold.attach(PATH, "lo", "pod")
    assert hold.attached(PATH, "lo") == {"ms_hold_ingress", "ms_gate_egress"}
    assert len(filters()) == 2


def test_detach_leaves_nothing_behind_and_is_idempotent(hold: Hold) -> None:
    hold.attach(PATH, "lo", "pod")
    for _ in range(2):
        hold.detach(PATH, "lo", "pod")
        assert not has_clsact()
        assert hold.attached(PATH, "lo") == set()


def test_qdisc_of_somebody_else_stays(hold: Hold) -> None:
    inside("tc", "qdisc", "add", "dev", "lo", "clsact")
    hold.attach(PATH, "lo", "pod")
    hold.detach(PATH, "lo", "pod")
    assert has_clsact()


def test_our_qdisc_is_known_after_a_restart_of_the_agent(hold: Hold) -> None:
    with Hold.open(hold.bpffs) as first:
        first.attach(PATH, "lo", "pod")
    with Hold.open(hold.bpffs) as second:
        second.attach(PATH, "lo", "pod")
        second.detach(PATH, "lo", "pod")
    assert not has_clsact()


def test_foreign_filters_stay_and_keep_the_qdisc(hold: Hold) -> None:
    hold.attach(PATH, "lo", "pod")
    tc_filter("ingress", 1, *FOREIGN_OK)
    tc_filter("egress", 7, *FOREIGN_OK)
    hold.detach(PATH, "lo", "pod")
    assert len(filters()) == 2
    assert all("ms_" not in line for line in filters())
    assert has_clsact()


def test_hold_runs_before_a_foreign_filter_of_the_same_priority(hold: Hold) -> None:
    inside("tc", "qdisc", "add", "dev", "lo", "clsact")
    tc_filter("ingress", 1, *FOREIGN_OK)
    hold.attach(PATH, "lo", "pod")
    before = hold.counters()["pass_unknown"]
    inside("ping", "-c1", "-W1", "127.0.0.1")
    # egress, then ingress, of question and answer
    assert hold.counters()["pass_unknown"] == before + 4


def test_foreign_filter_behind_the_hold_still_runs(hold: Hold) -> None:
    hold.attach(PATH, "lo", "pod")
    tc_filter("ingress", 2, *FOREIGN_DROP)
    with pytest.raises(subprocess.CalledProcessError):
        inside("ping", "-c1", "-W1", "127.0.0.1")


@pytest.mark.parametrize(
    "what, protocol", [(FOREIGN_KIND, "all"), (FOREIGN_OK, "ip")], ids=["kind", "protocol"]
)
def test_priority_taken_by_another_kind_or_protocol(hold: Hold, what: tuple[str, ...], protocol: str) -> None:
    inside("tc", "qdisc", "add", "dev", "lo", "clsact")
    for side in ("ingress", "egress"):
        tc_filter(side, 1, *what, protocol=protocol)
    theirs = filters()
    for _ in range(2):
        hold.attach(PATH, "lo", "pod")
    assert hold.attached(PATH, "lo") == {"ms_hold_ingress", "ms_gate_egress"}
    assert len(filters()) == len(theirs) + 2
    hold.detach(PATH, "lo", "pod")
    assert filters() == theirs


def test_upgrade_exchanges_the_programs_in_place(loader: Callable[..., Path]) -> None:
    bpffs = loader()
    with Hold.open(bpffs) as hold:
        hold.attach(PATH, "lo", "pod")
    old = set(re.findall(r" id (\d+)", "\n".join(filters())))
    run_loader("load", "--bpffs", str(bpffs))
    with Hold.open(bpffs) as hold:
        hold.attach(PATH, "lo", "pod")
        new = {str(program.id) for program in hold.programs().values()}
    ids = set(re.findall(r" id (\d+)", "\n".join(filters())))
    assert len(filters()) == 2
    assert ids < new
    assert not ids & old


def test_unknown_interface_is_refused_by_name(hold: Hold) -> None:
    with pytest.raises(Final, match="no_interface"):
        hold.attach(PATH, "eth7", "pod")


def test_thread_is_back_in_its_namespace_also_after_a_failure(hold: Hold) -> None:
    home = os.readlink("/proc/thread-self/ns/net")
    fds = len(os.listdir("/proc/self/fd"))
    for interface in ("lo", "eth7"):
        with suppress(Final):
            hold.attach(PATH, interface, "pod")
        assert os.readlink("/proc/thread-self/ns/net") == home
    assert len(os.listdir("/proc/self/fd")) == fds
