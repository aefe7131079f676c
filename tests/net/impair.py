"""Loss and reordering of what passes between two nodes, by the testbed's router (this kernel has no netem).

    with impair.between(world, lost_in=100, late_in=10) as impaired:
        ...
    impaired.lost, impaired.late      packets

Rules at the router's ports of both nodes pick tunnel packets by chance. A lost one is dropped. A late one goes
through a veth pair with a slow token bucket, so that those that follow it are there first. Nodes cut what they send to
the tunnel into single packets meanwhile, as real NICs do: chance meets packets and not 64 kB at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from world import World

TUNNEL_PORT = 9445
SLOW_IN, SLOW_OUT, SLOW_MAC = "slow0", "slow1", "02:77:ff:00:00:01"
SLOW_BYTES_PER_S = 4_000_000  # a packet of 9,000 bytes is late by 2 ms, the one after it by 4
SLOW_BURST_BYTES = 10_000
SLOW_QUEUE_BYTES = 4 << 20
GSO_SEGMENTS = 65_535  # the kernel's default

RULES = """
table netdev ms_impair {
  counter lost { }
  counter late { }
  chain rules {
    %(lose)s
    %(delay)s
  }
  %(chains)s
}
"""
CHAIN = """chain port%(number)d {
    type filter hook ingress device "%(port)s" priority 0;
    udp dport %(udp)d jump rules
  }"""


@dataclass
class Impaired:
    lost: int = 0
    late: int = 0


@contextmanager
def between(world: World, *, lost_in: int = 0, late_in: int = 0) -> Iterator[Impaired]:
    """One packet in `lost_in` is lost, one in `late_in` is late; 0: none."""
    found = Impaired()
    with ExitStack() as stack:
        for host in (world.a, world.b):
            set_gso(host, 1)
            stack.callback(set_gso, host, GSO_SEGMENTS)
        if late_in:
            stack.enter_context(slow_way(world))
        world.vpc.router.nft(rules(world, lost_in, late_in))
        stack.callback(world.vpc.router.nft, "delete table netdev ms_impair")
        yield found
        found.lost, found.late = (counter(world, name) for name in ("lost", "late"))


def rules(world: World, lost_in: int, late_in: int) -> str:
    lose = f"numgen random mod {lost_in} 0 counter name lost drop" if lost_in else ""
    late = f"numgen random mod {late_in} 0 counter name late ether daddr set {SLOW_MAC} fwd to {SLOW_IN}"
    ports = [host.eth0.router_ifname for host in (world.a, world.b)]
    chains = [CHAIN % {"number": i, "port": port, "udp": TUNNEL_PORT} for i, port in enumerate(ports)]
    return RULES % {"lose": lose, "delay": late if late_in else "", "chains": "\n  ".join(chains)}


def counter(world: World, name: str) -> int:
    listing = world.vpc.router.run(["nft", "-j", "list", "counter", "netdev", "ms_impair", name], privileged=True)
    return next(int(x["counter"]["packets"]) for x in json.loads(listing.stdout)["nftables"] if "counter" in x)


@contextmanager
def slow_way(world: World) -> Iterator[None]:
    """What goes into slow0 comes out of slow1, late, and is routed on as if it had come by its own port."""
    router = world.vpc.router

    def make(ip: Any) -> None:
        ip.link("add", ifname=SLOW_IN, kind="veth", mtu=world.vpc.mtu, peer={"ifname": SLOW_OUT, "mtu": world.vpc.mtu})
        into, out = (ip.link_lookup(ifname=name)[0] for name in (SLOW_IN, SLOW_OUT))
        ip.link("set", index=out, address=SLOW_MAC)
        for index in (into, out):
            ip.link("set", index=index, state="up")
        ip.tc("add", "tbf", into, rate=SLOW_BYTES_PER_S, burst=SLOW_BURST_BYTES, limit=SLOW_QUEUE_BYTES)

    chain = ["inet", "ms_router", "antispoof"]
    router.netlink(make)
    rule = router.run(["nft", "-e", "-a", "insert", "rule", *chain, "iifname", SLOW_OUT, "accept"], privileged=True)
    handle = re.search(r"handle (\d+)", rule.stdout)
    assert handle is not None, rule.stdout
    try:
        yield
    finally:
        router.run(["nft", "delete", "rule", *chain, "handle", handle[1]], privileged=True)
        router.netlink(lambda ip: ip.link("del", index=ip.link_lookup(ifname=SLOW_IN)[0]))


def set_gso(host: Any, segments: int) -> None:
    index = host.netlink(lambda ip: ip.link_lookup(ifname="eth0")[0])
    host.netlink(lambda ip: ip.link("set", index=index, gso_max_segs=segments))
