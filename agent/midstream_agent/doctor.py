"""What this node lacks for migrations, each finding with its remedy."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.node import Node
from midstream_agent.tunnel_check import try_tunnel

CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_BPF = 12, 21, 19, 39


def _finding(check: str, good: bool, message: str, remedy: str, severity: str = "error") -> pb.Finding:
    return pb.Finding(check=check, severity="ok" if good else severity, message=message, remedy="" if good else remedy)


async def examine(node: Node, peers: Iterable[pb.NodeRef] = ()) -> list[pb.Finding]:
    """All checks of this node, in the order in which a migration would meet them; `peers`: tried by the tunnel, too."""
    found = [*capabilities(), await _holds(node), conntrack_loose(), *mptcp(), *_addresses(node), _tunnel(node)]
    tried = await asyncio.gather(*(try_tunnel(node, p) for p in peers))
    return [*found, *tried, *_imds(node)]


def capabilities(status: Path = Path("/proc/self/status")) -> list[pb.Finding]:
    line = next(x for x in status.read_text(encoding="ascii").splitlines() if x.startswith("CapEff:"))
    have = int(line.split()[1], 16)
    wanted = {
        "CAP_NET_ADMIN": (CAP_NET_ADMIN, "TCP_REPAIR, addresses, TC"),
        "CAP_SYS_ADMIN": (CAP_SYS_ADMIN, "entering pods' network namespaces"),
        "CAP_SYS_PTRACE": (CAP_SYS_PTRACE, "reading /proc/PID/root of pods"),
        "CAP_BPF": (CAP_BPF, "the hold's maps"),
    }
    return [
        _finding(name.lower(), bool(have >> bit & 1), f"{name}: {why}", f"add {name} to the agent's securityContext")
        for name, (bit, why) in wanted.items()
    ]


async def _holds(node: Node) -> pb.Finding:
    where = node.settings.bpffs
    there = (where / "ms_flows").exists()
    return _finding("bpf", there, f"hold programs under {where}", "run: python -m midstream_agent.hold load")


def conntrack_loose(path: Path = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")) -> pb.Finding:
    """With loose=0 a restored flow is dead at the target (measured), so it is an error, not a warning."""
    if not path.exists():
        return _finding("conntrack", True, "no connection tracking in this namespace", "")
    loose = path.read_text(encoding="ascii").strip() == "1"
    text = "nf_conntrack_tcp_loose: mid-stream flows are picked up"
    return _finding("conntrack", loose, text, "sysctl -w net.netfilter.nf_conntrack_tcp_loose=1")


def mptcp(path: Path = Path("/proc/sys/net/mptcp/enabled")) -> list[pb.Finding]:
    if not path.exists() or path.read_text(encoding="ascii").strip() == "0":
        return []
    text = "MPTCP is enabled: listeners of Go >= 1.24 use it and cannot be migrated"
    remedy = "GODEBUG=multipathtcp=0 in pods written in Go, or sysctl net.mptcp.enabled=0"
    return [_finding("mptcp", False, text, remedy, "warning")]


def _imds(node: Node) -> list[pb.Finding]:
    if not node.settings.imds.host:
        return []
    wrong = [f"{path}: {why}" for path, why in sorted(node.notices.health.items())]
    text = "; ".join(wrong) or f"instance metadata of {node.notices.instance_id} is heard"
    remedy = "the agent needs hostNetwork, or a hop limit of 2 (HttpPutResponseHopLimit); IMDS must be enabled"
    return [_finding("imds", not wrong, text, remedy)]


def _addresses(node: Node) -> list[pb.Finding]:
    nic = node.settings.nic
    both = bool(nic.gateway_v4 or nic.gateway_v6)
    return [_finding("nic", both, f"{nic.name} carries floating IPs", "give --nic-gateway-v4 or --nic-gateway-v6")]


def _tunnel(node: Node) -> pb.Finding:
    """Whether this node can steer at all; whether packets pass to another node, `try_tunnel` and each job find out."""
    text = f"VXLAN tunnel on UDP port {node.settings.tunnel_port}: streams change nodes before their address does"
    remedy = "start the agent without --no-tunnel" if not node.settings.tunnel else "a kernel with CONFIG_VXLAN"
    remedy += "; without a tunnel clients wait until the network has moved the address"
    return _finding("tunnel", node.tunnel is not None, text, remedy, "warning")
