"""`make demo`: a live stream changes nodes while curl reads it.

What happens, all of it with real parts but the network and EC2, which the testbed plays:

1. two hosts, an agent on each, a serving pod (gateway + built-in engine) on each, one floating IP on the first;
2. the answers without a migration are fetched, for comparison;
3. `curl -N` streams the same prompts, one more client is still uploading its request, and `midstream migrate` moves
   the pod's streams in mid-answer;
4. the source host is deleted before the last third of the answer;
5. the client host's own capture says what the network saw, the report says it to people, build/demo.json to
   machines. Exit status 1 when anything was lost, doubled, reset, or differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream_testbed import report as people
from midstream_testbed.fleet import GATEWAY_PORT, Fleet
from midstream_testbed.machine import Client, Host, Pod
from midstream_testbed.namespace import Namespace, Process
from midstream_testbed.verdict import Answer, Network, lost_and_doubled, nothing_lost, summary_ms
from midstream_testbed.vpc import Vpc

ADDRESS = "10.77.0.100"
PROMPTS = (
    "The license grants you", "When the program starts", "A file is a", "You may copy and distribute",
    "If the user asks", "The system reads", "This manual describes", "In order to protect",
)  # fmt: skip
UPLOAD_PROMPT = "The user of this computer"
TOKENS_A_SLOT, SPARE_SLOTS_A_STREAM = 16, 16
TOKENS = 900
UPLOAD_BYTES, UPLOAD_BYTES_PER_S = 400 << 10, 100 << 10
UPLOAD_TOKENS = 24


@dataclass(slots=True)
class Stream:
    """One curl: its prompt, where its output goes, and the answer that it should get."""

    prompt: str
    out: Path
    process: Process
    port: int = 0
    """Of the client's end."""
    reference: Answer = field(default_factory=Answer)

    def answer(self) -> Answer:
        return Answer.parse(self.out.read_text(encoding="utf-8", errors="replace") if self.out.exists() else "")


@dataclass(slots=True)
class Play:
    """What was recorded of one run."""

    streams: list[Stream]
    upload: Stream
    """A client that was still sending its request: what it sends while it is held must not be lost."""
    report: dict[str, Any]
    network: Network
    missed_packets: int
    metrics: dict[str, float]
    source_deleted_at_share: float
    migration: tuple[float, float]
    """When it was asked for and when it had ended, seconds of the epoch."""
    notice: dict[str, Any] = field(default_factory=dict)
    """What made it begin, where nobody asked for it: see spot.py."""


@dataclass(slots=True)
class Demo:
    streams: int = 1
    tokens: int = TOKENS
    pace_ms: float = 4.0
    move_seconds: float = 0.0
    without_hold: bool = False
    zero_kv: bool = False
    slow_send_ms: float = 0.0
    """As if checkpoints and KV took this long to reach the target."""
    steer: bool = True
    """Agents with a tunnel: clients do not wait for the address."""
    quiet: bool = False
    folder: Path = Path()
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"[{time.monotonic() - self.began:6.2f} s] {text}", flush=True)

    # -- the play ---------------------------------------------------------------------------------------

    def run(self) -> Play:
        self.say(f"testbed: router, two hosts, a client outside the VPC; an address move takes {self.move_seconds:g} s")
        with (
            Vpc.create(move_seconds=self.move_seconds) as vpc,
            Fleet(vpc, self.folder, self.without_hold, self.steer) as fleet,
        ):
            source, target = vpc.host("node-a"), vpc.host("node-b")
            client = vpc.client("client")
            pods = self._serve(fleet, source, target)
            references = self._references(client)
            with client.capture() as capture:
                running = self._start_curls(client, references)
                self._wait_until(running, 1 / 3)
                upload = self._start_upload(client, references)
                asked = time.time()
                report = self._migrate(fleet, pods)
                ended = time.time()
                share = self._delete(source, running)
                self._finish([*running, upload])
                metrics = {} if self.without_hold else self._metrics(client)
                packets = capture.stop()
            network = Network.read(packets, ADDRESS, GATEWAY_PORT)
            return Play(running, upload, report, network, capture.dropped or 0, metrics, share, (asked, ended))

    def _serve(self, fleet: Fleet, source: Host, target: Host) -> list[Pod]:
        for host in (source, target):
            slow = (
                {"MIDSTREAM_FAILPOINTS": f"source.SEND.do.before=delay:{self.slow_send_ms}"}
                if self.slow_send_ms
                else {}
            )
            fleet.start_agent(host, "--address-confirm-s", str(self.move_seconds + 20), **slow)
        self.say("an agent on each host: hold and gate are loaded, nothing is held")
        options = ("--pace-ms", str(self.pace_ms), "--pool-slots", str(self.pool_slots))
        extra = {"MIDSTREAM_TEST_ZERO_KV": "1"} if self.zero_kv else {}
        pods = [fleet.start_gateway(source, "llm-0", *options), fleet.start_gateway(target, "llm-1", *options, **extra)]
        for pod in pods:
            fleet.wait_ready(pod.name)
        fleet.attach(pods[0], ADDRESS)
        self.say(f"serving pods llm-0 and llm-1 are ready; clients connect to the floating IP {ADDRESS}")
        return pods

    @property
    def pool_slots(self) -> int:
        return max(512, (self.tokens // TOKENS_A_SLOT + SPARE_SLOTS_A_STREAM) * self.streams)

    def _curl(
        self, client: Namespace, prompt: str, name: str, tokens: int, *options: str,
        pad_bytes: int = 0, server: str = ADDRESS,
    ) -> Stream:  # fmt: skip
        body = {"model": "midstream-tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                "stream": True, "ignore_eos": True}  # fmt: skip
        out, request = self.folder / f"{name}.sse", self.folder / f"{name}.json"
        request.write_text(json.dumps(body) + " " * pad_bytes, encoding="utf-8")
        argv = ["curl", "-sS", "-N", "--max-time", str(300 + 10 * self.move_seconds), "-o", str(out),
                "-H", "content-type: application/json", "-w", "%{local_port}", "--data-binary", f"@{request}",
                *options, f"http://{server}:{GATEWAY_PORT}/v1/completions"]  # fmt: skip
        return Stream(prompt, out, client.popen(argv, name=name))

    def _references(self, client: Namespace, server: str = ADDRESS) -> dict[str, Answer]:
        """The same greedy answers without a migration."""
        prompts = PROMPTS[: self.streams]
        running = [
            self._curl(client, p, f"reference-{i}", self.tokens, server=server) for i, p in enumerate(prompts)
        ]
        running.append(self._curl(client, UPLOAD_PROMPT, "reference-upload", UPLOAD_TOKENS, server=server))
        self._finish(running)
        self.say(f"{len(prompts)} answers of {self.tokens} tokens fetched without a migration, for comparison")
        found = {s.prompt: s.answer() for s in running}
        for stream in running:
            if not found[stream.prompt].done:
                raise RuntimeError(f"no answer even without a migration:\n{stream.process.output()[-2000:]}")
        return found

    def _start_curls(self, client: Client, references: dict[str, Answer]) -> list[Stream]:
        running = []
        for i in range(self.streams):
            stream = self._curl(client, PROMPTS[i % len(PROMPTS)], f"stream-{i}", self.tokens)
            stream.reference = references[stream.prompt]
            running.append(stream)
        self.say(f"{self.streams} x curl -N: streaming {self.tokens} tokens each, one every {self.pace_ms:g} ms")
        return running

    def _start_upload(self, client: Client, references: dict[str, Answer]) -> Stream:
        """A request that is mostly blanks and takes seconds to send."""
        options = ("--limit-rate", str(UPLOAD_BYTES_PER_S), "--max-time", str(20 + 2 * self.move_seconds))
        upload = self._curl(client, UPLOAD_PROMPT, "upload", UPLOAD_TOKENS, *options, pad_bytes=UPLOAD_BYTES)
        upload.reference = references[UPLOAD_PROMPT]
        end = time.monotonic() + 20
        while self._established(client) <= self.streams:
            if time.monotonic() > end:
                raise RuntimeError(f"the uploading client did not connect: {upload.process.output()[-2000:]}")
            time.sleep(0.01)
        self.say(f"one more client sends a request of {UPLOAD_BYTES >> 10} KiB, slowly")
        return upload

    def _established(self, client: Client) -> int:
        """Connections of that host to the floating IP's port (/proc/net/tcp: state 01)."""
        fields = (line.split() for line in client.proc_net("tcp").splitlines()[1:])
        return sum(f[2].endswith(f":{GATEWAY_PORT:04X}") and f[3] == "01" for f in fields)

    def _wait_until(self, running: list[Stream], share: float) -> None:
        end = time.monotonic() + 300
        while min(len(s.answer().pieces) for s in running) < self.tokens * share:
            if time.monotonic() > end or any(s.process.poll() is not None for s in running):
                raise RuntimeError("the streams did not get going: " + running[0].process.output()[-2000:])
            time.sleep(0.05)

    def _migrate(self, fleet: Fleet, pods: list[Pod]) -> dict[str, Any]:
        self.say("midstream migrate llm-0 --to node-b")
        report_file = self.folder / "report.json"
        done = fleet.cli("migrate", pods[0].name, "--to", "node-b", "--report", str(report_file),
                         timeout_s=60 + 10 * self.move_seconds)  # fmt: skip
        for line in done.stdout.splitlines():
            if not self.quiet:
                print(f"             {line}")
        if done.returncode:
            logs = "".join(f"--- {n}\n{a.log[-3000:]}" for n, a in fleet.agents.items())
            raise RuntimeError(f"the migration did not succeed:\n{done.stdout}{done.stderr}\n{logs}")
        report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
        return report

    def _delete(self, source: Host, running: list[Stream]) -> float:
        source.delete()
        share = max(len(s.answer().pieces) for s in running) / self.tokens
        self.say(f"host node-a deleted, {share:.0%} of the answer had arrived")
        return share

    def _finish(self, running: list[Stream]) -> None:
        for stream in running:
            out, _ = stream.process.communicate(timeout=320 + 10 * self.move_seconds)
            stream.port = int((out or stream.process.output().encode()).strip()[-5:] or 0)

    def _metrics(self, client: Client) -> dict[str, float]:
        """The target gateway's own counters."""
        url = f"http://{ADDRESS}:{GATEWAY_PORT}/metrics"
        text = client.run(["curl", "-sS", "--max-time", "10", url]).stdout
        lines = (x.rpartition(" ") for x in text.splitlines() if x.startswith("midstream_"))
        return {name: float(value) for name, _, value in lines}

    # -- the verdict ------------------------------------------------------------------------------------

    def judge(self, play: Play) -> dict[str, Any]:
        answers = [(s.answer(), s) for s in play.streams]
        harm = [lost_and_doubled(a.pieces, s.reference.pieces) for a, s in answers]
        stalls = [s for f in play.network.flows.values() if (s := f.stall(*play.migration)) is not None]
        report = play.report
        result: dict[str, Any] = {
            "streams": self.streams,
            "migrated_streams": int(report.get("streams", {}).get("migrated", 0)),
            "tokens": sum(len(a.pieces) for a, _ in answers),
            "tokens_expected": sum(len(s.reference.pieces) for s in play.streams),
            "tokens_lost": sum(lost for lost, _ in harm),
            "tokens_doubled": sum(doubled for _, doubled in harm),
            "identical_to_unmigrated": all(
                a.identical_to(s.reference) and s.process.returncode == 0 for a, s in answers
            ),
            "uploads": 1,
            "uploads_answered": int(
                play.upload.answer().identical_to(play.upload.reference) and play.upload.process.returncode == 0
            ),
            "source_host": report.get("sourceNode", ""),
            "target_host": report.get("targetNode", ""),
            "source_deleted_at_share": round(play.source_deleted_at_share, 3),
            "target_prefill_tokens": int(play.metrics.get("midstream_adopted_prefill_tokens_total", -1)),
            "kv_tokens_used": int(play.metrics.get("midstream_adopted_kv_tokens_total", -1)),
            "kv_bytes": int(report.get("kv", {}).get("bytesSent", 0)),
            "checkpoint_bytes": int(report.get("checkpointBytes", 0)),
            "checkpoint_us": round(float(report.get("checkpointUs", 0)), 2),
            "restore_us": round(float(report.get("restoreUs", 0)), 2),
            "hold_ms": round(float(report.get("holdMs", 0)), 3),
            "switchover": report.get("switchover", ""),
            "rst_seen": play.network.rst_seen,
            "fin_unexpected": play.network.fin_unexpected,
            "packets_missed_by_capture": play.missed_packets,
            "stall_ms": summary_ms(ms for ms, _ in stalls),
            "pace_ms": self.pace_ms,
            "move_seconds": self.move_seconds,
            "steps": report.get("steps", []),
        }
        if play.notice:
            result["notice"] = play.notice
        result["ok"] = nothing_lost(result)
        return result

    def switch_of_first(self, play: Play) -> tuple[str, int | None]:
        """The first stream's text, and how many of its characters came before the stall."""
        first = play.streams[0]
        pieces = first.answer().pieces
        flow = next((f for (_, port), f in play.network.flows.items() if port == first.port), None)
        stall = flow.stall(*play.migration) if flow else None
        return "".join(pieces), None if stall is None else sum(len(p) for p in pieces[: stall[1]])


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    demo = Demo(
        args.streams, args.tokens, args.pace_ms, args.move_seconds, args.without_hold, args.zero_kv,
        args.slow_send_ms, args.switchover == "steer",
    )  # fmt: skip
    return perform(demo, args.json)


def perform(demo: Demo, out: Path) -> int:
    """Play it, judge it, say so to people and machines; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the testbed ends in order then too
    folder = demo.folder = Path(tempfile.mkdtemp(prefix="midstream-demo-"))
    try:
        play = demo.run()
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(folder)  # whoever stops it asks no questions
        raise
    except Exception:
        print(f"the demo broke off; logs are kept in {folder}", file=sys.stderr)
        raise
    result = demo.judge(play)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(people.render(result, *demo.switch_of_first(play)))
    print(f"\n  {out} has it for machines")
    if result["ok"]:
        shutil.rmtree(folder)
    else:
        print(f"  logs are kept in {folder}")
    return 0 if result["ok"] else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    env = os.environ
    parser = argparse.ArgumentParser(prog="make demo")
    parser.add_argument("--streams", type=int, default=int(env.get("STREAMS") or 1))
    parser.add_argument("--tokens", type=int, default=env.get("DEMO_TOKENS"), help="of each answer")
    parser.add_argument("--pace-ms", type=float, default=float(env.get("DEMO_PACE_MS") or 4))
    parser.add_argument("--move-seconds", type=float, default=float(env.get("DEMO_MOVE_SECONDS") or 0))
    parser.add_argument("--switchover", choices=("steer", "wait"), default=env.get("DEMO_SWITCHOVER") or "steer")
    parser.add_argument("--without-hold", action="store_true", help="the control: must fail")
    parser.add_argument(
        "--zero-kv", action="store_true", help="the control: moved KV is zeroed, the answer must change"
    )
    parser.add_argument("--slow-send-ms", type=float, default=0.0, help="delay between checkpoint and restore")
    parser.add_argument("--json", type=Path, default=Path("build/demo.json"))
    args = parser.parse_args(argv)
    if args.tokens is None:
        # streams that do not wait go on while the address moves, and the source must go before their last third
        longer = 3 * args.move_seconds * 1000 / max(args.pace_ms, 1) if args.switchover == "steer" else 0
        args.tokens = min(TOKENS + int(longer), 7000)
    for name, least in (("streams", 1), ("tokens", 60), ("pace_ms", 0), ("move_seconds", 0), ("slow_send_ms", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


if __name__ == "__main__":
    sys.exit(main())
