"""Instance metadata (IMDSv2) of one host of the testbed.

Beside amazon-ec2-metadata-mock, for what that cannot do: notices that come later and are withdrawn, errors, silence,
tokens that expire, both shapes of scheduled events, and `local-ipv4s` that are stale. As strict as the real one where a
client could go wrong: no token 401, a token by PUT with a TTL and without X-Forwarded-For only.

It listens on 169.254.169.254 inside a host's namespace (`on_host`) and nowhere else; unit tests use loopback.
"""

from __future__ import annotations

import http.server
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from midstream_testbed.machine import Host

ADDRESS = "169.254.169.254"
TOKEN_PATH = "/latest/api/token"
PREFIX = "/latest/meta-data/"


@dataclass
class Metadata:
    """What one instance is told. Change it while the server runs."""

    instance_id: str
    paths: dict[str, str] = field(default_factory=dict)
    addresses: Callable[[], dict[str, list[str]]] | None = None  # MAC -> local-ipv4s and ipv6s
    status: int = 0  # answer everything with this error; 0: answer
    silent: bool = False  # take the connection and say nothing
    asked: list[str] = field(default_factory=list)
    _tokens: dict[str, float] = field(default_factory=dict)

    # -- notices

    def interrupt(self, in_s: float = 120.0, action: str = "terminate", end: datetime | None = None) -> datetime:
        """A spot interruption notice now; the instance's end, `in_s` from now or as given."""
        end = end or datetime.now(UTC) + timedelta(seconds=in_s)
        self.paths["spot/instance-action"] = json.dumps({"action": action, "time": _iso(end)})
        return end

    def rebalance(self) -> None:
        self.paths["events/recommendations/rebalance"] = json.dumps({"noticeTime": _iso(datetime.now(UTC))})

    def maintain(self, in_s: float, code: str = "system-reboot", *, array: bool = True, state: str = "active") -> None:
        end = datetime.now(UTC) + timedelta(seconds=in_s)
        event = {
            "NotBefore": _worded(end), "NotAfter": _worded(end + timedelta(hours=1)), "Code": code,
            "Description": "scheduled reboot", "EventId": "instance-event-0d59937288b749b32", "State": state,
        }  # fmt: skip
        self.paths["events/maintenance/scheduled"] = json.dumps([event] if array else event)

    def end_lifecycle(self) -> None:
        self.paths["autoscaling/target-lifecycle-state"] = "Terminated"

    def withdraw(self, path: str) -> None:
        self.paths.pop(path, None)

    def expire_tokens(self) -> None:
        self._tokens.clear()

    # -- requests

    def new_token(self, ttl: str) -> tuple[int, str]:
        if not ttl.isdigit() or not 1 <= int(ttl) <= 21_600:
            return 400, "Bad Request"
        token = secrets.token_urlsafe(40)
        self._tokens[token] = time.monotonic() + int(ttl)
        return 200, token

    def read(self, path: str, token: str) -> tuple[int, str]:
        if self._tokens.get(token, 0.0) < time.monotonic():
            return 401, "Unauthorized"
        known = {"instance-id": self.instance_id, "placement/availability-zone": "eu-west-1a", **self.paths}
        for mac, ips in (self.addresses() if self.addresses else {}).items():
            for kind, six in (("local-ipv4s", False), ("ipv6s", True)):
                if mine := [ip for ip in ips if (":" in ip) is six]:
                    known[f"network/interfaces/macs/{mac}/{kind}"] = "\n".join(mine)
        wanted = path.removeprefix(PREFIX)
        return (200, known[wanted]) if path.startswith(PREFIX) and wanted in known else (404, "Not Found")


def _iso(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _worded(at: datetime) -> str:
    return at.strftime("%d %b %Y %H:%M:%S GMT")


class ImdsServer:
    """Metadata on a listening socket; a context manager. `port` says where."""

    def __init__(self, metadata: Metadata, sock: socket.socket | None = None) -> None:
        self.metadata = metadata
        handler = type("Handler", (_Handler,), {"metadata": metadata})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.socket.close()
        self._server.socket = sock or socket.create_server(("127.0.0.1", 0))
        self._server.server_address = self._server.socket.getsockname()
        self.host, self.port = str(self._server.server_address[0]), int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="imds", daemon=True)

    @classmethod
    def on_host(cls, metadata: Metadata, host: Host) -> ImdsServer:
        """At 169.254.169.254 of the host's namespace, as a hostNetwork pod reaches it."""
        host.netlink(lambda ip: ip.addr("add", index=ip.link_lookup(ifname="lo")[0], address=ADDRESS, prefixlen=32))
        return cls(metadata, host.listen(ADDRESS, 80))

    def __enter__(self) -> ImdsServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    metadata: Metadata
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_PUT(self) -> None:
        foreign = self.path != TOKEN_PATH or "X-Forwarded-For" in self.headers
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        self._answer(lambda: (403, "Forbidden") if foreign else self.metadata.new_token(ttl))

    def do_GET(self) -> None:
        token = self.headers.get("X-aws-ec2-metadata-token", "")
        self._answer(lambda: self.metadata.read(self.path, token))

    def _answer(self, make: Callable[[], tuple[int, str]]) -> None:
        self.metadata.asked.append(f"{self.command} {self.path}")
        if self.metadata.silent:
            self.close_connection = True
            self.rfile.read(1)  # until the client gives up
            return
        status, text = (self.metadata.status, "") if self.metadata.status else make()
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in `Metadata.asked`."""
