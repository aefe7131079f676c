"""The testbed's EC2: an HTTP server that real boto3 talks to, over a table of our own.

EC2 itself cannot be had here, and moto ignores `AllowReassignment`. So this fake is as strict as the real thing in what
the product relies on: names and shapes by botocore's own model, AWS's error codes, SigV4 asked for (its presence, not
its arithmetic: there are no real keys), addresses only inside their subnet, limits of each instance type, token buckets
for each action, DryRun, an effect that comes later than the yes, and on demand a yes that never happens.
"""

from __future__ import annotations

import http.server
import re
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from midstream_testbed import ec2_wire
from midstream_testbed.ec2_account import Account
from midstream_testbed.ec2_actions import ACTIONS
from midstream_testbed.ec2_network import FabricNetwork, MemoryNetwork
from midstream_testbed.ec2_wire import Ec2Error

SIGNATURE = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/[a-z0-9-]+/ec2/aws4_request, "
    r"SignedHeaders=[^ ]*host[^ ]*, Signature=[0-9a-f]{64}"
)


@dataclass
class Bucket:
    """A token bucket of one action. EC2's own figures for most actions: burst 50-100, 5-20 a second."""

    burst: float
    per_s: float
    level: float = field(init=False)
    at_s: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        self.level = self.burst

    def take(self, now_s: float) -> bool:
        if self.at_s > float("-inf"):
            self.level = min(self.burst, self.level + (now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        if self.level < 1:
            return False
        self.level -= 1
        return True


@dataclass(frozen=True)
class Call:
    """One request as it was answered: `code` is empty for a yes."""

    action: str
    parameters: Mapping[str, Any]
    code: str
    at_s: float


@dataclass
class Ec2:
    """The API over an account. Hooks are attributes: change them while it runs."""

    account: Account
    mutating: tuple[float, float] = (100.0, 5.0)  # burst, a second; assumed, see docs/eks.md
    describing: tuple[float, float] = (100.0, 20.0)
    denied: set[str] = field(default_factory=set)  # actions that the caller's policy does not allow
    down: bool = False  # answers Unavailable to everything
    keep: int = 5_000  # calls remembered
    calls: list[Call] = field(default_factory=list)
    _faults: list[tuple[str, Ec2Error]] = field(default_factory=list)
    _buckets: dict[str, Bucket] = field(default_factory=dict)

    def fail(self, action: str, code: str, message: str = "injected", *, status: int = 400, times: int = 1) -> None:
        """The next `times` calls of an action are answered with this error."""
        self._faults += [(action, Ec2Error(code, message, status))] * times

    def called(self, action: str) -> list[Call]:
        return [call for call in self.calls if call.action == action]

    def handle(self, headers: Mapping[str, str], body: str) -> tuple[int, bytes]:
        """One request: HTTP status and body."""
        request_id = str(uuid.uuid4())
        form = dict(urllib.parse.parse_qsl(body, keep_blank_values=True))
        action, parsed, code = form.get("Action", ""), {}, ""
        with self.account.lock:
            try:
                _check_signature(headers)
                model = ec2_wire.operation(action)
                parsed = ec2_wire.parse(model, form)
                self._admit(action, parsed)
                result = ACTIONS[action](self.account, parsed)
                return 200, ec2_wire.answer(model, result, request_id)
            except Ec2Error as problem:
                code = problem.code
                return problem.status, ec2_wire.error(problem, request_id)
            except Exception as problem:
                code = "InternalError"
                return 500, ec2_wire.error(Ec2Error(code, f"the testbed is at fault: {problem!r}", 500), request_id)
            finally:
                self.calls.append(Call(action, parsed, code, self.account.clock()))
                del self.calls[: -self.keep]

    def _admit(self, action: str, parsed: Mapping[str, Any]) -> None:
        """What EC2 looks at before the request itself, in its order."""
        if self.down:
            raise Ec2Error("Unavailable", "The service is unavailable. Please try again shortly.", 503)
        for number, (name, problem) in enumerate(self._faults):
            if name == action:
                del self._faults[number]
                raise problem
        if action not in ACTIONS:
            raise Ec2Error("InvalidAction", f"The testbed does not know the action {action}")
        if not self._bucket(action).take(self.account.clock()):
            raise Ec2Error("RequestLimitExceeded", "Request limit exceeded.", 503)
        if action in self.denied:
            raise Ec2Error("UnauthorizedOperation", "You are not authorized to perform this operation.", 403)
        if parsed.get("DryRun"):
            raise Ec2Error("DryRunOperation", "Request would have succeeded, but DryRun flag is set.", 412)

    def _bucket(self, action: str) -> Bucket:
        reads = action.startswith(("Describe", "Get"))
        return self._buckets.setdefault(action, Bucket(*(self.describing if reads else self.mutating)))


def _check_signature(headers: Mapping[str, str]) -> None:
    authorization = headers.get("Authorization", "")
    if not authorization:
        raise Ec2Error("MissingParameter", "The request must contain the parameter AWSAccessKeyId")
    if not SIGNATURE.fullmatch(authorization) or not headers.get("X-Amz-Date"):
        raise Ec2Error("AuthFailure", "AWS was not able to validate the provided access credentials", 401)


class Ec2Server:
    """Ec2 on a listening socket, one thread a connection; a context manager.

    `sock` lets the caller choose the network namespace: `vpc.router.listen(...)`, for instance."""

    def __init__(self, ec2: Ec2, sock: socket.socket | None = None) -> None:
        self.ec2 = ec2
        handler = type("Handler", (_Handler,), {"ec2": ec2})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
        self._server.daemon_threads = True
        if sock is None:
            self._server.server_bind()
            self._server.server_activate()
        else:
            self._server.socket.close()
            self._server.socket = sock
            self._server.server_address = sock.getsockname()
        host, port = self._server.socket.getsockname()[:2]
        self.url = f"http://{host}:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="ec2", daemon=True)

    def __enter__(self) -> Ec2Server:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    ec2: Ec2
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        status, answer = self.ec2.handle(self.headers, body)  # type: ignore[arg-type]
        self.send_response(status)
        self.send_header("Content-Type", "text/xml;charset=UTF-8")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in `Ec2.calls`."""


def in_memory(*, move_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic, **hooks: Any) -> Ec2:
    """An account whose network is a table, for tests without namespaces."""
    return Ec2(Account(MemoryNetwork(move_seconds, clock), clock), **hooks)


__all__ = ["Account", "Bucket", "Call", "Ec2", "Ec2Error", "Ec2Server", "FabricNetwork", "MemoryNetwork", "in_memory"]
