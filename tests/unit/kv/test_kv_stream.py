"""KV blocks between two agents: whole, verified, to the right job only, whatever the streams go through."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from kv_ends import SETTINGS, SLOT_BYTES, Ends, ends, fill, run
from midstream_agent import kv_stream as wire
from midstream_agent import tls
from midstream_agent.kv import digest
from midstream_agent.kv_send import Block, Target
from midstream_agent.settings import Kv
from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

TLS = replace(SETTINGS, tls=True)
BOTH = pytest.mark.parametrize("settings", [SETTINGS, TLS], ids=["plain", "tls"])


def assert_came(e: Ends, blocks: list[Block]) -> None:
    for block in blocks:
        assert e.data_of(block.id) == e.source.read(block.slot, block.length)


@BOTH
def test_blocks_arrive_whole_in_slots_of_their_own(tmp_path: Path, settings: Kv) -> None:
    async def body() -> None:
        async with ends(tmp_path, settings) as e:
            blocks = fill(e.source, 40)
            first = await e.sender.send(blocks[:25])
            second = await e.sender.send(blocks[25:])
            assert first.landed | second.landed == {b.id for b in blocks}
            assert not first.failed and not second.failed
            assert first.bytes == 25 * SLOT_BYTES
            assert_came(e, blocks)
            taken = {landed.slot for b in blocks if (landed := e.receiver.landed(b.id))}
            assert len(taken) == 40 and e.receiver.free_slots == 24

    run(body)


@BOTH
def test_a_block_shorter_than_its_slot_leaves_the_rest_of_it_zero(tmp_path: Path, settings: Kv) -> None:
    async def body() -> None:
        async with ends(tmp_path, settings, slots=1) as e:
            e.target.write(0, b"\xff" * SLOT_BYTES, digest(b"\xff" * SLOT_BYTES))
            (whole,) = fill(e.source, 1)
            data = e.source.read(0, 100)
            report = await e.sender.send([replace(whole, length=100, checksum=digest(data))])
            assert report.landed == {1}
            assert e.data_of(1) == data + bytes(SLOT_BYTES - 100)

    run(body)


@BOTH
def test_one_flipped_byte_is_noticed_and_the_block_is_given_up(tmp_path: Path, settings: Kv) -> None:
    async def body() -> None:
        async with ends(tmp_path, settings) as e:
            blocks = fill(e.source, 8)
            _, place = e.source.place(3, SLOT_BYTES)
            with place:
                place[SLOT_BYTES // 2] ^= 1
            report = await e.sender.send(blocks)
            assert report.failed == {4: "kv_checksum"}
            assert report.damaged == settings.tries == e.receiver.counts.damaged
            assert e.receiver.landed(4) is None
            assert_came(e, [b for b in blocks if b.id != 4])
            assert e.receiver.free_slots == 64 - 7, "the damaged block's slot is free again"

    run(body)


def test_without_the_check_a_flipped_byte_would_land(tmp_path: Path) -> None:
    """The control of the test above."""

    async def body() -> None:
        async with ends(tmp_path, verify=False) as e:
            (block,) = fill(e.source, 1)
            with e.source.place(0, SLOT_BYTES)[1] as place:
                place[0] ^= 1
            report = await e.sender.send([block])
            assert report.landed == {1} and digest(e.data_of(1)) != block.checksum

    run(body)


def test_a_block_that_is_rewritten_while_it_is_sent_is_sent_again(tmp_path: Path) -> None:
    """A pod that has a slot's bytes changing under sendfile, and settled later: what is torn never lands."""

    async def body() -> None:
        settings = replace(SETTINGS, tries=10_000, streams=2)
        async with ends(tmp_path, settings, slot_bytes=1 << 20, slots=4) as e:
            good = os.urandom(1 << 20)
            stop = threading.Event()

            def scribble() -> None:
                with e.source.place(0, 1 << 20)[1] as place:
                    while not stop.is_set():
                        place[:] = b"x" * (1 << 20)
                    place[:] = good

            writer = threading.Thread(target=scribble)
            writer.start()
            sending = asyncio.create_task(e.sender.send([Block(1, 0, 1 << 20, digest(good))]))
            while not e.receiver.counts.damaged:
                await asyncio.sleep(0.001)
            stop.set()
            report = await sending
            writer.join()
            assert report.landed == {1} and report.damaged > 0
            assert e.data_of(1) == good

    run(body)


def test_when_the_target_has_no_slots_left_the_rest_is_refused_by_name(tmp_path: Path) -> None:
    async def body() -> None:
        async with ends(tmp_path, slots=8) as e:
            blocks = fill(e.source, 8)
            more = [replace(b, id=b.id + 100) for b in blocks[:4]]
            report = await e.sender.send(blocks + more)
            assert len(report.landed) == 8
            assert set(report.failed.values()) == {"pool_full"} and len(report.failed) == 4
            assert e.receiver.counts.refused == 4

    run(body)


class Breaker:
    """A TCP relay that cuts a connection after so many bytes of the source, `cuts` times; then lets all through."""

    def __init__(self, port: int, after_bytes: int, cuts: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self._to, self._after, self.left = port, after_bytes, cuts
        self._lock = threading.Lock()
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            self._socks += [near, far]
            with self._lock:
                limit = self._after if self.left > 0 else 1 << 60
                self.left -= 1
            for pair, most in (((near, far), limit), ((far, near), 1 << 60)):
                thread = threading.Thread(target=self._pump, args=(*pair, most), daemon=True)
                thread.start()
                self._threads.append(thread)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, most: int) -> None:
        try:
            while most > 0 and (data := source.recv(min(65536, most))):
                sink.sendall(data)
                most -= len(data)
        except OSError:
            pass  # cut from the other side
        for sock in (source, sink):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        for sock in (self.listener, *self._socks):
            sock.close()


@BOTH
@pytest.mark.parametrize("after_blocks", [0, 0.5, 2, 5.3])
def test_broken_streams_are_connected_again_and_send_what_was_not_answered(
    tmp_path: Path, settings: Kv, after_blocks: float
) -> None:
    async def body() -> None:
        async with ends(tmp_path, settings) as e:
            breaker = Breaker(e.server.port, int(after_blocks * SLOT_BYTES) + 400, cuts=2)
            e.sender._target = Target("node-b", "127.0.0.1", breaker.port, e.receiver.ticket)
            blocks = fill(e.source, 50)
            try:
                report = await e.sender.send(blocks)
            finally:
                await e.sender.close()
                await e.receiver.close()
                breaker.close()
            assert report.landed == {b.id for b in blocks} and not report.failed
            assert breaker.left <= 0 and report.broken_streams > 0, "no stream was cut: the test sees nothing"
            assert_came(e, blocks)
            assert e.receiver.free_slots == 14, "a block that came twice kept no slot"

    run(body)


def test_a_target_that_goes_away_leaves_blocks_failed_by_name_and_no_exception(tmp_path: Path) -> None:
    async def body() -> None:
        async with ends(tmp_path, replace(SETTINGS, bytes_per_s=200_000, piece_bytes=8192)) as e:
            blocks = fill(e.source, 20)
            sending = asyncio.create_task(e.sender.send(blocks))
            while not e.receiver.counts.blocks:
                await asyncio.sleep(0.005)
            e.server.forget(e.receiver)
            await e.receiver.close()
            report = await sending
            assert set(report.failed.values()) == {"kv_broken"}
            assert report.landed | set(report.failed) == {b.id for b in blocks}
            again = await e.sender.send(blocks[:1])
            assert again.failed == {1: "kv_broken"}
            with pytest.raises(Retryable, match="kv_broken"):
                await e.sender.offer(blocks)

    run(body)


@BOTH
def test_what_the_target_has_is_not_wanted(tmp_path: Path, settings: Kv) -> None:
    async def body() -> None:
        async with ends(tmp_path, replace(settings, offer_blocks=7)) as e:
            blocks = fill(e.source, 20)
            e.here = {b.name: 60 + i for i, b in enumerate(blocks[5:9])}
            have = await e.sender.offer(blocks)
            assert have == {6, 7, 8, 9}
            assert [landed.slot for n in sorted(have) if (landed := e.receiver.landed(n))] == [60, 61, 62, 63]
            report = await e.sender.send([b for b in blocks if b.id not in have])
            assert len(report.landed) == 16
            await e.sender.settle()
            assert set(e.settled[0]) == {b.id for b in blocks}

    run(body)


def refused(folder: Path, settings: Kv, **how: object) -> MidstreamError | dict[int, str]:
    outcome: list[MidstreamError | dict[int, str]] = []

    async def body() -> None:
        async with ends(folder, settings, **how) as e:  # type: ignore[arg-type]
            try:
                outcome.append((await e.sender.send(fill(e.source, 4))).failed)
            except MidstreamError as error:
                outcome.append(error)
            assert e.receiver.landed_ids() == [] and e.receiver.counts.blocks == 0

    run(body)
    return outcome[0]


@BOTH
def test_a_stream_without_the_job_s_ticket_is_not_let_in(tmp_path: Path, settings: Kv) -> None:
    assert refused(tmp_path, settings, ticket=bytes(32)) == dict.fromkeys(range(1, 5), "kv_broken")


def test_a_stream_with_another_node_s_certificate_is_not_let_in(tmp_path: Path) -> None:
    assert refused(tmp_path, TLS, certificate="node-c") == dict.fromkeys(range(1, 5), "kv_broken")


def test_kv_is_not_sent_to_another_node_than_the_target(tmp_path: Path) -> None:
    assert refused(tmp_path, TLS, target_name="node-c") == dict.fromkeys(range(1, 5), "kv_broken")


def test_kv_is_not_sent_to_whoever_has_not_the_ticket() -> None:
    """An impostor on the target's port of a network without TLS."""
    ours, theirs = socket.socketpair()

    def impostor() -> None:
        theirs.sendall(wire.GREETING.pack(wire.MAGIC, wire.VERSION, bytes(32)))
        theirs.recv(4096)
        theirs.sendall(bytes(wire.PROOF_BYTES))

    thread = threading.Thread(target=impostor)
    thread.start()
    with ours, theirs, pytest.raises(Final, match="kv_protocol"):
        wire.greet_as_source(ours, "job", b"t" * 32)
    thread.join()


def test_a_proof_is_good_for_one_side_one_nonce_and_one_job() -> None:
    args = (b"t" * 32, b"source", b"n" * 32, b"job")
    for at, other in enumerate((b"u" * 32, b"target", b"m" * 32, b"job2")):
        changed = [*args[:at], other, *args[at + 1 :]]
        assert wire.proof(*args) != wire.proof(*changed)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\n\r\n" + bytes(200),
        wire.HELLO.pack(wire.MAGIC, 9, 3, bytes(32), bytes(32)) + b"job",
        wire.HELLO.pack(wire.MAGIC, wire.VERSION, 0, bytes(32), bytes(32)),
        b"",
    ],
    ids=["http", "version", "no job", "nothing"],
)
def test_a_stranger_gets_nothing_and_the_job_s_streams_go_on(tmp_path: Path, rubbish: bytes) -> None:
    async def body() -> None:
        async with ends(tmp_path, replace(SETTINGS, connect_s=0.2)) as e:
            stranger = socket.create_connection(("127.0.0.1", e.server.port))
            await asyncio.to_thread(stranger.sendall, rubbish)
            blocks = fill(e.source, 5)
            assert len((await e.sender.send(blocks)).landed) == 5

            def rest() -> bytes:
                data = b""
                try:
                    while part := stranger.recv(4096):
                        data += part
                except ConnectionResetError:
                    pass  # unread rubbish makes the kernel end it so
                return data

            assert len(await asyncio.to_thread(rest)) == wire.GREETING.size
            stranger.close()

    run(body)


def test_streams_that_wait_are_not_held_against_slow_strangers(tmp_path: Path) -> None:
    """A hundred connections that say nothing: those beyond the limit are closed, the others after their time."""

    async def body() -> None:
        async with ends(tmp_path, replace(SETTINGS, connect_s=0.1, greeting_streams=10, tries=1000)) as e:
            strangers = [socket.create_connection(("127.0.0.1", e.server.port)) for _ in range(100)]
            report = await e.sender.send(fill(e.source, 5))  # let in as soon as the strangers' time is over
            assert len(report.landed) == 5
            for sock in strangers:
                sock.close()

    run(body)


@pytest.mark.parametrize("kind", [0, 9])
def test_a_frame_of_an_unknown_kind_ends_the_stream(tmp_path: Path, kind: int) -> None:
    async def body() -> None:
        async with ends(tmp_path) as e:

            def talk() -> bytes:
                with socket.create_connection(("127.0.0.1", e.server.port)) as sock:
                    wire.greet_as_source(sock, "job", e.receiver.ticket)
                    sock.sendall(wire.FRAME.pack(kind, 1, 10, bytes(32), bytes(16)) + bytes(10))
                    try:
                        return sock.recv(100)
                    except ConnectionResetError:
                        return b""

            assert await asyncio.to_thread(talk) == b""

    run(body)


@pytest.mark.parametrize("size", [0, SLOT_BYTES + 1, 0xFFFFFFFF])
def test_a_block_of_an_impossible_size_ends_the_stream_and_takes_no_slot(tmp_path: Path, size: int) -> None:
    async def body() -> None:
        async with ends(tmp_path) as e:

            def talk() -> bytes:
                with socket.create_connection(("127.0.0.1", e.server.port)) as sock:
                    wire.greet_as_source(sock, "job", e.receiver.ticket)
                    sock.sendall(wire.FRAME.pack(wire.Kind.BLOCK, 1, size, bytes(32), bytes(16)))
                    return sock.recv(100)

            assert await asyncio.to_thread(talk) == b""
            assert e.receiver.free_slots == 64

    run(body)


def test_the_event_loop_goes_on_while_a_target_does_not_read(tmp_path: Path) -> None:
    """Back-pressure: a stopped target stops the threads of the streams, and no memory grows."""

    async def body() -> None:
        async with ends(tmp_path, replace(SETTINGS, stall_s=0.5, tries=1), slots=4, slot_bytes=16 << 20) as e:
            gate = threading.Event()
            take = e.receiver._fill

            def slow(*args: object) -> object:
                gate.wait()
                return take(*args)  # type: ignore[arg-type]

            e.receiver._fill = slow  # type: ignore[method-assign, assignment]
            sending = asyncio.create_task(e.sender.send(fill(e.source, 4)))
            turns = 0
            while not sending.done():
                await asyncio.sleep(0.01)
                turns += 1
            gate.set()
            report = await sending
            assert set(report.failed.values()) == {"kv_broken"}, "the stall was noticed"
            assert turns > 10

    run(body)


def test_closing_in_the_middle_of_a_round_leaves_no_thread_behind(tmp_path: Path) -> None:
    async def body() -> None:
        async with ends(tmp_path, replace(SETTINGS, bytes_per_s=100_000, piece_bytes=4096)) as e:
            sending = asyncio.create_task(e.sender.send(fill(e.source, 60)))
            while not e.receiver.counts.blocks:
                await asyncio.sleep(0.005)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending

    before = threading.active_count()
    run(body)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_the_limit_on_bandwidth_is_kept_over_all_streams(tmp_path: Path) -> None:
    """No faster than the limit: a burst of one piece, then the rate. (Slower is the machine's business.)"""

    async def body() -> None:
        rate = 2_000_000
        async with ends(tmp_path, replace(SETTINGS, bytes_per_s=rate, piece_bytes=4096)) as e:
            report = await e.sender.send(fill(e.source, 40))
            assert len(report.landed) == 40
            assert report.took_s >= (report.bytes - 4096) / rate

    run(body)


def test_tls_streams_use_the_kernel_where_it_has_tls(tmp_path: Path) -> None:
    """sendfile into TLS. Elsewhere OpenSSL reads the mapping, which all other TLS tests go through."""
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, 31, b"tls")  # TCP_ULP; ENOTCONN where it is there
        except FileNotFoundError:
            pytest.skip("this kernel has no TLS")
        except OSError:
            pass

    async def body() -> None:
        async with ends(tmp_path, TLS) as e:
            blocks = fill(e.source, 10)
            assert len((await e.sender.send(blocks)).landed) == 10
            assert_came(e, blocks)
            socks = [s._sock for s in e.sender._streams if s._sock is not None]
            assert socks and all(isinstance(s, ssl.SSLSocket) and tls.kernel_encrypts(s) for s in socks)

    run(body)
