"""What lies in a set of namespaces, so that a test can say that nothing was left behind.

A snapshot is a set of plain lines, each naming its namespace and kind: a difference reads like a report.

    before = leaks.snapshot(a, b, pod)
    ...migrate, roll back...
    assert leaks.difference(before, leaks.snapshot(a, b, pod)) == leaks.NOTHING

Not in it, since they change by themselves: neighbour entries, lifetimes, counters, sockets in TIME_WAIT.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream_testbed import kernel, state
from midstream_testbed.namespace import Namespace

Line = tuple[str, str, str]  # namespace, kind, what

LOCAL_TABLE = 255
RTM_F_CLONED = 0x200
TIME_WAIT = "06"
TCP_STATES = """- ESTABLISHED SYN_SENT SYN_RECV FIN_WAIT1 FIN_WAIT2 TIME_WAIT CLOSE CLOSE_WAIT LAST_ACK LISTEN
CLOSING NEW""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Difference:
    added: tuple[Line, ...]
    gone: tuple[Line, ...]

    def __str__(self) -> str:
        lines = [f"+ {' '.join(line)}" for line in self.added] + [f"- {' '.join(line)}" for line in self.gone]
        return "\n".join(lines) or "nothing"

    __repr__ = __str__


NOTHING = Difference((), ())


def difference(before: frozenset[Line], after: frozenset[Line]) -> Difference:
    return Difference(tuple(sorted(after - before)), tuple(sorted(before - after)))


def snapshot(*namespaces: Namespace, sockets: bool = True, pins: Path | None = None) -> frozenset[Line]:
    """Links, addresses, routes, rules, qdiscs, filters, firewall rules, sockets and named namespaces; with
    `pins` also the files below that bpffs folder."""
    lines: set[Line] = set()
    for namespace in namespaces:
        lines.update((namespace.name, *found) for found in namespace.netlink(_netlink_objects))
        lines.update((namespace.name, "nft", rule) for rule in _nft_rules(namespace))
        if sockets:
            lines.update((namespace.name, "socket", found) for found in _sockets(namespace))
    lines.update(("-", "netns", name) for name in _named_namespaces(namespaces))
    if pins is not None:
        lines.update(("-", "pin", str(path.relative_to(pins))) for path in pins.rglob("*"))
    return frozenset(lines)


def open_fds(*pids: int) -> frozenset[Line]:
    """Open files of processes by what they are (a socket by its inode)."""
    lines: set[Line] = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                lines.add((str(pid), "fd", f"{fd.name} {os.readlink(fd)}"))
            except FileNotFoundError:  # closed between listing and reading
                continue
    return frozenset(lines)


def _netlink_objects(ip: Any) -> set[tuple[str, str]]:
    names: dict[int, str] = {}
    found: set[tuple[str, str]] = set()
    for link in ip.get_links():
        names[link["index"]] = link.get("ifname")
        found.add(("link", f"{link.get('ifname')} mtu {link.get('mtu')} {link.get('operstate')}"))
    for address in ip.get_addr():
        name = names.get(address["index"], "?")
        found.add(("address", f"{address.get('address')}/{address['prefixlen']} {name}"))
    found.update(("route", line) for line in _routes(ip, names))
    for family in (socket.AF_INET, socket.AF_INET6):
        found.update(("rule", _rule(rule)) for rule in ip.get_rules(family=family))
    for qdisc in ip.get_qdiscs():
        found.add(("qdisc", f"{names.get(qdisc['index'], '?')} {qdisc.get('kind')} {qdisc['handle']:x}"))
    found.update(("filter", line) for line in _filters(ip, names))
    return found


def _routes(ip: Any, names: dict[int, str]) -> Iterator[str]:
    for family in (socket.AF_INET, socket.AF_INET6):
        for route in ip.get_routes(family=family):
            if route["flags"] & RTM_F_CLONED or route.get("table") == LOCAL_TABLE:
                continue
            where = f"via {route.get('gateway')} dev {names.get(route.get('oif'), '?')}"
            what = f"{route.get('dst')}/{route['dst_len']} family {family:d}"
            yield f"{what} {where} table {route.get('table')}"


def _rule(rule: Any) -> str:
    source, target = f"{rule.get('src')}/{rule['src_len']}", f"{rule.get('dst')}/{rule['dst_len']}"
    mark = f"{rule.get('fwmark')}/{rule.get('fwmask')}"
    match = f"from {source} to {target} mark {mark} family {rule['family']}"
    return f"{rule.get('priority')}: {match} table {rule.get('table')}"


def _filters(ip: Any, names: dict[int, str]) -> Iterator[str]:
    for index, name in names.items():
        for parent, hook in ((0xFFFFFFF2, "ingress"), (0xFFFFFFF3, "egress")):
            for entry in ip.get_filters(index=index, parent=parent):
                if entry["handle"]:
                    place = f"prio {entry['info'] >> 16} handle {entry['handle']:x}"
                    yield f"{name} {hook} {place} {entry.get('kind')}"


def _nft_rules(namespace: Namespace) -> list[str]:
    """The ruleset without its counters' values, a line each."""
    listing = namespace.run(["nft", "-s", "list", "ruleset"], privileged=True).stdout
    return sorted({line.strip() for line in listing.splitlines() if line.strip() not in ("", "}")})


def _sockets(namespace: Namespace) -> Iterator[str]:
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in namespace.proc_net(kind).splitlines()[1:]:
            _, local, remote, number, *_ = line.split()
            if number != TIME_WAIT:
                yield f"{kind} {local} {remote} {TCP_STATES[int(number, 16)]}"
    for line in namespace.proc_net("unix").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7:
            yield f"unix {fields[7]}"


def _named_namespaces(namespaces: tuple[Namespace, ...]) -> list[str]:
    prefixes = {namespace.netns_name.partition("-")[0] for namespace in namespaces}
    return [path.name for path in kernel.NETNS_DIR.iterdir() if path.name.partition("-")[0] in prefixes]


def of_prefix(prefix: str) -> list[str]:
    """Everything on the machine that carries a testbed's prefix."""
    found = [str(tree) for tree in state.cgroup_trees(prefix)]
    found += [str(path) for path in kernel.NETNS_DIR.glob(f"{prefix}*")]
    found += [str(path) for path in state.ROOT.glob(prefix)]
    found += [str(path) for path in state.BPFFS.glob(f"{prefix}-*")]
    return found
