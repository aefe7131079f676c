"""`make demo`: a live stream changes nodes while curl reads it.

What happens, all of it with real parts but the network and EC2, which the testbed plays:

1. two hosts, an agent on each, a serving pod (gateway + built-in engine) on each, one floating IP on the first;
2. the answers without a migration are fetched, for comparison;
3. `curl -N` streams the same prompts, `midstream migrate` moves the pod's streams in mid-answer;
4. the source host is deleted before the last third of the answer;
5. the client host's own capture says what the network saw, the report says it to people, build/demo.json to
   machines. Exit status 1 when anything was lost, doubled, reset, or differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream_testbed.fleet import GATEWAY_PORT, Fleet
from midstream_testbed.machine import Client, Host, Pod
from midstream_testbed.namespace import Process
from midstream_testbed.pcap import Packet
from midstream_testbed.vpc import Vpc

ADDRESS = "10.77.0.100"
PROMPTS = (
    "The license grants you", "When the program starts", "A file is a", "You may copy and distribute",
    "If the user asks", "The system reads", "This manual describes", "In order to protect",
)  # fmt: skip


@dataclass(slots=True)
class Stream:
    """One curl: its prompt, where its output goes, and its own local port as the capture knows it."""

    prompt: str
    out: Path
    process: Process
    reference: str = ""

    def events(self) -> list[dict[str, Any]]:
        raw = self.out.read_text(encoding="utf-8", errors="replace") if self.out.exists() else ""
        lines = [x[6:] for x in raw.split("\n") if x.startswith("data: ")]
        return [json.loads(x) for x in lines if x != "[DONE]" and x.endswith("}")]

    def pieces(self) -> list[str]:
        return [c["text"] for e in self.events() for c in e.get("choices", []) if c.get("text") is not None]

    def done(self) -> bool:
        return "data: [DONE]" in (self.out.read_text(encoding="utf-8", errors="replace") if self.out.exists() else "")


@dataclass(slots=True)
class Demo:
    streams: int
    tokens: int
    pace_ms: float
    move_seconds: float
    folder: Path
    without_hold: bool = False
    quiet: bool = False
    zero_kv: bool = False
    began: float = field(default_factory=time.monotonic)
    timeline: list[tuple[float, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        at = time.monotonic() - self.began
        self.timeline.append((at, text))
        if not self.quiet:
            print(f"[{at:6.2f} s] {text}", flush=True)

    # -- the play ---------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        self.say(f"testbed: router, two hosts, a client outside the VPC; an address move takes {self.move_seconds:g} s")
        with Vpc.create(move_seconds=self.move_seconds) as vpc, Fleet(vpc, self.folder, self.without_hold) as fleet:
            source, target = vpc.host("node-a"), vpc.host("node-b")
            client = vpc.client("client")
            pods = self._serve(fleet, source, target)
            references = self._references(client)
            capture = client.capture()
            running = self._start_curls(client, references)
            self._wait_until(running, 1 / 3)
            report = self._migrate(fleet, pods)
            at_delete = self._delete(source, running)
            self._finish(running)
            packets = capture.stop()
            stats = self._engine_stats(client)
            return self._judge(running, report, packets, capture.dropped or 0, stats, at_delete)

    def _serve(self, fleet: Fleet, source: Host, target: Host) -> list[Pod]:
        for host in (source, target):
            fleet.start_agent(host, "--address-confirm-s", str(self.move_seconds + 20))
        self.say("an agent on each host: hold and gate are loaded, nothing is held")
        options = ("--pace-ms", str(self.pace_ms), "--pool-slots", str(max(512, 64 * self.streams)))
        extra = {"MIDSTREAM_TEST_ZERO_KV": "1"} if self.zero_kv else {}
        pods = [fleet.start_gateway(source, "llm-0", *options), fleet.start_gateway(target, "llm-1", *options, **extra)]
        for pod in pods:
            fleet.wait_ready(pod.name)
        fleet.attach(pods[0], ADDRESS)
        self.say(f"serving pods llm-0 and llm-1 are ready; clients connect to the floating IP {ADDRESS}")
        return pods

    def _curl(self, client: Client, prompt: str, out: Path) -> Process:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        argv = ["curl", "-sS", "-N", "--max-time", str(120 + 10 * self.move_seconds), "-o", str(out),
                "-H", "content-type: application/json", "-d", json.dumps(body),
                f"http://{ADDRESS}:{GATEWAY_PORT}/v1/completions"]  # fmt: skip
        return client.popen(argv, name="curl")

    def _prompt(self, i: int) -> str:
        return PROMPTS[i % len(PROMPTS)]

    def _references(self, client: Client) -> dict[str, str]:
        """The same greedy answers without a migration."""
        references = {}
        prompts = sorted({self._prompt(i) for i in range(self.streams)})
        running = [Stream(p, self.folder / f"reference-{i}.sse", self._curl(client, p, self.folder / f"reference-{i}.sse"))
                   for i, p in enumerate(prompts)]  # fmt: skip
        self._finish(running)
        for stream in running:
            references[stream.prompt] = "".join(stream.pieces())
        self.say(f"{len(references)} answers of {self.tokens} tokens fetched without a migration, for comparison")
        return references

    def _start_curls(self, client: Client, references: dict[str, str]) -> list[Stream]:
        running = []
        for i in range(self.streams):
            out = self.folder / f"stream-{i}.sse"
            prompt = self._prompt(i)
            running.append(Stream(prompt, out, self._curl(client, prompt, out), references[prompt]))
        self.say(f"{self.streams} x curl -N: streaming {self.tokens} tokens each, one every {self.pace_ms:g} ms")
        return running

    def _wait_until(self, running: list[Stream], share: float) -> None:
        end = time.monotonic() + 120
        while min(len(s.pieces()) for s in running) < self.tokens * share:
            if time.monotonic() > end:
                raise TimeoutError("the streams did not get going: see the logs of the pods")
            time.sleep(0.02)

    def _migrate(self, fleet: Fleet, pods: list[Pod]) -> dict[str, Any]:
        self.say("midstream migrate llm-0 --to node-b")
        report_file = self.folder / "report.json"
        done = fleet.cli("migrate", pods[0].name, "--to", "node-b", "--report", str(report_file),
                         timeout_s=60 + 10 * self.move_seconds)  # fmt: skip
        for line in done.stdout.splitlines():
            if not self.quiet:
                print(f"             {line}")
        if done.returncode and not self.without_hold:
            logs = "".join(a.log[-3000:] for a in fleet.agents.values())
            raise RuntimeError(f"the migration did not succeed:\n{done.stdout}{done.stderr}\n{logs}")
        return json.loads(report_file.read_text(encoding="utf-8")) if report_file.exists() else {}

    def _delete(self, source: Host, running: list[Stream]) -> float:
        source.delete()
        share = max(len(s.pieces()) for s in running) / self.tokens
        self.say(f"host node-a deleted, {share:.0%} of the answer had arrived")
        return share

    def _finish(self, running: list[Stream]) -> None:
        for stream in running:
            stream.process.wait(180 + 10 * self.move_seconds)

    def _engine_stats(self, client: Client) -> dict[str, float]:
        url = f"http://{ADDRESS}:{GATEWAY_PORT}/metrics"
        text = client.run(["curl", "-sS", "--max-time", "10", url]).stdout
        stats = {}
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("midstream_") and not line.startswith("#"):
                stats[name] = float(value)
        return stats

    # -- the verdict ------------------------------------------------------------------------------------

    def _judge(
        self,
        running: list[Stream],
        report: dict[str, Any],
        packets: list[Packet],
        missed: int,
        stats: dict[str, float],
        at_delete: float,
    ) -> dict[str, Any]:
        lost = doubled = 0
        identical = True
        for stream in running:
            got, want = "".join(stream.pieces()), stream.reference
            identical &= got == want and stream.done() and stream.process.returncode == 0
            lost += max(0, self.tokens - len(stream.pieces())) if got != want else 0
            doubled += max(0, len(stream.pieces()) - self.tokens)
        network = self._network(packets, missed)
        result = {
            "streams": self.streams,
            "tokens": sum(len(s.pieces()) for s in running),
            "tokens_expected": self.streams * self.tokens,
            "tokens_lost": lost,
            "tokens_doubled": doubled,
            "identical_to_unmigrated": identical,
            "source_host": report.get("sourceNode", ""),
            "target_host": report.get("targetNode", ""),
            "source_deleted_at_share": round(at_delete, 3),
            "target_prefill_tokens": stats.get("midstream_adopted_prefill_tokens_total", -1),
            "kv_tokens_used": stats.get("midstream_adopted_kv_tokens_total", -1),
            "kv_bytes": int(report.get("kv", {}).get("bytesSent", 0)),
            "checkpoint_bytes": int(report.get("checkpointBytes", 0)),
            "checkpoint_us": report.get("checkpointUs", 0.0),
            "restore_us": report.get("restoreUs", 0.0),
            "hold_ms": report.get("holdMs", 0.0),
            "switchover": report.get("switchover", ""),
            "steps": report.get("steps", []),
            "pace_ms": self.pace_ms,
            "move_seconds": self.move_seconds,
            **network,
        }
        result["ok"] = self._ok(result)
        return result

    def _network(self, packets: list[Packet], missed: int) -> dict[str, Any]:
        flows: dict[tuple[str, int], list[float]] = {}
        rst = fin_early = 0
        last_fin: dict[tuple[str, int], float] = {}
        for p in packets:
            if p.src == ADDRESS and p.sport == GATEWAY_PORT:
                key = (p.dst, p.dport)
                if p.length:
                    flows.setdefault(key, []).append(p.ts_ns / 1e9)
                rst += p.rst
                if p.fin:
                    last_fin[key] = p.ts_ns / 1e9
            elif p.dst == ADDRESS:
                rst += p.rst
        for key, at in last_fin.items():
            fin_early += any(t > at for t in flows.get(key, []))
        stalls = sorted(filter(None, (_stall_ms(times) for times in flows.values())))
        return {
            "rst_seen": rst,
            "fin_unexpected": fin_early,
            "packets_missed_by_capture": missed,
            "stall_ms": _summary(stalls),
        }

    def _ok(self, r: dict[str, Any]) -> bool:
        clean = not (r["tokens_lost"] or r["tokens_doubled"] or r["rst_seen"] or r["fin_unexpected"])
        return bool(clean and r["identical_to_unmigrated"] and r["tokens"] == r["tokens_expected"])


def _stall_ms(times: list[float]) -> float | None:
    """Longest gap between payload packets minus the median gap of the same stream."""
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return (max(gaps) - statistics.median(gaps)) * 1000 if len(gaps) > 10 else None


def _summary(values: list[float]) -> dict[str, float]:
    if not values:
        return {"p50": -1.0, "p99": -1.0, "max": -1.0}
    pick = lambda q: values[min(len(values) - 1, int(q * len(values)))]  # noqa: E731
    return {"p50": round(pick(0.5), 2), "p99": round(pick(0.99), 2), "max": round(values[-1], 2)}


def show(demo: Demo, result: dict[str, Any], running_text: str) -> None:
    """The report that people read."""
    print("\n" + "=" * 78)
    print("the steps (ms since the job began)")
    for step in result["steps"]:
        bar = "#" * max(1, min(40, round(float(step.get("tookMs", 0)) / 2)))
        print(f"  {step['name']:<13} {float(step.get('startMs', 0)):9.2f} +{float(step.get('tookMs', 0)):9.2f}  {bar}")
    print("\nwhat curl read on its one connection; >>>|<<< is where it changed hosts")
    print("  " + running_text)
    s = result["stall_ms"]
    print(
        f"\nclients: {result['streams']}   tokens: {result['tokens']} of {result['tokens_expected']}"
        f"   lost: {result['tokens_lost']}   doubled: {result['tokens_doubled']}   resets: {result['rst_seen']}"
        f"\nstall at the client: p50 {s['p50']} ms, p99 {s['p99']} ms, max {s['max']} ms"
        f"   ({result['switchover']}, address move {result['move_seconds']:g} s)"
        f"\nKV moved: {result['kv_bytes']} bytes, {result['kv_tokens_used']:.0f} tokens;"
        f" prefilled at the target: {result['target_prefill_tokens']:.0f}"
        f"\nsource {result['source_host']} was deleted at {result['source_deleted_at_share']:.0%} of the answer"
        f"\n{'IDENTICAL to the answer without a migration' if result['ok'] else 'FAILED: something was lost, doubled, reset or differs'}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo")
    parser.add_argument("--streams", type=int, default=int(os.environ.get("STREAMS") or 1))
    parser.add_argument("--tokens", type=int, default=int(os.environ.get("DEMO_TOKENS") or 900))
    parser.add_argument("--pace-ms", type=float, default=float(os.environ.get("DEMO_PACE_MS") or 4))
    parser.add_argument("--move-seconds", type=float, default=float(os.environ.get("DEMO_MOVE_SECONDS") or 0))
    parser.add_argument("--without-hold", action="store_true", help="the control: must fail")
    parser.add_argument(
        "--zero-kv", action="store_true", help="the control: moved KV is zeroed, the answer must change"
    )
    parser.add_argument("--json", type=Path, default=Path("build/demo.json"))
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="midstream-demo-"))
    demo = Demo(
        args.streams, args.tokens, args.pace_ms, args.move_seconds, folder, args.without_hold, zero_kv=args.zero_kv
    )
    result = demo.run()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(demo, result, _marked_text(demo, folder))
    print(f"\n{args.json}")
    if result["ok"]:
        shutil.rmtree(folder)
    else:
        print(f"logs are kept in {folder}")
    return 0 if result["ok"] else 1


def _marked_text(demo: Demo, folder: Path) -> str:
    """The first stream's text around the switch."""
    raw = (folder / "stream-0.sse").read_text(encoding="utf-8", errors="replace")
    return raw[:0] or demo_text(demo, raw)


def demo_text(demo: Demo, raw: str) -> str:
    pieces = [json.loads(x[6:]) for x in raw.split("\n") if x.startswith("data: {")]
    words = [c["text"] for e in pieces for c in e.get("choices", [])]
    at = next((i for i, e in enumerate(pieces) if e.get("midstream_moved")), len(words) // 3)
    window = words[max(0, at - 60) : at], words[at : at + 60]
    return " ".join(("..." + "".join(window[0]) + ">>>|<<<" + "".join(window[1]) + "...").split())


if __name__ == "__main__":
    sys.exit(main())
