"""The Hold's map functions: batches, missing entries, and notes that are written while they are read."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest
from bpf_packets import Packet
from midstream_agent import bpf
from midstream_agent import hold as hold_module
from midstream_agent.bpf import Map, TestRun
from midstream_agent.hold import Hold
from midstream_agent.hold_layout import (
    ADDR_LEAVING,
    CTL,
    FLOW_FROZEN,
    FLOW_HELD,
    KEY,
    NOTE,
    NOTE_DATA,
)
from midstream_runtime.contract.errors import Final, Retryable

pytestmark = pytest.mark.timeout(120)


def random_keys(n: int) -> bytes:
    return os.urandom(n * KEY.size)


def ctls(n: int, state: int = FLOW_FROZEN) -> bytes:
    return b"".join(CTL.pack(state, 0, i, 0, 0, 0, 0, 0) for i in range(n))


@pytest.fixture(params=["batch", "single"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a kernel without batch commands."""
    if request.param == "single":
        real = bpf._bpf

        def without_batch(command: int, attr: bpf.Buffer) -> int:
            if command in (24, 25, 26, 27):
                raise OSError(524, "ENOTSUPP")
            return real(command, attr)

        monkeypatch.setattr(bpf, "_bpf", without_batch)


@pytest.mark.parametrize("n", [1, 2, 33, 2500])
def test_flows_are_set_changed_and_deleted(hold: Hold, kernel: None, n: int) -> None:
    keys = random_keys(n)
    for state in (FLOW_FROZEN, FLOW_HELD):
        hold.set_flows(keys, ctls(n, state), n)
        for i in (0, n - 1):
            value = hold._flows.lookup(keys[i * KEY.size : (i + 1) * KEY.size])
            assert value == CTL.pack(state, 0, i, 0, 0, 0, 0, 0)
    assert len(hold.flow_keys()) == n
    assert hold.delete_flows(keys, n) == n
    assert hold.flow_keys() == []
    assert hold.delete_flows(keys, n) == 0


def test_flows_are_counted_by_state(hold: Hold, kernel: None) -> None:
    hold.set_flows(random_keys(1500), ctls(1500, FLOW_HELD), 1500)  # more than the first try has room for
    hold.set_flows(random_keys(4), ctls(4, FLOW_FROZEN), 4)
    assert hold.flow_states() == {FLOW_HELD: 1500, FLOW_FROZEN: 4}


@pytest.mark.parametrize("n", [1, 2, 33, 2500])
def test_notes_are_created_once_and_read_in_the_order_of_the_keys(hold: Hold, kernel: None, n: int) -> None:
    keys = random_keys(n)
    assert hold.create_notes(keys, n) == n
    marked = {0, n // 2, n - 1}
    for i in marked:
        hold._notes.update(keys[i * KEY.size : (i + 1) * KEY.size], note(i + 1))
    assert hold.create_notes(keys, n) == 0
    notes = hold.read_notes(keys, n)
    expected = [note(i + 1) if i in marked else bytes(NOTE.size) for i in range(n)]
    assert notes == b"".join(expected)
    assert hold.delete_notes(keys, n) == n
    assert hold.read_notes(keys, n) == bytes(n * NOTE.size)


@pytest.mark.parametrize("n", [3, 1000])
def test_some_exist_and_some_do_not(hold: Hold, kernel: None, n: int) -> None:
    keys = random_keys(n)
    every_third = b"".join(keys[i * KEY.size : (i + 1) * KEY.size] for i in range(0, n, 3))
    count = len(every_third) // KEY.size
    hold.create_notes(every_third, count)
    hold._notes.update(every_third[: KEY.size], note(7))
    assert hold.read_notes(keys, n) == note(7) + bytes((n - 1) * NOTE.size)
    assert hold.create_notes(keys, n) == n - count
    assert hold.read_notes(keys[: KEY.size], 1) == note(7)
    hold.delete_notes(every_third, count)
    assert hold.delete_notes(keys, n) == n - count


def test_wrong_lengths_are_refused(hold: Hold) -> None:
    with pytest.raises(ValueError, match="2 keys of 36"):
        hold.set_flows(random_keys(1), ctls(2), 2)
    with pytest.raises(ValueError, match="2 values of 32"):
        hold.set_flows(random_keys(2), ctls(1), 2)


def test_full_map_is_an_error_that_names_the_map() -> None:
    small = Map(bpf.MapSpec("ms_small", bpf.MAP_TYPE_HASH, 4, 4, 4, bpf.F_NO_PREALLOC).create())
    with pytest.raises(OSError, match="ms_small, entry 4 of 6") as error:
        small.update_many(bytes(range(24)), bytes(24), 6)
    assert error.value.errno == errno.E2BIG
    small.close()


def test_addresses_of_both_families(hold: Hold) -> None:
    for address in ("10.77.0.100", "2001:db8::1"):
        hold.set_addr(address, ADDR_LEAVING)
    assert len(hold.addr_keys()) == 2
    assert bytes(10) + b"\xff\xff\x0a\x4d\x00\x64" in hold.addr_keys()
    for address in ("10.77.0.100", "2001:db8::1"):
        assert hold.del_addr(address)
        assert not hold.del_addr(address)


def note(mark: int, version: int = 2) -> bytes:
    return NOTE.pack(version, NOTE_DATA, mark, *[mark] * 9, bytes([mark & 255]) * 2048)


def test_a_note_that_is_being_written_is_read_again(hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    key = random_keys(1)
    hold._notes.update(key, note(1, version=3))
    reads = 0
    real = Map.lookup

    def lookup(self: Map, k: bytes) -> bytes | None:
        nonlocal reads
        reads += 1
        if reads == 5:
            self.update(k, note(2, version=4))
        return real(self, k)

    monkeypatch.setattr(Map, "lookup", lookup)
    assert hold.read_notes(key, 1) == note(2, version=4)


def test_a_note_that_never_comes_to_rest_is_an_error(hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold_module, "READ_TRIES", 5)
    key = random_keys(1)
    hold._notes.update(key, note(1, version=3))
    with pytest.raises(Retryable, match="note_busy"):
        hold.read_notes(key, 1)


def writer(
    run: Callable[..., TestRun], packets: list[bytes], done: threading.Event, repeat: int = 500
) -> None:
    while not done.is_set():
        for packet in packets:
            run("ms_hold_ingress", packet, repeat=repeat)


def test_notes_written_by_several_cpus_are_never_torn(
    hold: Hold, run_program: Callable[..., TestRun]
) -> None:
    """Segments whose window equals their TSecr; what is read must be one of them, and all are counted."""
    base = Packet(payload=b"")
    hold.create_notes(base.key(), 1)
    hold.set_flows(base.key(), CTL.pack(FLOW_HELD, 1, 5000, 1000, 777, 0, 0, 0), 1)
    before = hold.counters()
    done = threading.Event()
    sets = [[base.but(window=w, ts=(100, w)).frame() for w in range(k * 100, k * 100 + 3)] for k in (1, 2)]
    threads = [threading.Thread(target=writer, args=(run_program, packets, done)) for packets in sets]
    for thread in threads:
        thread.start()
    seen: set[int] = set()
    try:
        while len(seen) < 4 or hold.counters()["absorb_held"] < before["absorb_held"] + 300_000:
            fields = NOTE.unpack(hold.read_notes(base.key(), 1))
            assert fields[0] % 2 == 0
            assert fields[4] == fields[6]
            seen.add(fields[4])
    finally:
        done.set()
        for thread in threads:
            thread.join()
    counters = hold.counters()
    fields = NOTE.unpack(hold.read_notes(base.key(), 1))
    busy = counters["note_busy"] - before["note_busy"]
    assert fields[9] + busy == counters["absorb_held"] - before["absorb_held"]


def test_data_of_a_note_is_never_torn(hold: Hold, run_program: Callable[..., TestRun]) -> None:
    """Each segment starts lower than the one before, so that each replaces it; its bytes tell its seq."""
    key = Packet().key()
    hold.create_notes(key, 1)
    hold.set_flows(key, CTL.pack(FLOW_FROZEN, *[0] * 7), 1)
    done = threading.Event()

    def write() -> None:
        for seq in range(2_000_000_000, 1_999_990_000, -1):
            run_program("ms_hold_ingress", Packet(seq=seq, payload=bytes([seq & 255]) * 2048).frame())
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen: set[int] = set()
    while not done.is_set():
        fields = NOTE.unpack(hold.read_notes(key, 1))
        if fields[1] & NOTE_DATA:
            assert fields[12] == bytes([fields[7] & 255]) * fields[8]
            seen.add(fields[7])
    thread.join()
    assert len(seen) > 10


def test_run_times_are_counted_while_somebody_asks(hold: Hold, run_program: Callable[..., TestRun]) -> None:
    def runs() -> int:
        return hold.programs()["ms_gate_egress"].runs

    run_program("ms_gate_egress", Packet().frame())
    before = runs()
    stats = bpf.enable_stats()
    try:
        run_program("ms_gate_egress", Packet().frame(), repeat=10)
    finally:
        os.close(stats)
    assert runs() == before + 10


def test_nothing_stays_open_after_close(hold: Hold) -> None:
    before = os.listdir("/proc/self/fd")
    with Hold.open(hold.bpffs) as other:
        other.counters()
        assert len(os.listdir("/proc/self/fd")) > len(before)
    with pytest.raises(Final, match="hold_not_loaded"):
        Hold.open(hold.bpffs / "nothing")
    assert len(os.listdir("/proc/self/fd")) == len(before)
