"""Clients outside the VPC: curl streams answers from a floating IP, their host's capture says what became of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream_testbed.capture import Capture
from midstream_testbed.machine import Client
from midstream_testbed.namespace import Process
from midstream_testbed.verdict import Answer, Network

PORT = 8000
PROMPTS = ("The license grants you", "When the program starts", "A file is a", "In order to protect")
PATIENCE_S = 240


@dataclass(slots=True)
class Stream:
    """One curl and the answer that it should get."""

    process: Process
    out: Path
    reference: Answer

    def answer(self) -> Answer:
        return Answer.parse(self.out.read_text(encoding="utf-8", errors="replace") if self.out.exists() else "")


@dataclass(slots=True)
class Traffic:
    """Greedy answers to a few prompts, first without a migration for comparison, then again and again."""

    client: Client
    address: str
    folder: Path
    tokens: int
    references: list[Answer] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    _count: int = 0

    def learn(self) -> None:
        """The answers when nothing happens."""
        running = [self._curl(prompt, Answer()) for prompt in PROMPTS]
        for stream in running:
            assert stream.process.wait(PATIENCE_S) == 0, stream.process.output()
        self.references = [stream.answer() for stream in running]
        assert all(a.done and len(a.pieces) > self.tokens // 2 for a in self.references)  # some tokens have no text

    def start(self, count: int = len(PROMPTS)) -> list[Stream]:
        which = [(self._count + i) % len(PROMPTS) for i in range(count)]
        started = [self._curl(PROMPTS[i], self.references[i]) for i in which]
        self.streams += started
        return started

    def _curl(self, prompt: str, reference: Answer) -> Stream:
        self._count += 1
        body = {"model": "midstream-tiny", "prompt": prompt, "max_tokens": self.tokens, "temperature": 0,
                "stream": True, "ignore_eos": True}  # fmt: skip
        out = self.folder / f"stream-{self._count}.sse"
        argv = ["curl", "-sS", "-N", "--max-time", str(PATIENCE_S), "-o", str(out),
                "-H", "content-type: application/json", "--data-binary", json.dumps(body),
                f"http://{self.address}:{PORT}/v1/completions"]  # fmt: skip
        return Stream(self.client.popen(argv, name=f"curl-{self._count}"), out, reference)

    def wait_under_way(self, streams: list[Stream], share: float = 0.1) -> None:
        """All of them have got their first tokens, and none is near its end."""
        end = time.monotonic() + PATIENCE_S
        while min(len(s.answer().pieces) for s in streams) < share * self.tokens:
            broken = [s.process.output() for s in streams if s.process.poll() is not None]
            assert not broken and time.monotonic() < end, f"the streams did not get going: {broken}"
            time.sleep(0.05)

    def keep_going(self, until: Callable[[], bool]) -> None:
        """One more client every second and a half, as long as something goes on."""
        end = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < end, "it goes on for ever"
            self.start(1)
            time.sleep(1.5)

    def finish(self) -> None:
        for stream in self.streams:
            stream.process.wait(PATIENCE_S)


def assert_nothing_happened(traffic: Traffic, capture: Capture) -> None:
    """As far as the clients can tell: the same tokens, no reset, no early end, and the capture has missed nothing."""
    packets = capture.stop()
    assert not capture.dropped
    network = Network.read(packets, traffic.address, PORT)
    harm: list[Any] = [
        (stream.process.returncode, stream.process.output(), len(stream.answer().pieces), stream.answer().text[-80:])
        for stream in traffic.streams
        if stream.process.returncode or not stream.answer().identical_to(stream.reference)
    ]
    assert not harm
    assert (network.rst_seen, network.fin_unexpected) == (0, 0)
    assert len(network.flows) >= len(traffic.streams)
