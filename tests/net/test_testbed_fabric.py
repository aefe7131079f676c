"""The fabric moves addresses as EC2 does: on request, late, not at all or in name only; it logs each move."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from midstream_testbed import Fabric, FabricError, Host, Move, Vpc, fabricd, plumbing

FLOATING = {4: "10.77.0.100", 6: "fd77::f:100"}
Ask = Callable[[Vpc, str, Host], None]


@pytest.fixture(scope="module")
def built() -> Iterator[Vpc]:
    with Vpc.create() as vpc:
        for name in ("node-a", "node-b", "node-c"):
            vpc.host(name, configured=True)
        vpc.client("client-in", in_vpc=True)
        yield vpc


@pytest.fixture
def vpc(built: Vpc) -> Iterator[Vpc]:
    """A fabric without spoiling hooks, both addresses freshly allocated to node-a."""
    built.fabric.move_seconds, built.fabric.refuse, built.fabric.lie = 0, False, False
    for ip in FLOATING.values():
        built.allocate(ip, built.hosts["node-a"])
    yield built
    for ip in FLOATING.values():
        built.release(ip)


def announce(vpc: Vpc, ip: str, host: Host) -> None:
    plumbing.announce(host, ip)


def assign(vpc: Vpc, ip: str, host: Host) -> None:
    vpc.assign(ip, host)


def moves_of(vpc: Vpc, ip: str, since: int) -> list[Move]:
    return [move for move in vpc.fabric.moves()[since:] if move.ip == ip]


def heard(vpc: Vpc, host: Host) -> None:
    """Return when the fabric has heard everything that this host announced so far: an announcement that it
    counts as meaningless follows on the same wire."""
    before = vpc.fabric.ignored
    plumbing.announce(host, "10.77.0.99")
    while vpc.fabric.ignored == before:
        pass


def route(vpc: Vpc, ip: str) -> str:
    family = "-6" if ":" in ip else "-4"
    return vpc.router.run(["ip", family, "route", "show", ip]).stdout


def deliveries(vpc: Vpc, ip: str, host: Host) -> int:
    """Packets of one ping that reach the host's floating interface."""
    client = vpc.clients["client-in"]
    with host.capture("eth1", expression="icmp or icmp6") as capture:
        client.run(["ping", "-c1", "-W0.2", ip], check=False)
        capture.stop()
    listing = host.run(["tcpdump", "-nr", str(capture.path)]).stdout
    return listing.count(f"> {ip}: ICMP")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ask", [announce, assign])
def test_a_move_takes_the_routes_and_is_logged_with_its_times(vpc: Vpc, ask: Ask, version: int) -> None:
    ip, b, since = FLOATING[version], vpc.hosts["node-b"], len(vpc.fabric.moves())
    assert vpc.fabric.owner(ip) == "node-a"
    assert vpc.hosts["node-a"].eth1.router_ifname in route(vpc, ip)
    ask(vpc, ip, b)
    assert vpc.fabric.wait_owner(ip, "node-b")
    assert b.eth1.router_ifname in route(vpc, ip)
    assert vpc.fabric.owner_eni(ip) == "eth1"
    (move,) = moves_of(vpc, ip, since)
    assert (move.source, move.target, move.outcome) == ("node-a", "node-b", "moved")
    assert move.effective_mono_ns and move.effective_ns
    assert move.asked_mono_ns <= move.effective_mono_ns and move.asked_ns <= move.effective_ns


@pytest.mark.parametrize("ask", [announce, assign])
def test_a_move_takes_effect_after_move_seconds_and_not_before(vpc: Vpc, ask: Ask) -> None:
    ip, a, b = FLOATING[4], vpc.hosts["node-a"], vpc.hosts["node-b"]
    since = len(vpc.fabric.moves())
    vpc.fabric.move_seconds = 0.7
    ask(vpc, ip, b)
    heard(vpc, b)
    assert deliveries(vpc, ip, a) >= 1 and vpc.fabric.owner(ip) == "node-a"
    ask(vpc, ip, b)  # saying it again does not begin it again
    assert vpc.fabric.wait_owner(ip, "node-b")
    assert deliveries(vpc, ip, b) >= 1 and deliveries(vpc, ip, a) == 0
    (move,) = moves_of(vpc, ip, since)
    assert move.effective_mono_ns is not None
    assert move.effective_mono_ns - move.asked_mono_ns >= 0.7e9
    assert move.repeats >= 1


@pytest.mark.parametrize(("hook", "outcome"), [("refuse", "refused"), ("lie", "lied")])
@pytest.mark.parametrize("ask", [announce, assign])
def test_a_refused_move_and_a_lie_change_nothing(vpc: Vpc, ask: Ask, hook: str, outcome: str) -> None:
    ip, b, since = FLOATING[4], vpc.hosts["node-b"], len(vpc.fabric.moves())
    setattr(vpc.fabric, hook, True)
    assert getattr(vpc.fabric, hook) is True
    for _ in range(3):
        ask(vpc, ip, b)
    heard(vpc, b)
    assert vpc.fabric.owner(ip) == "node-a"
    assert deliveries(vpc, ip, vpc.hosts["node-a"]) >= 1
    (move,) = moves_of(vpc, ip, since)
    assert (move.outcome, move.repeats, move.effective_ns) == (outcome, 2, None)
    setattr(vpc.fabric, hook, False)
    ask(vpc, ip, b)
    assert vpc.fabric.wait_owner(ip, "node-b"), "the control: without the hook the same request moves it"


def test_the_newest_request_wins_over_a_pending_one(vpc: Vpc) -> None:
    ip, since = FLOATING[4], len(vpc.fabric.moves())
    vpc.fabric.move_seconds = 0.5
    vpc.assign(ip, vpc.hosts["node-b"])
    vpc.assign(ip, vpc.hosts["node-c"])
    assert vpc.fabric.wait_owner(ip, "node-c")
    assert [move.outcome for move in moves_of(vpc, ip, since)] == ["superseded", "moved"]
    vpc.assign(ip, vpc.hosts["node-b"])
    vpc.assign(ip, vpc.hosts["node-c"])
    assert not vpc.fabric.wait_owner(ip, "node-b", timeout_s=0.7), "the owner took its address back in time"


def test_a_move_can_be_reversed(vpc: Vpc) -> None:
    ip = FLOATING[6]
    with pytest.raises(FabricError, match="no earlier owner"):
        vpc.fabric.reverse(ip)
    announce(vpc, ip, vpc.hosts["node-b"])
    assert vpc.fabric.wait_owner(ip, "node-b")
    vpc.fabric.reverse(ip)
    assert vpc.fabric.owner(ip) == "node-a"
    assert vpc.hosts["node-a"].eth1.router_ifname in route(vpc, ip)


def test_announcements_of_unknown_addresses_foreign_macs_and_clients_mean_nothing(vpc: Vpc) -> None:
    ip, b, client = FLOATING[4], vpc.hosts["node-b"], vpc.clients["client-in"]
    since, before = len(vpc.fabric.moves()), vpc.fabric.ignored
    b.send_frame("eth1", plumbing.announcement(ip, bytes.fromhex("026666666666")))
    client.send_frame("eth0", plumbing.announcement(ip, bytes.fromhex(client.eth0.mac.replace(":", ""))))
    heard(vpc, b)
    while vpc.fabric.ignored < before + 3:
        pass
    assert vpc.fabric.owner(ip) == "node-a"
    assert moves_of(vpc, ip, since) == []


def test_two_hundred_addresses_move_in_one_batch(vpc: Vpc) -> None:
    a, b, since = vpc.hosts["node-a"], vpc.hosts["node-b"], len(vpc.fabric.moves())
    addresses = [f"10.77.1.{i}" for i in range(1, 101)] + [f"fd77::f:{i:x}00" for i in range(2, 102)]
    for ip in addresses:
        vpc.allocate(ip, a)
    mac = bytes.fromhex(b.eth1.mac.replace(":", ""))
    frames = [plumbing.announcement(ip, mac) for ip in addresses]

    def burst() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("eth1", 0))
            for frame in frames:
                sock.send(frame)

    b.inside(burst)
    for ip in addresses:
        assert vpc.fabric.wait_owner(ip, "node-b"), ip
    moves = vpc.fabric.moves()[since:]
    assert sorted(move.ip for move in moves) == sorted(addresses)
    routes = vpc.router.run(["ip", "route"]).stdout + vpc.router.run(["ip", "-6", "route"]).stdout
    assert routes.count(f"dev {b.eth1.router_ifname}") >= 200
    for ip in addresses:
        vpc.release(ip)


def test_addresses_of_a_deleted_host_wait_for_the_next_owner(vpc: Vpc) -> None:
    ip, doomed = FLOATING[4], vpc.host("node-d", configured=True)
    vpc.fabric.move_seconds = 0
    vpc.assign(ip, doomed)
    vpc.fabric.move_seconds = 0.5
    vpc.assign(FLOATING[6], doomed)  # pending while the host goes
    doomed.delete()
    assert vpc.fabric.owner(ip) is None
    assert route(vpc, ip) == ""
    assert not vpc.fabric.wait_owner(FLOATING[6], "node-d", timeout_s=0.7)
    assert vpc.fabric.owner(FLOATING[6]) == "node-a"
    announce(vpc, ip, vpc.hosts["node-b"])
    assert vpc.fabric.wait_owner(ip, "node-b")


def test_bad_requests_are_refused_by_name(vpc: Vpc) -> None:
    with pytest.raises(ValueError, match="not in the VPC's subnet"):
        vpc.allocate("192.0.2.1", vpc.hosts["node-a"])
    with pytest.raises(FabricError, match="allocated already"):
        vpc.allocate(FLOATING[4], vpc.hosts["node-a"])
    with pytest.raises(FabricError, match="no such hook"):
        vpc.fabric.call("set", speed=3)
    with pytest.raises(FabricError, match=r"10\.77\.0\.77"):
        vpc.fabric.owner("10.77.0.77")


def test_another_process_reaches_the_fabric_by_its_path(vpc: Vpc) -> None:
    assert Fabric(vpc.fabric.control).owner(FLOATING[4]) == "node-a"


MAC = bytes.fromhex("020000000001")
NA = plumbing.announcement("fd77::1", MAC)
ARP = plumbing.announcement("10.77.0.1", MAC)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (ARP, ("10.77.0.1", "02:00:00:00:00:01")),
        (ARP[:21] + b"\x02" + ARP[22:], ("10.77.0.1", "02:00:00:00:00:01")),
        (NA, ("fd77::1", "02:00:00:00:00:01")),
        (ARP[:38] + bytes(4), None),
        (ARP[:28] + bytes(4) + ARP[32:38] + bytes(4), None),
        (ARP[:41], None),
        (NA[:58] + struct.pack("!I", 0x60000000) + NA[62:], None),
        (NA[:54] + b"\x87" + NA[55:], None),
        (NA[:70], None),
        (b"", None),
    ],
    ids=[
        "arp request", "arp reply", "na", "arp question", "arp probe", "short arp", "solicited na", "ns",
        "short na", "empty",
    ],
)  # fmt: skip
def test_announcements_are_told_from_other_frames(frame: bytes, expected: tuple[str, str] | None) -> None:
    assert fabricd.announced(frame) == expected
