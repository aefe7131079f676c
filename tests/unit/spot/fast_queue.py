"""SQS as far as one consumer goes, for tests with thousands of messages: moto's takes time with the square of them.

The same JSON protocol over HTTP that real boto3 speaks; visibility timeouts, long polls and receipt handles as SQS has
them; an action or parameter that it does not know is refused.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

RECEIVE = {"QueueUrl", "MaxNumberOfMessages", "WaitTimeSeconds", "VisibilityTimeout", "MessageSystemAttributeNames"}


class Refused(Exception):
    pass


@dataclass
class FastQueue:
    """A context manager; `url` is endpoint and queue."""

    visible: deque[tuple[str, str]] = field(default_factory=deque)  # id, body
    taken: dict[str, tuple[float, str, str]] = field(default_factory=dict)  # receipt -> (visible again, id, body)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> FastQueue:
        handler = type("Handler", (_Handler,), {"queue": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/queue"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def send(self, *bodies: dict[str, Any]) -> None:
        with self.changed:
            self.visible.extend((str(uuid.uuid4()), json.dumps(body)) for body in bodies)
            self.changed.notify_all()

    def left(self) -> int:
        return len(self.visible) + len(self.taken)

    def answer(self, action: str, given: dict[str, Any]) -> dict[str, Any]:
        with self.changed:
            if action == "ReceiveMessage" and set(given) <= RECEIVE:
                return self._receive(given)
            if action == "DeleteMessageBatch" and set(given) == {"QueueUrl", "Entries"} and len(given["Entries"]) <= 10:
                return self._delete(given["Entries"])
        raise Refused(f"{action} {sorted(given)}")

    def _receive(self, given: dict[str, Any]) -> dict[str, Any]:
        end = time.monotonic() + given["WaitTimeSeconds"]
        while not self._return_late() and (left := end - time.monotonic()) > 0:
            self.changed.wait(min(left, 0.1))
        found: list[dict[str, Any]] = []
        while self.visible and len(found) < given["MaxNumberOfMessages"]:
            id, body = self.visible.popleft()
            receipt = str(uuid.uuid4())
            self.taken[receipt] = time.monotonic() + given["VisibilityTimeout"], id, body
            md5 = hashlib.md5(body.encode(), usedforsecurity=False).hexdigest()
            attributes = {"SentTimestamp": str(int(time.time() * 1000))}
            found.append(
                {"MessageId": id, "ReceiptHandle": receipt, "Body": body, "MD5OfBody": md5, "Attributes": attributes}
            )
        return {"Messages": found} if found else {}

    def _return_late(self) -> bool:
        """Whether anything is visible, after what nobody deleted in time has come back."""
        now = time.monotonic()
        for receipt in [receipt for receipt, (until, *_) in self.taken.items() if until <= now]:
            _, id, body = self.taken.pop(receipt)
            self.visible.append((id, body))
        return bool(self.visible)

    def _delete(self, entries: list[dict[str, str]]) -> dict[str, Any]:
        good = [entry for entry in entries if self.taken.pop(entry["ReceiptHandle"], None)]
        bad = [entry for entry in entries if entry not in good]
        failed = [{"Id": e["Id"], "SenderFault": True, "Code": "ReceiptHandleIsInvalid"} for e in bad]
        return {"Successful": [{"Id": entry["Id"]} for entry in good], **({"Failed": failed} if failed else {})}


class _Handler(http.server.BaseHTTPRequestHandler):
    queue: FastQueue
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        action = self.headers.get("X-Amz-Target", "").removeprefix("AmazonSQS.")
        try:
            status, found = 200, self.queue.answer(action, given)
        except Refused as e:
            status, found = 400, {"__type": "com.amazonaws.sqs#InvalidParameterValue", "message": str(e)}
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads ten thousand lines."""
