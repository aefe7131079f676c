"""Who else reaches a pod that is moving, and what: clients in other pods of both nodes, behind a NAT and in the
internet; datagrams; what a router has to say of a path that has become narrower (docs/steer.md).
"""

from __future__ import annotations

import functools
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import nat
import pytest
from bytes_client import pattern, piece
from midstream_agent.hold import Hold
from midstream_testbed.fleet import wait_for_line
from midstream_testbed.machine import Client, Pod
from midstream_testbed.namespace import Namespace, family_of
from midstream_testbed.pod_net import IFA_F_NODAD
from remains import Remains
from world import PORT, V4, V6, World

HOPS = 3
NARROW_BYTES = 1400
UDP_PORT = 7000
QUEUED_BYTES = 8 << 20  # more than all queues between pod and client hold
ANSWERS = """
import socket, sys
_, address, port, name = sys.argv
v6 = ":" in address
sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
# an answer must come from the address that was asked, which is not here yet on the target
sock.setsockopt(*((41, 78) if v6 else (0, 15)), 1)  # IPV6_FREEBIND, IP_FREEBIND
sock.bind((address, int(port)))
print("ready", flush=True)
while True:
    text, sender = sock.recvfrom(100)
    sock.sendto(name.encode() + b" " + text, sender)
"""


@pytest.fixture
def world(steer_world: World) -> Iterator[World]:
    yield steer_world
    steer_world.vpc.fabric.refuse, steer_world.vpc.fabric.move_seconds = False, 0


@contextmanager
def everybody_else(world: World) -> Iterator[dict[str, tuple[Namespace, str]]]:
    """Where a client can sit beside `World.places`, and the address that it connects to."""
    with ExitStack() as stack:
        first, second = stack.enter_context(nat.behind_one_address(world, "nat-1", "nat-2"))
        found: dict[str, tuple[Namespace, str]] = {"nat-1": (first, V4), "nat-2": (second, V4)}
        found["internet"] = stack.enter_context(nat.in_the_internet(world, "internet")), nat.EIP
        for host in (world.a, world.b):
            pod = host.add_pod(f"client-{host.name}", may_connect=True)
            stack.callback(pod.delete)
            found |= {f"{pod.name} {address}": (pod, address) for address in (V4, V6)}
        yield found


def test_streams_of_clients_wherever_they_are_go_on(world: World) -> None:
    """Old connections, and new ones all the while."""
    world.vpc.fabric.move_seconds = 1.0
    with everybody_else(world) as places:
        long: dict[str, Any] = {"kind": "both", "size": 1_000_000, "seconds": HOPS * 2.0}
        short: dict[str, Any] = {"seconds": 0.3, "spread_s": HOPS * 1.5, "size_log10": (2, 5)}
        groups = {
            f"{name}: {kind}": world.clients(place, count, 17 * i + count, address=address, **options)
            for i, (name, (place, address)) in enumerate(places.items())
            for kind, count, options in (("long", 3, long), ("short", 8, short))
        }
        world.wait_streams(V4, 3 * 5)
        for _ in range(HOPS):
            report = world.hop()
            assert (report["phase"], report["switchover"]) == ("PHASE_SUCCEEDED", "Steer"), report["output"]
        results = {name: group.finish() for name, group in groups.items()}
    assert {name: r["errors"] for name, r in results.items() if r["errors"]} == {}
    assert sum(r["ok"] for r in results.values()) == (3 + 8) * len(places)
    Remains.settled(world)


# -- datagrams -------------------------------------------------------------------------------------------------


@contextmanager
def answering(world: World, address: str) -> Iterator[None]:
    """Each pod answers datagrams to the address with its node's name."""
    processes = []
    for name, pod in world.pods.items():
        argv = [sys.executable, "-c", ANSWERS, address, str(UDP_PORT), name]
        processes.append(pod.popen(argv, name="udp", privileged=True))
    try:
        for process in processes:
            wait_for_line(process, "ready", 20)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ask(sock: socket.socket, number: int) -> str:
    """The node that answers; empty: nobody does."""
    sock.send(str(number).encode())
    try:
        while True:
            node, _, text = sock.recv(100).decode().partition(" ")
            if text == str(number):
                return node
    except TimeoutError:
        return ""


@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
def test_datagrams_are_answered_by_the_node_that_has_the_address(world: World, address: str) -> None:
    """They have no state that could move: the source's pod answers until the address has moved, then the target's."""
    world.vpc.fabric.move_seconds = 1.0
    source, target = world.at, world.away
    heard = []
    with answering(world, address), world.outside.new_socket(family_of(address), socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.25)
        sock.connect((address, UDP_PORT))
        heard += [ask(sock, i) for i in range(10)]
        job = world.hop_in_background()
        while not (phase := world.job_phase(job)) or phase not in ("Succeeded", "Failed", "RolledBack"):
            heard += [ask(sock, len(heard)) for _ in range(10)]
        heard += [ask(sock, len(heard)) for _ in range(10)]
    assert phase == "Succeeded"
    world.at = target
    assert heard[:10] == [source] * 10
    assert heard[-10:] == [target] * 10
    answers = [node for node in heard if node]
    assert answers == [source] * answers.count(source) + [target] * answers.count(target)
    assert len(heard) - len(answers) <= 1  # one that was answered in the instant of the move


# -- a path that becomes narrower ------------------------------------------------------------------------------


class Download:
    """A client that checks what it reads, when it is told to read."""

    def __init__(self, where: Namespace, address: str) -> None:
        self.sock = where.connect(address, PORT)
        self.sock.settimeout(20)
        self.received = 0
        self.sock.send(b'{"seed": 3, "up": 1, "down": 1099511627776, "chunk": 16384}\n')

    def read(self, count: int) -> None:
        theirs, end = pattern(4), self.received + count
        while self.received < end:
            data = self.sock.recv(16_384)
            assert data == piece(theirs, self.received, len(data)), f"at byte {self.received}"
            self.received += len(data)


@contextmanager
def narrow(world: World, client: Client) -> Iterator[None]:
    """The wire between router and client carries NARROW_BYTES at most; the router says so from an address of it."""
    router, port = world.vpc.router, client.eth0.router_ifindex
    address = {"index": port, "address": client.ipv6.rpartition("::")[0] + "::1", "prefixlen": 128}
    router.netlink(lambda ip: ip.addr("add", **address, flags=IFA_F_NODAD))
    set_mtu(world, client, NARROW_BYTES)
    try:
        yield
    finally:
        set_mtu(world, client, world.vpc.mtu)
        router.netlink(lambda ip: ip.addr("del", **address))


def set_mtu(world: World, client: Client, mtu: int) -> None:
    for end, name in ((world.vpc.router, client.eth0.router_ifname), (client, "eth0")):
        (index,) = end.netlink(functools.partial(_link_index, name))
        end.netlink(functools.partial(_set_mtu, index, mtu))


def _link_index(name: str, ip: Any) -> list[int]:
    return list(ip.link_lookup(ifname=name))


def _set_mtu(index: int, mtu: int, ip: Any) -> None:
    ip.link("set", index=index, mtu=mtu)


def path_mtu(pod: Pod, to: str) -> int:
    """What the pod's kernel has learnt of the path."""
    (route,) = pod.netlink(lambda ip: ip.route("get", dst=to))
    metrics = route.get("metrics")
    return int(metrics.get("mtu") or 0) if metrics else 0


def counter(world: World, node: str, name: str) -> int:
    with Hold.open(world.agent(node).bpffs) as hold:
        return hold.counters()[name]


def wait_until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.05)


@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
def test_a_path_that_becomes_narrower_is_told_to_a_stream_that_has_moved(world: World, address: str) -> None:
    """The router sends its word to the floating IP, so to the source; the socket that must hear it is at the target."""
    world.vpc.fabric.refuse = True  # the address stays, for as long as this test wants
    source, target = world.at, world.away
    to = world.outside.ipv6 if address == V6 else world.outside.ipv4
    stream = Download(world.outside, address)
    stream.read(1_000_000)
    job = world.hop_in_background()
    wait_until(lambda: world.job_phase(job) == "Committing", "the first batch")
    with narrow(world, world.outside):
        stream.read(QUEUED_BYTES)
        assert world.vpc.fabric.owner(address) == source
        assert path_mtu(world.pods[target], to) == NARROW_BYTES
        world.vpc.fabric.refuse = False
        assert world.wait_job(job) == "Succeeded"
        world.at = target
        stream.read(QUEUED_BYTES)
    stream.sock.close()
    Remains.settled(world)
