"""TCP's awkward moments during a migration: each ends as TCP says, none hangs, none is reset without the application.

The clients are sockets of the test (lines.py), so that it decides what they do and when: a migration waits at a
failpoint while they do it, and the counters of the hold prove that it was the hold that met them. Beside them stand
streams from everywhere that must not notice anything.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lines import PATIENCE_S, V4, V6, Line, Lines
from midstream_agent.hold import Hold

pytest_plugins = ["lines_plugin"]
pytestmark = pytest.mark.usefixtures("others")

# where the migration waits, and what the hold counts there
FROZEN, HELD, AT_TARGET = "source.HOLD.do.after", "source.EXPORT.do.after", "source.MOVE_ADDRESS.do.after"
PAUSED = "source.PAUSE.do.after"  # the pod has stopped, the hold does not answer yet
ABSORBED = {FROZEN: "absorb_frozen", HELD: "absorb_held dead_drop", AT_TARGET: "absorb_held dead_drop"}
ROLLED_BACK = "source.SEND.do.before=error"
LATE_PORT = 20_001  # of a client; the kernel gives none below 32768 away
EVERYWHERE = pytest.mark.parametrize("where", ABSORBED)


def holder(lines: Lines, where: str) -> str:
    """The node that answers for the flows at that failpoint."""
    return lines.away if where == AT_TARGET else lines.at


@pytest.fixture
def others(lines: Lines) -> Iterator[None]:
    """Streams from everywhere, alive before and after; and whatever the test dialled is closed at the end."""
    found = lines.bystanders()
    try:
        yield
        for line in found:
            line.is_alive()
    finally:
        lines.hang_up()


# -- (a) connections that nobody has accepted ----------------------------------------------------------------


def test_connections_that_wait_to_be_accepted_move_with_what_they_sent(lines: Lines) -> None:
    first = lines.line()
    first.say("deaf")
    first.expect(b"deaf\n")
    with lines.no_reset():
        waiting = [lines.established(lines.dial(lines.outside, x, rcvbuf=20_000)) for x in (V4, V6, V4, V6)]
        for line in waiting[1:]:
            line.say(f"hello {line.name}")
        for line in waiting[2:]:
            line.say("flood 400000")
        waiting[3].sock.shutdown(socket.SHUT_WR)
        assert f"hello {waiting[1].name}" not in lines.log(lines.at), "it was accepted before the move"
        report = lines.moved()
        assert int(report["streams"]["migrated"]) == 8 + 1 + 4
        waiting[0].say(f"hello {waiting[0].name}")
        for line in waiting:
            line.expect(f"hello {line.name}\n".encode())
        for line in waiting[2:]:
            line.expect_flood(400_000)
        waiting[3].expect(f"bye {waiting[3].name}\n".encode())
        waiting[3].expect_end()
        for line in (first, *waiting[:3]):
            line.is_alive()


# -- (b) closed with bytes queued ----------------------------------------------------------------------------


@pytest.mark.parametrize("address", [V4, V6])
def test_a_connection_that_the_server_closed_with_bytes_queued_gets_them_all_and_then_the_end(
    lines: Lines, address: str
) -> None:
    """Two hops while the client does not read; then its port is used again, against the server's TIME_WAIT."""
    size = 2_000_000
    with lines.no_reset():
        line = lines.line(address=address, rcvbuf=20_000)
        line.say(f"bye {size}")
        lines.wait_log(f"closed {line.name}")
        lines.moved()
        lines.moved()
        line.expect_flood(size)
        line.expect_end()
        port = line.port
        line.sock.close()
        lines.line(address=address, port=port).is_alive()


def test_a_connection_that_only_lingers_moves_as_well(lines: Lines) -> None:
    """All was read, our FIN too, and the client has not closed yet: FIN_WAIT2 at the server."""
    with lines.no_reset():
        line = lines.line()
        line.say("bye 1000")
        line.expect_flood(1000)
        line.expect_end()
        report = lines.moved()
        assert int(report["streams"]["migrated"]) == 8 + 1
        line.say("echo nobody reads this any more")
        line.sock.close()


# -- a window smaller than a segment -------------------------------------------------------------------------


def segment_bytes(lines: Lines, line: Line) -> int:
    """What the server's kernel takes for a segment to this client, by `ss`."""
    told = lines.source.run(["ss", "-Htin", "dport", "=", f":{line.port}"]).stdout
    (size,) = re.findall(r"\bmss:(\d+)", told)
    return int(size)


@pytest.mark.parametrize("rcvbuf", [1, 8192])
def test_a_client_with_a_window_smaller_than_a_segment_gets_small_segments_after_the_move_too(
    lines: Lines, rcvbuf: int
) -> None:
    """Segments larger than the window waited for the probe timer: 13 s for 400 kB. With the smallest, the queue of
    tiny segments did not fit the buffer, and the stream ended early."""
    with lines.no_reset():
        line = lines.line(rcvbuf=rcvbuf)
        line.say("flood 400000")
        before = segment_bytes(lines, line)
        assert before < 5000
        lines.moved()
        assert segment_bytes(lines, line) == before
        line.expect_flood(400_000)
        line.is_alive()


# -- (c) a client that resets, and (e) its 4-tuple again --------------------------------------------------------


@EVERYWHERE
def test_a_client_that_resets_during_the_hold_is_gone_at_the_target(lines: Lines, where: str) -> None:
    with lines.no_reset():
        line, busy = lines.line(), lines.line(address=V6)
        with lines.during(where), lines.meets(holder(lines, where), ABSORBED[where], 2):
            line.reset()
            busy.say("echo on its way")
            busy.reset()
        lines.wait_log(f"lost {line.name} ECONNRESET")
        lines.wait_log(f"lost {busy.name} E[A-Z]+")


def test_a_client_that_resets_before_a_rollback_is_gone_at_the_source(lines: Lines) -> None:
    with lines.no_reset():
        line = lines.line()
        with lines.during(HELD, then=ROLLED_BACK), lines.meets(lines.at, ABSORBED[HELD]):
            line.reset()
        lines.wait_log(f"lost {line.name} ECONNRESET")


@pytest.mark.parametrize("address", [V4, V6])
def test_a_client_that_resets_before_the_hold_is_left_out_and_the_others_move(lines: Lines, address: str) -> None:
    with lines.no_reset():
        line, other = lines.line(address=address), lines.line(address=address)
        with lines.during(PAUSED) as job:
            line.reset()
        lines.wait_log(f"lost {line.name} ECONNRESET")
        assert job.migrated() == 8 + 1, "the other one and the bystanders"
        other.is_alive()


@pytest.mark.parametrize("address", [V4, V6])
def test_a_connection_that_ends_before_the_hold_is_left_out_and_the_others_move(lines: Lines, address: str) -> None:
    """Both have finished but for the client's last ACK."""
    with lines.no_reset():
        line, other = lines.line(address=address), lines.line(address=address)
        line.say("bye 1000")
        line.expect_flood(1000)
        line.expect_end()
        with lines.during(PAUSED) as job:
            line.sock.close()
        assert job.migrated() == 8 + 1, "the other one and the bystanders"
        other.is_alive()


@EVERYWHERE
@pytest.mark.parametrize("address", [V4, V6])
def test_a_4_tuple_is_used_again_right_after_a_reset_during_the_hold(lines: Lines, where: str, address: str) -> None:
    """The new SYN meets the entry of a dead flow: silence. It gets through once the move is over."""
    with lines.no_reset():
        line = lines.line(address=address)
        port = line.port
        with lines.during(where):
            with lines.meets(holder(lines, where), ABSORBED[where]):
                line.reset()
            again = lines.dial(lines.outside, address, port=port)
        lines.wait_log(f"lost {line.name} ECONNRESET")
        reborn = lines.established(again).greet()
        lines.moved()  # back to where the old flow's MOVED entry still lingers
        reborn.is_alive()


def test_a_4_tuple_is_used_again_after_a_reset_and_a_rollback(lines: Lines) -> None:
    with lines.no_reset():
        line = lines.line()
        port = line.port
        with lines.during(HELD, then=ROLLED_BACK):
            with lines.meets(lines.at, ABSORBED[HELD]):
                line.reset()
            again = lines.dial(lines.outside, port=port)
        reborn = lines.established(again).greet()
        lines.moved()
        reborn.is_alive()


# -- (d) a client that finishes ----------------------------------------------------------------------------------


@EVERYWHERE
@pytest.mark.parametrize("size", [0, 500, 60_000])
def test_a_client_that_finishes_during_the_hold_gets_its_answer_and_the_end(
    lines: Lines, where: str, size: int
) -> None:
    """With nothing, one segment, or many segments before its FIN."""
    with lines.no_reset():
        line, text = lines.line(), "x" * size
        with lines.during(where), lines.meets(holder(lines, where), ABSORBED[where]):
            if size:
                line.say(f"echo {text}")
            line.sock.shutdown(socket.SHUT_WR)
        if size:
            line.expect(text.encode() + b"\n")
        line.expect(f"bye {line.name}\n".encode())
        line.expect_end()
        lines.wait_log(f"eof {line.name}")


@pytest.mark.parametrize("address", [V4, V6])
def test_a_4_tuple_is_used_again_after_a_client_closed_during_the_hold(lines: Lines, address: str) -> None:
    with lines.no_reset():
        line = lines.line(address=address)
        port = line.port
        with lines.during(HELD), lines.meets(lines.at, ABSORBED[HELD]):
            line.sock.shutdown(socket.SHUT_WR)
        line.expect(f"bye {line.name}\n".encode())
        line.expect_end()
        line.sock.close()
        reborn = lines.established(lines.dial_again(lines.outside, address, port)).greet()
        lines.moved()
        reborn.is_alive()


def test_a_client_that_finishes_before_a_rollback_gets_its_answer_and_the_end(lines: Lines) -> None:
    with lines.no_reset():
        line = lines.line()
        with lines.during(HELD, then=ROLLED_BACK), lines.meets(lines.at, ABSORBED[HELD]):
            line.say("echo last words")
            line.sock.shutdown(socket.SHUT_WR)
        line.expect(b"last words\n" + f"bye {line.name}\n".encode())
        line.expect_end()


def test_both_ends_finish_during_the_hold(lines: Lines) -> None:
    """The server has said its last word, with bytes queued; the client closes while it is held."""
    with lines.no_reset():
        line = lines.line(rcvbuf=20_000)
        line.say("bye 400000")
        lines.wait_log(f"closed {line.name}")
        with lines.during(HELD), lines.meets(lines.at, ABSORBED[HELD]):
            line.sock.shutdown(socket.SHUT_WR)
        line.expect_flood(400_000)
        line.expect_end()


# -- (f) a SYN that comes during the move ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["source.PREPARE.do.after", *ABSORBED])
def test_a_syn_that_comes_during_the_move_is_neither_lost_nor_refused(lines: Lines, where: str) -> None:
    with lines.no_reset():
        with lines.during(where), lines.meets(holder(lines, where), "syn_leaving"):
            coming = [lines.dial(place, address) for place in lines.places for address in (V4, V6)]
        for sock in coming:
            lines.established(sock).greet().is_alive()


@pytest.mark.parametrize(
    ("where", "failure"), [(HELD, ROLLED_BACK), ("target.MOVE_ADDRESS.do.after", "target.reply.move_address=error")]
)
def test_a_syn_that_comes_before_a_rollback_is_let_in_at_the_source(lines: Lines, where: str, failure: str) -> None:
    """Also when the address had moved: a connection accepted at the target would be lost when it goes back."""
    with lines.no_reset():
        holder = lines.at if where == HELD else lines.away
        with lines.during(where, then=failure), lines.meets(holder, "syn_leaving"):
            coming = [lines.dial(lines.outside, address) for address in (V4, V6)]
        for sock in coming:
            lines.established(sock).greet().is_alive()


# -- (g) a handshake that is only half done ------------------------------------------------------------------------


@contextmanager
def withheld(lines: Lines, port: int) -> Iterator[None]:
    """What the client outside says after its SYN from `port` does not leave it while the block runs."""
    rule = f"tcp sport {port} tcp flags & (syn | ack) == ack drop"
    lines.outside.nft(f"table inet ms_late {{ chain c {{ type filter hook output priority 0; {rule}; }}\n }}")
    try:
        yield
    finally:
        lines.outside.nft("delete table inet ms_late")


def wait_leaving(lines: Lines) -> None:
    """Until the source lets no SYN in any more."""
    end = time.monotonic() + PATIENCE_S
    with Hold.open(lines.fleet.agents[lines.at].bpffs) as hold:
        while not hold.addr_keys():
            assert time.monotonic() < end, "SYNs are let in"
            time.sleep(0.002)


@pytest.mark.parametrize(("address", "port"), [(V4, LATE_PORT), (V6, LATE_PORT + 1)])
def test_a_connection_whose_client_says_nothing_for_half_a_second_after_its_syn_moves_as_well(
    lines: Lines, address: str, port: int
) -> None:
    """The client has the SYN-ACK and counts as connected; the server still waits for it when the migration begins."""
    with lines.no_reset():
        with withheld(lines, port):
            late = lines.established(lines.dial(lines.outside, address, port))
            with lines.during("source.PREPARE.do.before", delay_ms=0) as job:
                wait_leaving(lines)
                time.sleep(0.5)  # ten times what a round trip is taken to be
                lines.outside.nft("flush table inet ms_late")
                late.greet()
        assert job.migrated() == 8 + 1, "the late one and the bystanders"
        late.is_alive()


def test_a_client_that_never_completes_its_handshake_does_not_keep_a_pod_from_moving(lines: Lines) -> None:
    with lines.no_reset(), withheld(lines, LATE_PORT + 2):
        silent = lines.established(lines.dial(lines.outside, V4, LATE_PORT + 2))
        report = lines.moved()
        assert int(report["streams"]["migrated"]) == 8
        assert "1 connections whose clients did not complete the handshake" in report["output"]
        silent.sock.close()
