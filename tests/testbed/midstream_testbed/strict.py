"""The firewall rules that make the testbed as strict as EC2 and EKS. Each has a counter that tests read.

Router (EC2): a packet whose source address does not belong to the interface it came in by is dropped. ``fib
saddr . iif`` asks the routing table, which is the fabric's table, so a moved address is enforced from the
same instant.

Hosts (EKS): the VPC CNI's SNAT of traffic that leaves the VPC (decided on a connection's first packet, as NAT
is: a restored flow whose first packet at the target comes from the pod is rewritten), a network policy that
lets pods answer but not begin, and "ct state invalid drop" as kube-proxy has it.
"""

from __future__ import annotations

import json
from typing import Any

ROUTER_RULES = """
table inet ms_router {
  set spoofed { type ifname; flags dynamic; counter; }
  chain antispoof {
    type filter hook prerouting priority raw; policy accept;
    iif lo accept
    ip6 saddr { ::/128, fe80::/10 } accept
    fib saddr . iif oif 0 update @spoofed { iifname counter } drop
  }
}
"""

# A tracked security group: each floating interface has a connection table of its own (a conntrack zone), and
# a packet in mid-stream of a connection that the interface never saw begin is dropped, whichever way it goes.
TRACKED_TABLE = """
table inet ms_group {
  counter unknown_flow { }
  chain zones { type filter hook prerouting priority -299; policy accept; }
  chain verdict {
    type filter hook forward priority filter; policy accept;
    ct zone 0 accept
    ct state invalid counter name unknown_flow drop
  }
}
"""
TRACKED_PORT = """
insert rule inet ms_group zones iifname "%(port)s" ct zone set %(zone)d
insert rule inet ms_group zones fib daddr oif "%(port)s" ct zone set %(zone)d
"""

HOST_RULES = """
table inet ms_strict {
  set may_connect { type ifname; }
  counter invalid { }
  counter pod_first { }
  chain forward {
    type filter hook forward priority filter; policy accept;
    ct state invalid counter name invalid drop
    iifname "eni*" oifname != "eni*" ct state new iifname != @may_connect counter name pod_first drop
  }
}
table ip ms_snat {
  counter snatted { }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    ip daddr %(vpc4)s return
    oifname != "vlan*" fib daddr type != local counter name snatted snat to %(node4)s random
  }
}
"""


def counters(listing: str) -> dict[str, int]:
    """Packets by name from ``nft -j list counters``."""
    found: dict[str, int] = {}
    for entry in json.loads(listing)["nftables"]:
        if "counter" in entry:
            found[entry["counter"]["name"]] = entry["counter"]["packets"]
    return found


def set_counters(listing: str) -> dict[str, int]:
    """Packets by element from ``nft -j list set`` of a set of interface names with counters."""
    found: dict[str, int] = {}
    for entry in json.loads(listing)["nftables"]:
        for element in entry.get("set", {}).get("elem", []):
            inner: dict[str, Any] = element["elem"]
            found[inner["val"]] = inner["counter"]["packets"]
    return found
