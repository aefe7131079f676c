"""What is behind the testbed's EC2: whose interface packets for an address reach.

`FabricNetwork` is the testbed's router: moves take its `move_seconds`, hosts get real wires. `MemoryNetwork` has the
same manners without any packet, for tests of the provider alone and for a thousand nodes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from midstream_testbed.machine import Eni, Host
from midstream_testbed.vpc import Vpc


class Network(Protocol):
    """Interfaces are named by their id (eni-...)."""

    def attach(self, interface: str, instance: str, device_index: int) -> str:
        """Plug an interface into a running instance; its MAC."""
        ...

    def detach(self, interface: str) -> None: ...

    def place(self, address: str, interface: str) -> None:
        """Ask for an address to be delivered there: a new one at once, one that is elsewhere after the cloud's time."""
        ...

    def release(self, address: str) -> None: ...

    def owner(self, address: str) -> str | None:
        """Where packets go now."""
        ...


class MemoryNetwork:
    def __init__(self, move_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.move_seconds = move_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._owners: dict[str, str] = {}
        self._pending: dict[str, tuple[float, str]] = {}
        self._macs = 0

    def attach(self, interface: str, instance: str, device_index: int) -> str:
        with self._lock:
            self._macs += 1
            return f"02:77:ff:{self._macs >> 16 & 255:02x}:{self._macs >> 8 & 255:02x}:{self._macs & 255:02x}"

    def detach(self, interface: str) -> None:
        """The wire is gone; the addresses stay the interface's."""

    def place(self, address: str, interface: str) -> None:
        with self._lock:
            self._settle(address)
            if address not in self._owners:
                self._owners[address] = interface
            elif self._pending.get(address, (0.0, ""))[1] != interface:
                self._pending[address] = (self._clock() + self.move_seconds, interface)
            self._settle(address)

    def release(self, address: str) -> None:
        with self._lock:
            self._owners.pop(address, None)
            self._pending.pop(address, None)

    def owner(self, address: str) -> str | None:
        with self._lock:
            self._settle(address)
            return self._owners.get(address)

    def _settle(self, address: str) -> None:
        due_s, interface = self._pending.get(address, (float("inf"), ""))
        if self._clock() >= due_s:
            del self._pending[address]
            self._owners[address] = interface


class FabricNetwork:
    """Instances are the testbed's hosts: `hosts` says which id is which."""

    def __init__(self, vpc: Vpc) -> None:
        self._vpc = vpc
        self.hosts: dict[str, Host] = {}  # by instance id
        self._enis: dict[str, Eni] = {}  # by interface id
        self._placed: set[str] = set()

    def know(self, interface: str, eni: Eni) -> None:
        """An interface that the host was made with."""
        self._enis[interface] = eni

    def attach(self, interface: str, instance: str, device_index: int) -> str:
        host = self.hosts[instance]
        if device_index < len(host.enis):
            eni = host.enis[device_index]
        else:
            eni = host.add_eni()
            if eni.device_index != device_index:
                raise ValueError(f"{host.name} takes device index {eni.device_index} next, not {device_index}")
        self._enis[interface] = eni
        return eni.mac

    def detach(self, interface: str) -> None:
        """The testbed takes the wire away when it deletes the host; the addresses stay the interface's."""
        self._enis.pop(interface, None)

    def place(self, address: str, interface: str) -> None:
        eni = self._enis.get(interface)
        if eni is None:
            return  # an interface that is nowhere attached: EC2 says yes, no packet arrives
        if address in self._placed:
            self._vpc.fabric.call("assign", ip=address, ifname=eni.router_ifname)
        else:
            self._vpc.fabric.call("allocate", ip=address, ifname=eni.router_ifname)
            self._placed.add(address)

    def release(self, address: str) -> None:
        if address in self._placed:
            self._vpc.fabric.call("release", ip=address)
            self._placed.discard(address)

    def owner(self, address: str) -> str | None:
        if address not in self._placed:
            return None
        found = self._vpc.fabric.call("owner", ip=address)
        for interface, eni in self._enis.items():
            if found and eni.name == found["eni"] and self._host_of(eni) == found["host"]:
                return interface
        return None

    def _host_of(self, eni: Eni) -> str | None:
        return next((host.name for host in self._vpc.hosts.values() if eni in host.enis), None)
