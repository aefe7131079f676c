"""Built-in engine: tokens a second, and what the engine adds to a migration's stall. Writes
build/bench/engine.json.

Run with the development Python; engines run in processes of their own under a Python that has torch
(MIDSTREAM_ENGINE_PYTHON). Each row has its reference from the same run where there is one: the model's bare
matrix products with the same number of rows, which no scheduling can beat."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "runtime"))

import rows  # noqa: E402
from midstream_runtime.contract.pool import PoolView  # noqa: E402
from midstream_runtime.engine.client import EngineClient, StartRequest  # noqa: E402
from midstream_runtime.engine.protocol import SamplingParams, TokenEvent  # noqa: E402

PYTHON = os.environ.get("MIDSTREAM_ENGINE_PYTHON", "/usr/bin/python3")
TOKENS = 200
MOVES = 12

# The same products as a step of the tiny model, and nothing else: seconds a step by number of rows.
_REFERENCE = """
import os, sys, time
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import torch
torch.set_num_threads(1)
shapes = [(128, 128), (128, 128), (128, 768), (384, 128)] * 4 + [(128, 1024)]
matrices = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
for rows in (1, 64, 256):
    inputs = {n: torch.randn(rows, n, dtype=torch.float64) for n, _ in shapes}
    times = []
    for _ in range(15):
        started = time.perf_counter()
        for matrix in matrices:
            torch.mm(inputs[matrix.shape[0]], matrix)
        times.append(time.perf_counter() - started)
    print(rows, sorted(times)[len(times) // 2])
"""


@contextmanager
def engines(count: int, *arguments: str) -> Iterator[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{index}.sock" for index in range(count)]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
        argv = [PYTHON, "-m", "midstream_runtime.engine.builtin", "--pool-slots", "12000", *arguments]
        processes = [subprocess.Popen([*argv, "--socket", path], env=env, stderr=subprocess.DEVNULL) for path in paths]
        try:
            for path in paths:
                await_socket(path)
            yield paths
        finally:
            for process in processes:
                process.terminate()
                process.wait(timeout=20)


def await_socket(path: str) -> None:
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < deadline, "the engine does not start"
        time.sleep(0.05)


async def connect(path: str) -> tuple[EngineClient, PoolView]:
    client = await EngineClient.connect(path)
    await client.info()
    fd = client.pool_fd()
    assert fd is not None
    return client, PoolView(memoryview(mmap.mmap(fd, 0)))


class Counter:
    """A sink that remembers when tokens came."""

    def __init__(self) -> None:
        self.tokens = 0
        self.finished = 0
        self.changed = asyncio.Event()
        self.first_at = 0.0

    def __call__(self, events: list[tuple[str, TokenEvent]]) -> None:
        if not self.tokens:
            self.first_at = time.perf_counter()
        self.tokens += len(events)
        self.finished += sum(event.finish_reason is not None for _, event in events)
        self.changed.set()

    async def until_tokens(self, count: int) -> None:
        while self.tokens < count:
            self.changed.clear()
            await self.changed.wait()

    async def until_finished(self, count: int) -> None:
        while self.finished < count:
            self.changed.clear()
            await self.changed.wait()


async def requests(client: EngineClient, count: int, tokens: int) -> list[StartRequest]:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    ids = await client.tokenize("It is a truth universally acknowledged, that")
    return [StartRequest(str(index), ids, params) for index in range(count)]


async def throughput(path: str, streams: int) -> float:
    """Tokens a second from the first token to the last one of all streams together."""
    client, _ = await connect(path)
    sink = Counter()
    await client.start(await requests(client, streams, TOKENS), sink)
    await sink.until_finished(streams)
    seconds = time.perf_counter() - sink.first_at
    await client.close()
    return sink.tokens / seconds


async def moves(paths: list[str], streams: int) -> dict[str, list[float]]:
    """Milliseconds of the engine's parts of a migration of all streams at once, there and back again."""
    ends = [await connect(path) for path in paths]
    figures: dict[str, list[float]] = {"pause": [], "load": [], "first_token": []}
    sink = Counter()
    await ends[0][0].start(await requests(ends[0][0], streams, 700), sink)
    await sink.until_tokens(60 * streams)
    for _ in range(MOVES):
        (source, source_pool), (target, target_pool) = ends
        await sink.until_tokens(sink.tokens + 5 * streams)
        started = time.perf_counter()
        states = await source.pause([str(index) for index in range(streams)])
        figures["pause"].append((time.perf_counter() - started) * 1000)
        slots = await target.reserve(sum(len(state.kv) for state in states.values()))
        at, items = 0, []
        for name, state in states.items():
            own = slots[at : at + len(state.kv)]
            at += len(own)
            for block, slot in zip(state.kv, own, strict=True):
                assert block.slot is not None
                target_pool.slot(slot)[:] = source_pool.slot(block.slot)
            items.append(StartRequest(name, state=state.with_slots(own), paused=True))
        sink = Counter()
        started = time.perf_counter()
        assert not await target.start(items, sink)
        figures["load"].append((time.perf_counter() - started) * 1000)
        started = time.perf_counter()
        await target.resume(list(states))
        await sink.until_tokens(1)
        figures["first_token"].append((sink.first_at - started) * 1000)
        await source.drop(list(states))
        ends.reverse()
    for client, _ in ends:
        await client.close()
    return figures


def reference() -> dict[int, float]:
    text = subprocess.run([PYTHON, "-c", _REFERENCE], capture_output=True, text=True, check=True).stdout
    return {int(rows): float(seconds) for rows, seconds in (line.split() for line in text.splitlines())}


def main() -> None:
    found = []
    bare = reference()
    with engines(1, "--pace-ms", "0") as (path,):
        for streams, goal in ((1, 250), (64, 2000), (256, 2500)):
            values = [asyncio.run(throughput(path, streams)) for _ in range(3)]
            found.append(
                rows.row(
                    f"engine_tokens_per_s_{streams}",
                    "tokens/s",
                    values,
                    goal,
                    "higher",
                    reference="bare matrix products",
                    reference_value=streams / bare[streams],
                )
            )
    with engines(2, "--pace-ms", "4") as paths:
        for streams, goals in ((1, (3.0, 3.0, 6.0)), (200, (60.0, 40.0, 120.0))):
            figures = asyncio.run(moves(paths, streams))
            for (name, values), limit in zip(figures.items(), goals, strict=True):
                found.append(rows.row(f"engine_{name}_ms_{streams}", "ms", values, limit, "lower"))
    rows.write("engine", found)


if __name__ == "__main__":
    main()
