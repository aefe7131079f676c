"""What a pod, or an agent, may try: each is refused by name before anything is frozen, and the status says so.

Everything that comes from a pod is hostile until checked. One hostile pod plays the source and one the target; what
they do wrong is chosen from outside (hostile_pod.py), and in between they behave, so that a refusal leaves nothing
behind: the stream of the client goes on, and the last test moves it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lines import HERE, PORT, Line, Lines
from midstream_agent.hold import Hold
from midstream_testbed.machine import Pod

pytest_plugins = ["lines_plugin"]

SOURCE, TARGET = "10.77.0.120", "10.77.0.121"
POOL = {
    "pool_unsealed": "pool_not_sealed",
    "pool_symlink": "pool_not_sealed",
    "pool_directory": "pool_not_sealed",
    "pool_socket": "pool_not_sealed",
    "pool_truncated": "pool_truncated",
    "pool_malformed": "pool_malformed",
}
FRAMES = {
    "frame_large_header": "handoff_size",
    "frame_large_payload": "handoff_size",
    "frame_no_json": "handoff_protocol",
    "frame_no_object": "handoff_protocol",
    "frame_other_id": "handoff_protocol",
    "frame_fds_claimed": "handoff_fds",
    "frame_fds_negative": "handoff_fds",
    "frames_for_ever": "handoff_size",
    "frames_of_fds": "handoff_fds",
    "frame_never": "handoff_timeout",
}
HELLO = {"old_version": "handoff_version", "version_malformed": "handoff_protocol"}
COUNTS = {"fds_one_more": "handoff_fds", "fds_one_less": "handoff_fds"}
FDS = ("fd_netns", "fd_file", "fd_udp", "fd_unix", "fds_twice")
AT_SOURCE = {**POOL, **FRAMES, **HELLO, **COUNTS, "streams_malformed": "handoff_protocol"} | {
    name: "stream_refused" for name in FDS
}
AT_TARGET = {**POOL, **FRAMES, **HELLO, **COUNTS} | {name: "blank_refused" for name in (*FDS, "fd_listener")}


@dataclass
class Hostiles:
    """The two hostile pods, each with a floating IP; two clients of the source, one of the target."""

    lines: Lines
    pods: dict[str, Pod]
    control: dict[str, Line]

    def misdeed(self, side: str, name: str) -> None:
        self.control[side].say(f"misdeed {name}")
        self.control[side].expect(f"misdeed {name}\n".encode())

    def log(self, side: str) -> str:
        return self.lines.fleet.pods[self.pods[side].name].process.output()

    def root(self, side: str) -> Path:
        """The pod's /run/midstream, from outside."""
        return Path(f"/proc/{self.lines.fleet.pods[self.pods[side].name].process.pid}/root/run/midstream")

    def migrate(self) -> dict[str, Any]:
        pods = self.pods
        return self.lines.fleet.migrate(pods["source"].name, "node-b", "--target-pod", pods["target"].name)

    def refused(self, reason: str) -> None:
        """A migration ends with that reason, before any flow was held; the status says so; the stream goes on."""
        report = self.migrate()
        assert report["reason"] == reason, report["output"]
        assert report["phase"] in ("PHASE_FAILED", "PHASE_ROLLED_BACK")
        assert not {s["name"] for s in report["steps"]} & {"HOLD", "EXPORT", "SEND"}, "something was frozen"
        (status,) = [x for x in self.lines.fleet.cli("status").stdout.splitlines() if x.startswith(report["jobId"])]
        assert reason in status and report["message"] in status
        self.control["source"].is_alive()


@pytest.fixture(scope="module")
def hostiles(lines: Lines) -> Iterator[Hostiles]:
    pods = {
        side: lines.start_pod(host, f"hostile-{side}", "hostile_pod.py")
        for side, host in (("source", lines.a), ("target", lines.b))
    }
    control = {}
    for (side, pod), address in zip(pods.items(), (SOURCE, TARGET), strict=True):
        lines.fleet.wait_ready(pod.name)
        lines.fleet.attach(pod, address)
        control[side] = Line(lines.outside.connect(address, PORT), side).greet()
    control["second"] = Line(lines.outside.connect(SOURCE, PORT), "second").greet()
    yield Hostiles(lines, pods, control)
    for line in control.values():
        line.sock.close()


@pytest.mark.parametrize(
    ("side", "misdeed", "reason"),
    [("source", k, v) for k, v in AT_SOURCE.items()] + [("target", k, v) for k, v in AT_TARGET.items()],
)
def test_a_pod_that_breaks_the_protocol_is_refused(hostiles: Hostiles, side: str, misdeed: str, reason: str) -> None:
    hostiles.misdeed(side, misdeed)
    try:
        hostiles.refused(reason)
        assert f"did {misdeed}" in hostiles.log(side)
    finally:
        hostiles.misdeed(side, "none")


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("kind", ["symlink", "parent_symlink", "absolute_symlink", "file", "foreign"])
def test_a_handoff_path_that_is_not_the_pod_s_own_socket_is_refused(hostiles: Hostiles, side: str, kind: str) -> None:
    folder = hostiles.root(side)
    path, real, elsewhere = folder / "handoff.sock", folder / "real.sock", folder.with_name("elsewhere")
    reasons = {"file": "handoff_not_a_socket", "foreign": "handoff_foreign"}
    listener = socket.socket(socket.AF_UNIX)
    if kind == "parent_symlink":
        folder.rename(elsewhere)
        folder.symlink_to("elsewhere")
    else:
        path.rename(real)
    try:
        if kind == "symlink":
            path.symlink_to("real.sock")
        if kind == "absolute_symlink":
            path.symlink_to("/run/midstream/real.sock")
        if kind == "file":
            path.write_text("no socket")
        if kind == "foreign":  # of this process, which is in no cgroup of the pod
            listener.bind(str(path))
            listener.listen()
        hostiles.refused(reasons.get(kind, "handoff_symlink"))
    finally:
        listener.close()
        if kind == "parent_symlink":
            folder.unlink()
            elsewhere.rename(folder)
        else:
            path.unlink()
            real.rename(path)


# -- a hostile source: what arrives at the target is not what was prepared ---------------------------------------


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"local": TARGET}, "checkpoint_foreign"),  # of the same pod, but not of this job
        ({"port": PORT + 1}, "checkpoint_foreign"),
        ({"streams": 2}, "checkpoint_count"),
        ({"harm": "damage"}, "tcp_damaged"),
        ({"harm": "truncate"}, "tcp_damaged"),
        ({"harm": "empty"}, "tcp_damaged"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_prepared_is_refused(
    hostiles: Hostiles, plan: dict[str, Any], reason: str
) -> None:
    """Sent by an agent with a valid certificate (hostile_peer.py)."""
    lines, prepared = hostiles.lines, "10.77.0.122"
    tls = [str(lines.fleet.authority.folder / name) for name in ("ca.pem", "node-a.pem", "node-a.key")]
    whole = {
        "tls": tls, "endpoint": lines.fleet.agents["node-b"].endpoint, "pod": hostiles.pods["target"].uid,
        "prepared": prepared, "local": prepared, "port": PORT, "streams": 1, "harm": "none", **plan,
    }  # fmt: skip
    address = whole["local"]
    lines.a.netlink(lambda ip: ip.addr("add", index=1, address=address, prefixlen=32))
    try:
        argv = [sys.executable, str(HERE / "hostile_peer.py"), json.dumps(whole)]
        assert lines.a.run(argv, env=lines.fleet.env()).stdout.strip() == reason
    finally:
        lines.a.netlink(lambda ip: ip.addr("del", index=1, address=address, prefixlen=32))
    hostiles.control["target"].is_alive()


def test_after_all_refusals_the_pods_are_as_they_were(hostiles: Hostiles) -> None:
    """No flow, no note, no address is held, no descriptor was kept, and the stream moves."""
    for agent in hostiles.lines.fleet.agents.values():
        assert len(os.listdir(f"/proc/{agent.process.pid}/fd")) < 150
        with Hold.open(agent.bpffs) as hold:
            assert (hold.flow_keys(), hold.note_keys(), hold.addr_keys()) == ([], [], [])
    report = hostiles.migrate()
    assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
    assert int(report["streams"]["migrated"]) == 2
    for line in hostiles.control.values():
        line.is_alive()
