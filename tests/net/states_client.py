"""Connections of one client in every state of a request; run in a namespace: `states_client.py HOST PORT`.

Brings each connection into its state, prints `ready`, waits for a line on stdin (meanwhile the pod changes nodes), goes
on with all of them, and prints what each got as JSON: {state: [text of each answer]}.
"""

from __future__ import annotations

import json
import socket
import sys
import time

HOST, PORT = sys.argv[1], int(sys.argv[2])
TOKENS = 500
BODY = {"model": "midstream-tiny", "prompt": "The license grants you", "max_tokens": TOKENS, "temperature": 0,
        "stream": True, "ignore_eos": True}  # fmt: skip


def request(pad_bytes: int = 0) -> bytes:
    data = json.dumps(BODY).encode() + b" " * pad_bytes
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


class Line:
    """One connection; `then` is what it still has to send."""

    def __init__(self, first: bytes, then: bytes, answers: int, receive_buffer: int = 0) -> None:
        self.sock = socket.socket(socket.AF_INET)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(60)
        self.sock.connect((HOST, PORT))
        self.sock.sendall(first)
        self.then, self.wanted, self.buffer = then, answers, b""

    def answer(self) -> str:
        """The text of the next whole answer."""
        while b"\r\n0\r\n\r\n" not in self.buffer:
            data = self.sock.recv(1 << 16)
            if not data:
                raise AssertionError(f"the connection ended in an answer: {self.buffer[-200:]!r}")
            self.buffer += data
        whole, _, self.buffer = self.buffer.partition(b"\r\n0\r\n\r\n")
        head, _, chunks = whole.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        body = dechunk(chunks + b"\r\n")
        events = body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-2:]
        return "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events[:-2])


def dechunk(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        assert data[length : length + 2] == b"\r\n"
        body, data = body + data[:length], data[length + 2 :]
    return body


def main() -> None:
    whole, large = request(), request(1 << 20)
    between = Line(whole, whole, 1)
    first = between.answer()
    lines: dict[str, Line] = {
        "between two requests": between,
        "nothing sent yet": Line(b"", whole, 1),
        "in the request line": Line(whole[:9], whole[9:], 1),
        "in the head": Line(whole[:40], whole[40:], 1),
        "in a large body": Line(large[: len(large) // 2], large[len(large) // 2 :], 1),
        "in the answer": Line(whole, b"", 1),
        "next request in the buffer": Line(whole + whole, b"", 2),
        "half of the next request in the buffer": Line(whole + whole[:50], whole[50:], 2),
        "in a chunk, with a slow reader": Line(whole, b"", 1, receive_buffer=2048),
    }
    time.sleep(0.5)
    print("ready", flush=True)
    sys.stdin.readline()
    got: dict[str, list[str]] = {"unmoved": [first]}
    for line in lines.values():
        line.sock.sendall(line.then)
    for state, line in lines.items():
        got[state] = [line.answer() for _ in range(line.wanted)]
    print(json.dumps(got), flush=True)


main()
