"""What the gateway costs: time to first token and tokens a second of 256 streams behind it, against the engine alone in
the same run, interleaved. Writes build/bench/gateway.json.

All 256 requests come at once; a client's time to first token is from its request to its first event. The clients are
one process that reads sockets and counts events."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "runtime"))

import rows  # noqa: E402
from bench_engine import engines, requests  # noqa: E402
from midstream_runtime.engine.client import EngineClient  # noqa: E402
from midstream_runtime.engine.protocol import TokenEvent  # noqa: E402

STREAMS, TOKENS, ROUNDS = 256, 60, 5
PROMPT = "It is a truth universally acknowledged, that"


@dataclass
class Round:
    first_s: list[float] = field(default_factory=list)
    tokens_per_s: float = 0.0

    @property
    def median_first_ms(self) -> float:
        return sorted(self.first_s)[len(self.first_s) // 2] * 1000


async def engine_alone(path: str) -> Round:
    client = await EngineClient.connect(path)
    got, seen, finished = Round(), set[str](), asyncio.Event()
    counts = {"tokens": 0, "finished": 0}

    def sink(events: list[tuple[str, TokenEvent]]) -> None:
        now = time.perf_counter()
        for name, event in events:
            counts["tokens"] += 1
            if name not in seen:
                seen.add(name)
                got.first_s.append(now - started)
            counts["finished"] += event.finish_reason is not None
        if counts["finished"] == STREAMS:
            finished.set()

    wanted = await requests(client, STREAMS, TOKENS)
    started = time.perf_counter()
    await client.start(wanted, sink)
    await finished.wait()
    got.tokens_per_s = counts["tokens"] / (time.perf_counter() - started)
    await client.close()
    return got


class Reader(asyncio.Protocol):
    """One client: asks at once, counts events."""

    def __init__(self, request: bytes, got: Round, done: asyncio.Semaphore) -> None:
        self.request, self.got, self.done = request, got, done
        self.events, self.tail = 0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self) -> None:
        self.asked_at = time.perf_counter()
        assert isinstance(self.transport, asyncio.Transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        data = self.tail + data
        self.tail = data[-8:] if b"[DONE]" not in data else b""
        found = data.count(b'"text":')
        if found and not self.events:
            self.got.first_s.append(time.perf_counter() - self.asked_at)
        self.events += found
        if b"data: [DONE]" in data:
            self.transport.close()
            self.done.release()


async def behind_the_gateway(port: int) -> Round:
    body = {"model": "midstream-tiny", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True,
            "ignore_eos": True}  # fmt: skip
    data = json.dumps(body).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)
    got, done, loop = Round(), asyncio.Semaphore(0), asyncio.get_running_loop()
    readers = []
    for _ in range(STREAMS):
        _, reader = await loop.create_connection(lambda: Reader(request, got, done), "127.0.0.1", port)
        readers.append(reader)
    started = time.perf_counter()
    for reader in readers:
        reader.ask()
    async with asyncio.timeout(300):
        for _ in range(STREAMS):
            await done.acquire()
    got.tokens_per_s = STREAMS * TOKENS / (time.perf_counter() - started)
    return got


@contextmanager
def gateway(engine: str) -> Iterator[int]:
    """The port of a gateway before that engine."""
    port = 18080
    argv = [sys.executable, "-m", "midstream_runtime.serve", "--listen", f"127.0.0.1:{port}", "--engine", engine,
            "--handoff", f"{engine}.handoff"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert re.match("ready", process.stdout.readline()), "the gateway does not start"
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def main() -> None:
    alone: list[Round] = []
    behind: list[Round] = []
    with engines(1, "--pace-ms", "0") as (path,), gateway(path) as port:
        asyncio.run(behind_the_gateway(port))  # the first round warms caches of both
        for _ in range(ROUNDS):
            alone.append(asyncio.run(engine_alone(path)))
            behind.append(asyncio.run(behind_the_gateway(port)))
    rate = [r.tokens_per_s for r in behind]
    rate_alone = sorted(r.tokens_per_s for r in alone)[ROUNDS // 2]
    first = [r.median_first_ms for r in behind]
    first_alone = sorted(r.median_first_ms for r in alone)[ROUNDS // 2]
    rows.write(
        "gateway",
        [
            rows.row(f"gateway_tokens_per_s_{STREAMS}", "tokens/s", rate, round(0.9 * rate_alone), "higher",
                     reference="engine alone", reference_value=rate_alone),
            rows.row(f"gateway_first_token_ms_{STREAMS}", "ms", first, round(1.2 * first_alone), "lower",
                     reference="engine alone", reference_value=first_alone),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
