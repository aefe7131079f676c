"""HTTP/1.1 as the gateway speaks it: requests out of bytes (h11 parses them), heads and chunks into bytes.

A request that is not complete yet is moved as the bytes that have come of it: `RequestReader.raw` is its whole
state, and a reader that is fed the same bytes elsewhere is where this one was.
"""

from __future__ import annotations

import http
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from typing import Any

import h11

MAX_HEAD_BYTES = 64 << 10
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
_CLOSE = ("connection", "close")


class HttpError(Exception):
    """The request is refused; the body says why in OpenAI's form."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    """Without the query."""
    headers: Mapping[str, str]
    """Names in lower case; a repeated one is joined by commas."""
    body: bytes
    keep_alive: bool
    chunked: bool
    """May the answer be chunked? HTTP/1.0 clients know no chunks: their answer ends with the connection."""


class RequestReader:
    """Bytes of one connection in, requests out. After an HttpError the connection must be closed."""

    __slots__ = ("_body", "_continued", "_head", "_max_body", "_parser", "_raw")

    def __init__(self, max_body_bytes: int, raw: bytes = b"", continued: bool = False) -> None:
        self._max_body = max_body_bytes
        self._raw = bytearray(raw)
        self._continued = continued
        self._parser: h11.Connection | None = None
        self._head: h11.Request | None = None
        self._body = bytearray()

    @property
    def raw(self) -> bytes:
        """What has come and is not part of a request that `take` returned."""
        return bytes(self._raw)

    @property
    def empty(self) -> bool:
        return not self._raw

    @property
    def waiting_bytes(self) -> int:
        return len(self._raw)

    @property
    def continued(self) -> bool:
        """The client of the incomplete request has been told to send its body."""
        return self._continued

    def feed(self, data: bytes) -> None:
        self._raw += data
        if self._parser is not None:
            self._parser.receive_data(data)

    def put_back(self, raw: bytes) -> None:
        """A request that was taken and not begun: it will be taken again, or at the target."""
        self._raw[:0] = raw
        self._parser, self._head = None, None
        self._body.clear()

    def take(self) -> tuple[Request, bytes] | None:
        """The next whole request and its bytes, or None. HttpError when it can never become one."""
        if self._parser is None:
            if not self._raw:
                return None
            self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
            self._parser.receive_data(bytes(self._raw))
        try:
            return self._take(self._parser)
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            raise HttpError(status, f"the request is no HTTP/1.1: {error}", code="bad_http") from error

    def must_continue(self) -> bool:
        """Once for each request: the client waits for `100 Continue` before it sends the body."""
        if self._parser is None or self._continued or not self._parser.they_are_waiting_for_100_continue:
            return False
        self._continued = True
        return True

    def _take(self, parser: h11.Connection) -> tuple[Request, bytes] | None:
        while True:
            event = parser.next_event()
            match event:
                case h11.NEED_DATA:
                    return None
                case h11.Request():
                    self._head = event
                    self._check_length(event)
                case h11.Data():
                    self._body += event.data
                    if len(self._body) > self._max_body:
                        raise self._too_large()
                case h11.EndOfMessage():
                    return self._finish(parser)
                case _:
                    raise HttpError(400, "the request ended before it was complete", code="bad_http")

    def _check_length(self, head: h11.Request) -> None:
        length = next((value for name, value in head.headers if name == b"content-length"), b"0")
        if int(length) > self._max_body:
            raise self._too_large()

    def _too_large(self) -> HttpError:
        return HttpError(413, f"a request's body may have {self._max_body} bytes at most", code="body_too_large")

    def _finish(self, parser: h11.Connection) -> tuple[Request, bytes]:
        head, rest = self._head, parser.trailing_data[0]
        assert head is not None
        whole = bytes(self._raw[: len(self._raw) - len(rest)])
        request = _request(head, bytes(self._body))
        self._raw[:] = rest
        self._body.clear()
        self._parser, self._head, self._continued = None, None, False
        return request, whole


def _request(head: h11.Request, body: bytes) -> Request:
    headers: dict[str, str] = {}
    for raw_name, raw_value in head.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    modern = head.http_version >= b"1.1"
    asked = {token.strip().lower() for token in headers.get("connection", "").split(",")}
    keep = "close" not in asked if modern else "keep-alive" in asked
    path = head.target.decode("ascii", errors="replace").partition("?")[0]
    return Request(head.method.decode("ascii"), path, headers, body, keep and modern, modern)


# -- answers -----------------------------------------------------------------------------------------------


def answer(status: int, body: bytes, kind: str, *, keep_alive: bool, extra: Iterable[tuple[str, str]] = ()) -> bytes:
    """A whole response."""
    fields = [("content-type", kind), ("content-length", str(len(body))), *extra]
    return head(status, fields if keep_alive else [*fields, _CLOSE]) + body


def json_answer(status: int, data: Any, *, keep_alive: bool, extra: Iterable[tuple[str, str]] = ()) -> bytes:
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    return answer(status, body, "application/json", keep_alive=keep_alive, extra=extra)


def head(status: int, fields: Iterable[tuple[str, str]]) -> bytes:
    """Status line and header fields. Browsers may read answers from any page, as with vLLM's own front."""
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "server: midstream",
        f"date: {_date(int(time.time()))}",
    ]
    lines += [f"{name}: {value}" for name, value in fields]
    lines.append("access-control-allow-origin: *")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def stream_head(extra: Iterable[tuple[str, str]], *, keep_alive: bool, chunked: bool) -> bytes:
    fields = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"), *extra]
    if chunked:
        fields.append(("transfer-encoding", "chunked"))
    return head(200, fields if keep_alive else [*fields, _CLOSE])


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
