"""What users get wrong: `midstream migrate` says so clearly, before anything is frozen, and the stream goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from lines import PORT, V4, V6, Line, Lines
from midstream_testbed.machine import Pod

pytest_plugins = ["lines_plugin"]


@pytest.fixture
def stream(lines: Lines) -> Iterator[Line]:
    """A client of the pod that shall not move: alive before and after, and never held in between."""
    line = lines.line()
    before = lines.counters(lines.at)
    yield line
    line.is_alive()
    after = lines.counters(lines.at)
    assert {k: after[k] for k in ("absorb_frozen", "absorb_held", "gate_drop")} == {
        k: before[k] for k in ("absorb_frozen", "absorb_held", "gate_drop")
    }
    lines.hang_up()


@pytest.fixture
def extra(lines: Lines) -> Iterator[list[Pod]]:
    """Pods of one test: gone from the inventory afterwards."""
    pods: list[Pod] = []
    yield pods
    for pod in pods:
        del lines.fleet.pods[pod.name]
        lines.fleet._write_inventory()
        pod.delete()


def pod_away(
    lines: Lines, extra: list[Pod], name: str, program: str = "line_pod.py", port: int = PORT, **env: str
) -> Pod:
    """Another pod on the node to which the streams would go."""
    host = lines.b if lines.away == "node-b" else lines.a
    pod = lines.start_pod(host, name, program, port, **env)
    extra.append(pod)
    lines.fleet.wait_ready(name)
    return pod


def told(lines: Lines, *args: str) -> str:
    """What a command that cannot be carried out prints; its exit status is 2, and no job was made."""
    done = lines.fleet.cli("migrate", *args)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def refused(lines: Lines, reason: str, *args: str) -> str:
    """The message of a migration that a check refuses."""
    report = lines.hop(*args)
    assert (report["phase"], report["reason"]) == ("PHASE_FAILED", reason), report["output"]
    assert {s["name"] for s in report["steps"]} <= {"CONNECT", "PREPARE"}
    assert report["message"] in report["output"]
    return str(report["message"])


pytestmark = pytest.mark.usefixtures("stream")


def test_an_unknown_pod_is_named_with_those_that_there_are(lines: Lines) -> None:
    message = told(lines, "nobody", "--to", lines.away)
    assert "unknown pod 'nobody'" in message and lines.source.name in message


def test_an_unknown_node_is_named_with_those_that_there_are(lines: Lines) -> None:
    message = told(lines, lines.source.name, "--to", "node-x")
    assert "unknown node 'node-x'" in message and "node-a, node-b" in message


@pytest.mark.parametrize("how", ["--to", "--target-pod"])
def test_source_and_target_must_differ(lines: Lines, how: str) -> None:
    value = lines.at if how == "--to" else lines.source.name
    assert "choose" in told(lines, lines.source.name, how, value)


def test_a_pod_that_is_gone_is_refused(lines: Lines, extra: list[Pod]) -> None:
    pod = pod_away(lines, extra, "lines-gone")
    process = lines.fleet.pods[pod.name].process
    for pid in [int(x) for f in pod.cgroup.glob("**/cgroup.procs") for x in f.read_text().split()]:
        os.kill(pid, 9)
    process.wait(10)
    message = refused(lines, "unknown_pod", "--target-pod", pod.name)
    assert "is the pod Running" in message


def test_a_target_that_listens_on_another_port_is_refused(lines: Lines, extra: list[Pod]) -> None:
    pod = pod_away(lines, extra, "lines-port", port=PORT + 1)
    assert f"port [{PORT}]" in refused(lines, "target_not_listening", "--target-pod", pod.name)


def test_a_target_of_another_kind_is_refused(lines: Lines, extra: list[Pod]) -> None:
    pod = pod_away(lines, extra, "lines-kind", POD_KIND="other")
    assert "'other'" in refused(lines, "target_kind", "--target-pod", pod.name)


def test_a_target_with_another_model_is_refused(lines: Lines, extra: list[Pod]) -> None:
    """The source has none here; the same check refuses a target without the source's model."""
    pod = pod_away(lines, extra, "lines-model", MODEL="m1")
    assert "same workload" in refused(lines, "target_model", "--target-pod", pod.name)


def test_a_target_without_the_model_is_refused(lines: Lines, extra: list[Pod]) -> None:
    host, address = lines.a if lines.at == "node-a" else lines.b, "10.77.0.130"
    source = lines.start_pod(host, "lines-with", MODEL="m1")
    extra.append(source)
    lines.fleet.wait_ready(source.name)
    lines.fleet.attach(source, address)
    line = Line(lines.outside.connect(address, PORT), "with").greet()
    report = lines.fleet.migrate(source.name, lines.away, "--target-pod", lines.pods[lines.away].name)
    assert report["reason"] == "target_model", report["output"]
    line.is_alive()
    line.sock.close()


def test_a_target_without_the_handoff_library_is_refused(lines: Lines, extra: list[Pod]) -> None:
    host = lines.b if lines.away == "node-b" else lines.a
    pod = host.add_pod("lines-plain")
    extra.append(pod)
    lines.fleet.run_pod(pod, ["/bin/sleep", "60"], "lines")
    assert "no Midstream gateway or library" in refused(lines, "no_handoff", "--target-pod", pod.name)


def test_a_target_that_speaks_an_older_handoff_is_refused(lines: Lines, extra: list[Pod]) -> None:
    pod = pod_away(lines, extra, "lines-old", "hostile_pod.py")
    with lines.outside.connect(pod.ipv4, PORT) as sock:
        Line(sock, "old").say("misdeed old_version")
        assert sock.recv(100) == b"misdeed old_version\n"
    assert "matching runtime and agent images" in refused(lines, "handoff_version", "--target-pod", pod.name)


def test_an_address_that_leads_to_another_pod_of_the_target_s_node_is_refused(lines: Lines, extra: list[Pod]) -> None:
    """As its agent would have plumbed it, without the announcement, which would move the address here and now."""
    host = lines.b if lines.away == "node-b" else lines.a
    other = pod_away(lines, extra, "taker-1")

    def plumb(ip: Any, command: str) -> None:
        ip.rule(command, dst=V4, dst_len=32, table=254, priority=513)
        ip.route(command, dst=f"{V4}/32", oif=ip.link_lookup(ifname=other.host_ifname)[0])

    host.netlink(lambda ip: plumb(ip, "add"))
    try:
        assert "free it first" in refused(lines, "address_taken", "--target-pod", lines.pods[lines.away].name)
    finally:
        host.netlink(lambda ip: plumb(ip, "del"))


def test_an_address_that_somebody_else_has_routed_at_the_target_is_refused(lines: Lines, extra: list[Pod]) -> None:
    """By a route that is none of Midstream's, as a CNI's to a pod of its own: it must still be there afterwards."""
    host = lines.b if lines.away == "node-b" else lines.a
    other = pod_away(lines, extra, "taker-2")

    def route(ip: Any, command: str) -> None:
        ip.route(command, dst=f"{V4}/32", oif=ip.link_lookup(ifname=other.host_ifname)[0])

    host.netlink(lambda ip: route(ip, "add"))
    try:
        message = refused(lines, "address_taken", "--target-pod", lines.pods[lines.away].name)
        assert other.host_ifname in message and "free it first" in message
    finally:
        host.netlink(lambda ip: route(ip, "del"))  # fails when the migration has replaced or removed it


@pytest.mark.parametrize("address", [V4, V6])
def test_an_address_that_the_target_s_node_has_itself_is_refused(lines: Lines, address: str) -> None:
    """A node's network set-up may take every address of the NIC for the node: packets would never reach the pod."""
    host = lines.b if lines.away == "node-b" else lines.a
    bits = 128 if ":" in address else 32

    def own(ip: Any, command: str) -> None:
        (index,) = ip.link_lookup(ifname="eth1")
        extra = {"flags": 0x02} if command == "add" and bits == 128 else {}  # nodad
        ip.addr(command, index=index, address=address, prefixlen=bits, **extra)

    host.netlink(lambda ip: own(ip, "add"))
    try:
        assert "eth1" in refused(lines, "address_taken", "--target-pod", lines.pods[lines.away].name)
    finally:
        host.netlink(lambda ip: own(ip, "del"))


def test_an_address_that_the_pod_does_not_hold_is_refused(lines: Lines) -> None:
    target = ("--target-pod", lines.pods[lines.away].name)
    message = refused(lines, "no_floating_ip", "--address", "10.77.0.199", *target)
    assert "10.77.0.199" in message and "attach" in message


# -- a node that lacks something ----------------------------------------------------------------------------------


def other_agent(lines: Lines, *prefix: str, bpffs: str = "") -> subprocess.CompletedProcess[str]:
    """A second agent of the source's node, without something: it must say what, and end."""
    agent = lines.fleet.agents[lines.at]
    argv = [*prefix, *agent.argv, "--listen", f"{agent.host.ipv4}:9555", "--state-dir", f"{agent.state_dir}-other"]
    if bpffs:
        argv += ["--bpffs", bpffs]
    return agent.host.run(argv, env=lines.fleet.env(), check=False)


def test_an_agent_without_loaded_programs_says_how_to_load_them(lines: Lines) -> None:
    done = other_agent(lines, bpffs="/sys/fs/bpf/nobody-loaded-here")
    assert done.returncode == 1
    assert "hold_not_loaded" in done.stderr and "python -m midstream_agent.hold load" in done.stderr


@pytest.mark.parametrize("capability", ["net_admin", "sys_admin", "sys_ptrace"])
def test_an_agent_without_a_capability_names_it(lines: Lines, capability: str) -> None:
    done = other_agent(lines, "setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}")
    assert done.returncode == 1, done.stderr
    assert "no_capability" in done.stderr and f"CAP_{capability.upper()}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loader_without_capabilities_names_them(lines: Lines) -> None:
    argv = ["setpriv", "--bounding-set=-all", sys.executable, "-m", "midstream_agent.hold", "load", "--bpffs"]
    done = lines.a.run([*argv, "/sys/fs/bpf/no-capability"], env=lines.fleet.env(), check=False)
    assert done.returncode != 0
    assert "no_capability" in done.stderr + done.stdout or "no_bpffs" in done.stderr + done.stdout


def test_a_node_without_an_agent_is_named(lines: Lines) -> None:
    """What a user sees when the node's agent could not start, for whichever reason."""
    agent = lines.fleet.agents[lines.away]
    agent.process.terminate()
    agent.process.wait(20)
    try:
        message = refused(lines, "peer_unreachable", "--target-pod", lines.pods[lines.away].name)
        assert lines.away in message
        done = lines.fleet.cli("migrate", lines.pods[lines.away].name, "--to", lines.at)
        assert done.returncode == 1
        assert "no agent answers" in done.stderr and "is it running" in done.stderr
    finally:
        lines.fleet.restart_agent(agent)
