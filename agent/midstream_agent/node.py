"""What all jobs of one agent share: settings, BPF maps, netlink, NIC, injector, linger clean-up, epochs."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import struct
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from midstream_runtime.contract.errors import Final
from pyroute2.netlink.exceptions import NetlinkError

from midstream_agent import conntrack, journal
from midstream_agent.announce import Gateway, Nic, Responder, resolve
from midstream_agent.hold import Hold
from midstream_agent.inject import Injector
from midstream_agent.kv_receive import KvServer
from midstream_agent.metrics import Metrics
from midstream_agent.net import Link, NetWorker
from midstream_agent.notices import Board, watch
from midstream_agent.pods import Pod, find_pod
from midstream_agent.routes import RouteSocket
from midstream_agent.settings import Kv, Settings, host_of
from midstream_agent.tunnel import Tunnel

log = logging.getLogger(__name__)
CTL = struct.Struct("=8I")  # struct ms_flow_ctl
KV_STREAMS, KV_STREAM_MBITS = 8, 5000
# TCP_REPAIR, addresses, TC; /proc/PID/root of pods; their namespaces, and BPF
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}


class Tasks:
    """Background tasks by name; an exception in one is logged with its name, never lost."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task %s failed", task.get_name(), exc_info=task.exception())

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass(slots=True)
class Attached:
    """A pod of this node as a job sees it. Owns the pod's namespace fd."""

    pod: Pod
    link: Link

    def close(self) -> None:
        self.pod.close()


@dataclass(slots=True)
class Node:
    """Everything of this node that outlives a job."""

    settings: Settings
    boot_id: str
    net: NetWorker
    hold: Hold
    nic: Nic
    injector: Injector
    routes: RouteSocket
    responders: list[Responder]
    tunnel: Tunnel | None
    """None: this kernel has no VXLAN, so addresses move by switchover Wait."""
    kv: Kv
    """The settings, with the number of streams that suits the NIC."""
    kv_server: KvServer
    tasks: Tasks = field(default_factory=Tasks)
    linger: dict[tuple[str, ...], tuple[bytes, asyncio.Task[None]]] = field(default_factory=dict)
    """By addresses: entries that stay for late packets after a job, and what ends them."""
    notices: Board = field(default_factory=Board)
    metrics: Metrics = field(default_factory=Metrics)
    kv_bytes_per_s: float = 0.0
    """What the network took in the last KV copy from here; 0: none was made yet."""
    _epochs: dict[str, int] = field(default_factory=dict)

    @classmethod
    async def start(cls, settings: Settings) -> Node:
        _check_capabilities()
        boot_id = settings.boot_id or journal.kernel_boot_id()
        net = NetWorker(settings)
        nic_index = await net.run(net.setup_nic)
        hold = Hold.open(settings.bpffs)
        await net.run(hold.attach, None, settings.nic.name, "nic")
        injector = await net.run(lambda: Injector.create(net.host, settings.nic.mtu_bytes))
        mac = await net.run(net.mac_of, nic_index)
        nic = Nic(settings.nic.name, mac, await _gateway(net, nic_index, settings), settings)
        tunnel = await _make_tunnel(net, hold, settings)
        hold.configure(
            nic_ifindex=nic_index,
            tunnel_ifindex=tunnel.index if tunnel else 0,
            probe_port=settings.probe_port,
            nic_mac=nic.mac,
            gateway_mac_v4=nic.gateway.mac_v4 or bytes(6),
            gateway_mac_v6=nic.gateway.mac_v6 or bytes(6),
        )
        responders = [
            Responder(a, settings.probe_port, await net.run(net.interface_of, a)) for a in settings.node_addresses
        ]
        kv = replace(settings.kv, streams=settings.kv.streams or _kv_streams(settings.nic.name))
        kv_server = _listen_for_kv(settings)
        node = cls(settings, boot_id, net, hold, nic, injector, RouteSocket(), responders, tunnel, kv, kv_server)
        node._load_epochs()
        nic.start()
        if tunnel is not None:
            tunnel.start()
        for responder in responders:
            responder.start()
        if settings.imds.host:
            node.tasks.start("imds", watch(settings.imds, node.notices))
        return node

    async def stop(self) -> None:
        """Leave holds standing: they are pinned in the kernel and outlive this process."""
        await self.tasks.stop()
        await self.kv_server.close()
        self.nic.close()
        if self.tunnel is not None:
            self.tunnel.close()
        for responder in self.responders:
            responder.close()
        self.injector.close()
        self.routes.close()
        self.net.close()

    @property
    def journal_folder(self) -> Path:
        return journal.boot_folder(self.settings.state_dir, self.boot_id)

    async def attach_pod(self, uid: str) -> Attached:
        """Find a pod and put hold and gate on its eth0 (idempotent)."""
        pod = find_pod(self.settings.cgroup_root, uid)
        try:
            link = await self.net.run(self.net.pod_link, pod.netns_fd)
            await self.net.run(self.hold.attach, f"/proc/self/fd/{pod.netns_fd}", "eth0", "pod")
        except BaseException:
            pod.close()
            raise
        return Attached(pod, link)

    async def plumb(self, at: Attached, address: str, route: bool) -> bool:
        """Bring a floating IP to a pod; without `route` no packet of this host goes there yet."""
        await self.net.run(self.net.check_free, address, at.link.index)
        added = await self.net.run(self.net.add_pod_address, at.pod.netns_fd, address)
        await self.net.run(self.net.add_rules, address)
        if route:
            self.routes.add(address, at.link.index)
        return added

    async def settle_handshakes(self, at: Attached, addresses: list[str]) -> int:
        """Wait until no connection to addresses that let no SYN in any more is half made: its client may take it for
        made already, and a node to which it did not move would reset it. Returns how many still are."""
        timeouts = self.settings.timeouts
        end = time.monotonic() + timeouts.handshake_s
        while True:
            await asyncio.sleep(timeouts.accept_settle_ms / 1000)
            left = await self.net.run(self.net.handshakes, at.pod.netns_fd, addresses)
            if not left or time.monotonic() > end:
                return left

    async def unplumb(self, at: Attached, address: str) -> None:
        self.unroute(at, address)
        await self.net.run(self.net.del_rules, address)
        await self.net.run(self.net.del_pod_address, at.pod.netns_fd, address)

    def unroute(self, at: Attached, address: str) -> None:
        """The host's route to the address, whether it leads to the pod or to our device."""
        self.routes.delete(address, at.link.index)
        if self.tunnel is not None:
            self.routes.delete(address, self.tunnel.routed_index)

    def forget_conntrack(self, keys: bytes) -> None:
        if keys:
            conntrack.delete(keys)

    def set_state(self, keys: bytes, state: int) -> None:
        """Put all flows in `keys` into a state that needs no values of its own."""
        count = len(keys) // conntrack.KEY.size
        self.hold.set_flows(keys, CTL.pack(state, 0, 0, 0, 0, 0, 0, 0) * count, count)

    # -- entries of flows that have left, of addresses that have come ---------------------------------

    def linger_moved(self, keys: bytes, addresses: list[str]) -> None:
        """Drop entries of flows and addresses once late packets can no longer come."""
        name = tuple(addresses)
        self.linger[name] = keys, self.tasks.start("linger", self._linger(name))

    async def _linger(self, name: tuple[str, ...]) -> None:
        await asyncio.sleep(self.settings.timeouts.moved_linger_s)
        self._drop_moved(name)

    def _drop_moved(self, name: tuple[str, ...]) -> None:
        keys, _ = self.linger.pop(name)
        self.hold.delete_flows(keys, len(keys) // conntrack.KEY.size)
        for address in name:
            self.hold.del_addr(address)
            self.hold.end_births(address)

    def address_comes_back(self, addresses: list[str]) -> None:
        """A job takes up these addresses within a linger time: old entries must not meet the new flows."""
        for name, (_, task) in list(self.linger.items()):
            if set(name) & set(addresses):
                task.cancel()
                self._drop_moved(name)
        for address in addresses:
            self.hold.del_addr(address)

    def flows_of(self, addresses: list[str]) -> bytes:
        """Keys of all entries of these addresses. Walks through the map: not while clients wait."""
        wanted = {_mapped(a) for a in addresses}
        return b"".join(k for k in self.hold.flow_keys() if k[:16] in wanted)

    # -- epochs ----------------------------------------------------------------------------------------

    def check_epoch(self, what: str, epoch: int) -> None:
        """Refuse a command that is older than the newest one seen for this pod, address or job."""
        self._check_epoch(what, epoch, 0)

    def check_gone_epoch(self, job_id: str, epoch: int, begun: int = 0) -> None:
        """Refuse the word that a node is gone from whoever is older than who began the job (`begun`, at the source) or
        who said so last. It does not make the job's own epoch any newer: whoever was called gone and lives all the same
        must be heard, and told how things stand."""
        begun = max(begun, self._epochs.get(f"job:{job_id}", 0))
        self._check_epoch(f"gone:{job_id}", epoch, begun)

    def _check_epoch(self, what: str, epoch: int, least: int) -> None:
        seen = max(least, self._epochs.get(what, 0))
        if epoch < seen:
            raise Final(
                "stale_epoch", f"command with epoch {epoch} for {what} is older than {seen}: another operator rules"
            )
        if epoch > self._epochs.get(what, 0):
            self._epochs[what] = epoch
            self._save_epochs()

    def forget_epoch(self, what: str) -> None:
        """It has ended. The file follows with the next change: after a crash one epoch too many harms nobody."""
        self._epochs.pop(what, None)

    @property
    def _epoch_file(self) -> Path:
        return self.settings.state_dir / "epochs.json"

    def _load_epochs(self) -> None:
        if self._epoch_file.exists():
            self._epochs = json.loads(self._epoch_file.read_text(encoding="utf-8"))

    def _save_epochs(self) -> None:
        self.settings.state_dir.mkdir(parents=True, exist_ok=True)
        tmp = self._epoch_file.with_suffix(".tmp")
        tmp.write_text(json.dumps(self._epochs), encoding="utf-8")
        os.replace(tmp, self._epoch_file)


def _check_capabilities() -> None:
    """Said at the start, and not when the first migration fails in its middle."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    have = int(status.partition("CapEff:")[2].split()[0], 16)
    missing = [name for name, bit in CAPABILITIES.items() if not have >> bit & 1]
    if missing:
        raise Final(
            "no_capability", f"the agent lacks {', '.join(missing)}: add them to its container's securityContext"
        )


def _listen_for_kv(settings: Settings) -> KvServer:
    try:
        return KvServer(host_of(settings.listen), settings.kv, settings.tls if settings.kv.tls else None)
    except OSError as e:
        text = f"cannot listen on TCP port {settings.kv.port} for KV: {e}; see --kv-port"
        raise Final("listen", text) from e


def _kv_streams(nic: str) -> int:
    """As many as fill the NIC; a virtual one knows no speed."""
    try:
        mbits = int(Path(f"/sys/class/net/{nic}/speed").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return KV_STREAMS
    return max(KV_STREAMS, -(-mbits // KV_STREAM_MBITS))


async def _make_tunnel(net: NetWorker, hold: Hold, settings: Settings) -> Tunnel | None:
    if not settings.tunnel:
        return None
    try:
        return await net.run(
            lambda: Tunnel.create(net.host, settings, lambda name, role: hold.attach(None, name, role))
        )
    except (NetlinkError, OSError) as e:
        log.warning("no tunnel on this node (%s): addresses move by switchover Wait", e)
        return None


async def _gateway(net: NetWorker, index: int, settings: Settings) -> Gateway:
    """MACs of the NIC's gateways, resolved by the kernel once a datagram was sent towards them."""
    macs = {}
    for family, address in (("v4", settings.nic.gateway_v4), ("v6", settings.nic.gateway_v6)):
        macs[family] = await resolve(net, index, settings.nic.name, address) if address else None
    return Gateway(macs["v4"], macs["v6"])


def _mapped(address: str) -> bytes:
    packed = ipaddress.ip_address(address).packed
    return packed if len(packed) == 16 else conntrack.V4_MAPPED + packed
