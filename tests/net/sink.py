"""Takes one POST on 127.0.0.1, prints its body, ends; run in a namespace: `sink.py PORT`."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Sink(BaseHTTPRequestHandler):
    body = b""

    def do_POST(self) -> None:
        Sink.body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(204)
        self.send_header("access-control-allow-origin", "*")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


with HTTPServer(("127.0.0.1", int(sys.argv[1])), Sink) as server:
    server.timeout = 90
    print("ready", flush=True)
    server.handle_request()
print(Sink.body.decode())
