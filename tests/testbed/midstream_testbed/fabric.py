"""The tests' handle on the fabric daemon (fabricd.py): who owns which address, and the hooks that spoil
moves.

Every call is one request over the daemon's control socket; other processes (the EC2 API server, a demo) reach
the same daemon by `Fabric(path)`.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class FabricError(RuntimeError):
    """The daemon refused a request; the message is its reason."""


@dataclass(frozen=True)
class Move:
    """One asked-for move. Times are CLOCK_MONOTONIC (`_mono_ns`) and CLOCK_REALTIME (`_ns`)."""

    ip: str
    source: str | None
    target: str
    outcome: str  # pending | moved | refused | lied | superseded
    asked_mono_ns: int
    asked_ns: int
    effective_mono_ns: int | None
    effective_ns: int | None
    repeats: int


class Fabric:
    def __init__(self, control: Path) -> None:
        self.control = control

    def call(self, op: str, *, patience_s: float = 10.0, **given: Any) -> Any:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(patience_s)
            sock.connect(str(self.control))
            sock.send(json.dumps({"op": op, **given}).encode())
            answer = json.loads(sock.recv(1 << 24))
        if not answer["ok"]:
            raise FabricError(answer["error"])
        return answer["result"]

    def owner(self, ip: str) -> str | None:
        """Name of the host that owns the address, None while nobody does."""
        found = self.call("owner", ip=ip)
        return found["host"] if found else None

    def owner_eni(self, ip: str) -> str | None:
        found = self.call("owner", ip=ip)
        return found["eni"] if found else None

    def wait_owner(self, ip: str, host: str, timeout_s: float = 10.0) -> bool:
        """Block until `host` owns the address; False when it does not within `timeout_s`."""
        return bool(self.call("wait", patience_s=timeout_s + 5, ip=ip, host=host, timeout_s=timeout_s))

    def reverse(self, ip: str) -> None:
        """Give the address back to its earlier owner at once."""
        self.call("reverse", ip=ip)

    def moves(self) -> list[Move]:
        return [Move(**entry) for entry in self.call("moves")]

    @property
    def ignored(self) -> int:
        """Announcements that were heard and meant nothing: unknown address, foreign MAC, deaf."""
        return int(self.call("get")["ignored"])

    @property
    def move_seconds(self) -> float:
        return float(self.call("get")["move_seconds"])

    @move_seconds.setter
    def move_seconds(self, value: float) -> None:
        self.call("set", move_seconds=value)

    @property
    def refuse(self) -> bool:
        """Requests are ignored: nothing ever moves."""
        return bool(self.call("get")["refuse"])

    @refuse.setter
    def refuse(self, value: bool) -> None:
        self.call("set", refuse=value)

    @property
    def lie(self) -> bool:
        """Requests are accepted and never become true."""
        return bool(self.call("get")["lie"])

    @lie.setter
    def lie(self, value: bool) -> None:
        self.call("set", lie=value)

    @property
    def deaf(self) -> bool:
        """Announcements mean nothing, as on EC2: addresses move by the API alone."""
        return bool(self.call("get")["deaf"])

    @deaf.setter
    def deaf(self, value: bool) -> None:
        self.call("set", deaf=value)
