"""The testbed's hosts as EC2 instances: an account over the router's own table, and metadata inside each host.

    router's table <--- FabricNetwork <--- Account <--- Ec2Server <--- boto3 of the operator
    host's namespace: 169.254.169.254:80 <--- the agent's IMDS source, and nobody outside that namespace

EC2 itself cannot be had here; how strict this one is say ec2.py and imds.py. A notice is what EC2 gives: a promise that
the instance is there until a time, and then it is not. Who wants the host killed at that time calls `terminate`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

from midstream_testbed.ec2 import Ec2, Ec2Server
from midstream_testbed.ec2_account import Account
from midstream_testbed.ec2_network import FabricNetwork
from midstream_testbed.imds import ADDRESS, ImdsServer, Metadata
from midstream_testbed.machine import Host
from midstream_testbed.namespace import Namespace
from midstream_testbed.vpc import Vpc

REGION, ZONE = "eu-west-1", "eu-west-1a"
KIND = "g5.xlarge"
IMDS = ("--imds-host", ADDRESS)  # options of an agent that shall listen to it


@dataclass(frozen=True, slots=True)
class Interruption:
    """One spot notice. Times are seconds of the epoch; EC2 tells the end in whole seconds."""

    host: str
    said_at: float
    end_at: float
    action: str = "terminate"

    @property
    def deadline(self) -> datetime:
        return datetime.fromtimestamp(self.end_at, UTC)

    def left_s(self, at: float) -> float:
        return self.end_at - at


class Instances:
    """A context manager. `pool`: addresses that the subnet keeps for Midstream (a reservation of type explicit)."""

    def __init__(self, vpc: Vpc, pool: str) -> None:
        self.vpc = vpc
        vpc.fabric.deaf = True
        self.pool = ipaddress.ip_network(pool)
        self.network = FabricNetwork(vpc)
        self.ec2 = Ec2(Account(self.network))
        self.subnet = self.ec2.account.add_subnet(vpc.subnet4, ZONE, cidr6=vpc.subnet6)
        self.subnet.reservations["scr-1"] = (pool, "explicit", {})
        self.metadata: dict[str, Metadata] = {}  # by host
        self._servers: dict[str, contextlib.ExitStack] = {}
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Instances:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.close()

    def serve_api(self, place: Namespace) -> str:
        """The EC2 API on the loopback of that namespace: its address."""
        return self._ends.enter_context(Ec2Server(self.ec2, place.listen("127.0.0.1"))).url

    def add(self, host: Host) -> str:
        """Run the host as an instance, with metadata that it alone can ask; the instance's id."""
        instance = f"i-{host.number + 1:017x}"
        self.network.hosts[instance] = host
        self.ec2.account.add_instance(self.subnet, KIND, primary=host.ipv4, id=instance)
        metadata = self.metadata[host.name] = Metadata(instance, addresses=lambda: self._addresses(instance))
        server = self._servers[host.name] = contextlib.ExitStack()
        self._ends.callback(server.close)
        server.enter_context(ImdsServer.on_host(metadata, host))
        return instance

    def id_of(self, host: str) -> str:
        return self.metadata[host].instance_id

    def _addresses(self, instance: str) -> dict[str, list[str]]:
        account = self.ec2.account
        with account.lock:
            return {i.mac: account.imds_addresses(i.id) for i in account.of_instance(instance)}

    def announce(self, host: Host, in_s: float, action: str = "terminate") -> Interruption:
        """EC2 decides now that the instance ends. Nobody has been told yet: see `tell`, and notice_queue.py."""
        said_at = time.time()
        return Interruption(host.name, said_at, float(int(said_at + in_s)), action)

    def tell(self, notice: Interruption) -> None:
        """The notice appears in the host's metadata."""
        self.metadata[notice.host].interrupt(notice.left_s(time.time()), notice.action, end=notice.deadline)

    def host_of(self, address: str) -> str:
        """Where the account's table has the address."""
        account = self.ec2.account
        with account.lock:
            owned = account.addresses.get(address)
            attachment = account.interfaces[owned.interface].attachment if owned else None
        hosts = {metadata.instance_id: name for name, metadata in self.metadata.items()}
        return hosts[attachment.instance] if attachment else ""

    def last_move_s(self, address: str) -> float:
        """How long the network took for the address's last move, from EC2's yes to its effect; -1: none took effect."""
        done = [m for m in self.vpc.fabric.moves() if m.ip == address and m.effective_mono_ns is not None]
        return round(((done[-1].effective_mono_ns or 0) - done[-1].asked_mono_ns) / 1e9, 3) if done else -1.0

    def terminate(self, host: Host) -> float:
        """What EC2 does at the end: interfaces down, processes ended, the instance is `terminated`. When it was done,
        seconds of the epoch."""
        at = time.time()
        instance = self.id_of(host.name)
        host.delete()
        self._servers[host.name].close()
        self.ec2.account.end_instance(instance)
        return at
