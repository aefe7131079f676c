"""Clients whose address is not their own: several behind one NAT, and one in the internet that knows an EIP.

Both translations are the testbed router's, as they would be a NAT gateway's and the internet gateway's. The EIP's is
stateless, as the internet gateway's is: it knows of addresses and not of connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from midstream_testbed.machine import Client
from world import V4, World

SHARED, EIP = "198.18.0.200", "203.0.113.10"

NAT = """
table ip ms_nat {
  chain post {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr { %(clients)s } snat to %(shared)s
  }
}
"""
ONE_TO_ONE = """
table ip ms_eip {
  chain in {
    type filter hook prerouting priority -250; policy accept;
    iifname "%(port)s" ip daddr %(eip)s ip daddr set %(floating)s
  }
  chain out {
    type filter hook postrouting priority 200; policy accept;
    oifname "%(port)s" ip saddr %(floating)s ip saddr set %(eip)s
  }
}
"""


@contextmanager
def behind_one_address(world: World, *names: str) -> Iterator[list[Client]]:
    """Clients outside of the VPC that all appear as `SHARED`."""
    clients = [world.vpc.client(name) for name in names]
    world.vpc.router.nft(NAT % {"clients": ", ".join(c.ipv4 for c in clients), "shared": SHARED})
    try:
        yield clients
    finally:
        world.vpc.router.nft("delete table ip ms_nat")
        for client in clients:
            client.delete()


@contextmanager
def in_the_internet(world: World, name: str) -> Iterator[Client]:
    """A client that reaches the floating IP as `EIP`, and hears from `EIP` only."""
    client = world.vpc.client(name)
    world.vpc.router.nft(ONE_TO_ONE % {"port": client.eth0.router_ifname, "eip": EIP, "floating": V4})
    try:
        yield client
    finally:
        world.vpc.router.nft("delete table ip ms_eip")
        client.delete()
