"""What the testbed makes is separate while it lives and gone afterwards, however it ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from midstream_testbed import Host, Pod, Vpc, leaks, plumbing, state

TESTBED = Path(state.__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(TESTBED)}
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def vpc() -> Iterator[Vpc]:
    with Vpc.create() as vpc:
        yield vpc


@pytest.fixture
def host(vpc: Vpc) -> Iterator[Host]:
    host = vpc.host("node-a", configured=True)
    yield host
    host.delete()


@pytest.fixture
def pod(host: Host) -> Pod:
    return host.add_pod("llm-0")


def wait_ended(pid: int) -> None:
    """Return when a process is gone, whoever its parent is."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        with open(fd):
            assert select.select([fd], [], [], PATIENCE_S)[0], f"{pid} lives on"


# -- separation


def test_pods_have_a_run_folder_of_their_own(host: Host, pod: Pod) -> None:
    other = host.add_pod("llm-1")
    pod.run(["sh", "-c", "echo secret >/run/midstream/handoff.sock"])
    assert pod.run(["cat", "/run/midstream/handoff.sock"]).stdout == "secret\n"
    assert other.run(["ls", "-A", "/run/midstream"]).stdout == ""
    assert not Path("/run/midstream/handoff.sock").exists()
    assert pod.run(["ls", "/run"]).stdout.split() == ["midstream", "tmp"]


def capabilities(pod: Pod, **options: Any) -> int:
    status = pod.run(["cat", "/proc/self/status"], **options).stdout
    return int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)


def test_pods_have_a_containers_capabilities_unless_privileged(pod: Pod) -> None:
    net_admin, net_raw, sys_admin = 1 << 12, 1 << 13, 1 << 21
    assert capabilities(pod) & (net_admin | sys_admin | net_raw) == net_raw
    assert capabilities(pod, privileged=True) & (net_admin | sys_admin) == net_admin | sys_admin
    assert capabilities(pod, uid=1234) == 0
    assert pod.run(["id", "-u"], uid=1234).stdout == "1234\n"
    assert pod.run(["sh", "-c", "touch /run/midstream/mine"], uid=1234).returncode == 0


def test_an_agent_finds_a_pods_processes_by_cgroup_and_descendants_stay_in_it(pod: Pod) -> None:
    process = pod.popen(["sh", "-c", "setsid sleep 600 & echo $!; exec sleep 600"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    listed = Path(pod.cgroup, "serving", "cgroup.procs").read_text().split()
    assert {str(process.pid), str(child)} <= set(listed)
    for pid in (process.pid, child):
        assert f"/kubepods/pod{pod.uid}/serving" in Path(f"/proc/{pid}/cgroup").read_text()
        assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(pod.netns_path).st_ino
    pause = Path(pod.cgroup, "sandbox", "cgroup.procs").read_text().split()
    assert len(pause) == 1
    assert not Path(f"/proc/{pause[0]}/root/run/midstream/handoff.sock").exists()


def test_output_goes_to_a_log_file_and_the_environment_is_added(host: Host) -> None:
    process = host.popen(["sh", "-c", 'echo "$GREETING"; echo wrong >&2'], env={"GREETING": "hello"})
    assert process.wait(PATIENCE_S) == 0
    assert process.output() == "hello\nwrong\n"


def test_a_failing_command_says_what_and_where(host: Host) -> None:
    with pytest.raises(RuntimeError, match=r"node-a: .*'false-start'.* exited with 7: no such thing"):
        host.run(["sh", "-c", "echo no such thing >&2; exit 7", "false-start"])


# -- orderly ends


def test_a_deleted_pod_leaves_its_host_as_it_was(host: Host) -> None:
    before = leaks.snapshot(host)
    pod = host.add_pod("short-lived")
    pid = pod.popen(["sleep", "600"]).pid
    assert leaks.difference(before, leaks.snapshot(host)) != leaks.NOTHING
    cgroup = pod.cgroup
    pod.delete()
    wait_ended(pid)
    assert leaks.difference(before, leaks.snapshot(host)) == leaks.NOTHING
    assert not cgroup.exists()


def test_a_deleted_host_takes_its_pods_and_every_descendant_with_it(vpc: Vpc) -> None:
    host = vpc.host("doomed", configured=True)
    pod = host.add_pod("llm-0")
    pids = []
    for place in (host, pod):
        script = "setsid sh -c 'sleep 600 & echo $!; wait' & sleep 600"
        process = place.popen(["sh", "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        pids += [process.pid, int(process.stdout.readline())]
    names = [host.netns_path, pod.netns_path]
    router_ends = [eni.router_ifname for eni in host.enis]
    host.delete()
    for pid in pids:
        wait_ended(pid)
    assert not any(Path(name).exists() for name in names)
    assert not any(end in vpc.router.run(["ip", "link"]).stdout for end in router_ends)
    assert not any(tree.joinpath("doomed").exists() for tree in state.cgroup_trees(vpc.prefix))
    host.delete()  # again, harmlessly
    again = vpc.host("doomed")
    assert again.run(["true"]).returncode == 0
    again.delete()


def test_nothing_is_left_after_the_context_ends_nor_after_an_exception() -> None:
    prefixes = []
    with Vpc.create() as vpc:
        prefixes.append(vpc.prefix)
        pid = vpc.host("node-a").add_pod("llm-0").popen(["sleep", "600"]).pid
        assert leaks.of_prefix(vpc.prefix)
    wait_ended(pid)
    with pytest.raises(ZeroDivisionError), Vpc.create() as vpc:
        prefixes.append(vpc.prefix)
        vpc.client("client").capture()
        vpc.host("node-a").add_pod("llm-0").popen(["sleep", "600"])
        raise ZeroDivisionError
    assert [leaks.of_prefix(prefix) for prefix in prefixes] == [[], []]


def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed: list[str] = []
    claim = state.claim

    def recorded() -> tuple[str, Path]:
        prefix, folder = claim()
        claimed.append(prefix)
        return prefix, folder

    monkeypatch.setattr(state, "claim", recorded)
    monkeypatch.setattr("midstream_testbed.fabricd.__file__", "/nonexistent/fabricd.py")
    with pytest.raises(RuntimeError, match="the fabric did not start"):
        Vpc.create()
    assert [leaks.of_prefix(prefix) for prefix in claimed] == [[]]


@pytest.mark.parametrize(
    "root", [state.CGROUP_ROOT, *state.CGROUP_ROOT.glob("unified")], ids=lambda path: path.name
)
def test_cgroups_of_both_versions_serve(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hybrid machine has the v2 tree below the v1 ones; elsewhere the default is the one there is."""
    monkeypatch.setattr(state, "CGROUP_ROOT", root)
    with Vpc.create() as vpc:
        pod = vpc.host("node-a").add_pod("llm-0")
        pid = pod.popen(["sleep", "600"]).pid
        assert root in pod.cgroup.parents
        assert f"/kubepods/pod{pod.uid}/serving" in Path(f"/proc/{pid}/cgroup").read_text()
        prefix = vpc.prefix
    assert leaks.of_prefix(prefix) == []


def test_a_forked_child_that_leaves_the_context_ends_nothing(vpc: Vpc, host: Host) -> None:
    child = os.fork()
    if not child:
        vpc.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert host.run(["true"]).returncode == 0


# -- disorderly ends

OWNER = """
import signal, sys
from midstream_testbed import Vpc
signal.signal(signal.SIGINT, signal.default_int_handler)
with Vpc.create() as vpc:
    host = vpc.host("node-a")
    pod = host.add_pod("llm-0")
    pids = [place.popen(["sleep", "600"]).pid for place in (host, pod)]
    print(vpc.prefix, vpc._daemon.pid, *pids, flush=True)
    signal.pause()
"""


class Owner:
    """A process that owns a testbed and waits for its end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", OWNER], env=ENV, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.prefix, *pids = self.process.stdout.readline().decode().split()
        self.fabric, *self.pids = map(int, pids)

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=PATIENCE_S)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def clean(*prefixes: str) -> str:
    argv = [sys.executable, "-m", "midstream_testbed", "clean", *prefixes]
    return subprocess.run(argv, env=ENV, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_testbed_ends_with_its_owner(number: signal.Signals) -> None:
    """SIGINT by the context's own end; SIGKILL and SIGTERM by the fabric, which sees its lifeline end."""
    with Owner() as owner:
        owner.end(number)
        for pid in (*owner.pids, owner.fabric):
            wait_ended(pid)
        assert leaks.of_prefix(owner.prefix) == []


def test_clean_removes_what_a_crash_left_and_never_a_living_owners() -> None:
    with Owner() as dead, Owner() as alive:
        os.kill(dead.fabric, signal.SIGKILL)
        dead.end(signal.SIGKILL)
        assert leaks.of_prefix(dead.prefix), "nobody was left to clean up"
        said = clean(dead.prefix, alive.prefix)
        assert said == f"removed {dead.prefix}\n"
        assert leaks.of_prefix(dead.prefix) == []
        for pid in dead.pids:
            wait_ended(pid)
        assert leaks.of_prefix(alive.prefix)
        for pid in alive.pids:
            os.kill(pid, 0)


# -- the leak detector sees what it is there for


def add_listener(place: Pod) -> socket.socket:
    return place.listen("127.0.0.1")


CLUTTER: dict[str, Callable[[Pod], object]] = {
    "link": lambda pod: pod.run(["ip", "link", "add", "left", "type", "veth"], privileged=True),
    "address": lambda pod: pod.run(["ip", "addr", "add", "192.0.2.9/32", "dev", "eth0"], privileged=True),
    "route": lambda pod: pod.run(
        ["ip", "route", "add", "192.0.2.8", "dev", "eth0", "table", "77"], privileged=True
    ),
    "rule": lambda pod: pod.run(
        ["ip", "-6", "rule", "add", "from", "fd77::9", "table", "77"], privileged=True
    ),
    "qdisc": lambda pod: pod.run(["tc", "qdisc", "add", "dev", "eth0", "clsact"], privileged=True),
    "nft": lambda pod: pod.nft("table ip left {\n}\n"),
    "socket": add_listener,
}


@pytest.mark.parametrize("kind", CLUTTER)
def test_a_snapshot_shows_what_was_left(pod: Pod, kind: str) -> None:
    before = leaks.snapshot(pod)
    assert leaks.difference(before, leaks.snapshot(pod)) == leaks.NOTHING
    kept = CLUTTER[kind](pod)
    difference = leaks.difference(before, leaks.snapshot(pod))
    assert (pod.name, kind) in {line[:2] for line in difference.added}, difference
    if isinstance(kept, socket.socket):
        kept.close()


def test_a_snapshot_shows_filters_and_what_is_missing(host: Host, pod: Pod) -> None:
    before = leaks.snapshot(host, pod)
    assert any(kind == "filter" and "prio 1 handle 1 bpf" in what for _, kind, what in before)
    host.run(["tc", "qdisc", "del", "dev", pod.host_ifname, "clsact"])
    gone = leaks.difference(before, leaks.snapshot(host, pod)).gone
    assert {line[1] for line in gone} == {"filter", "qdisc"}


def test_plumbing_of_a_floating_address_can_be_undone(vpc: Vpc, host: Host, pod: Pod) -> None:
    before = leaks.snapshot(host, pod)
    for ip in ("10.77.0.100", "fd77::f:100"):
        plumbing.plumb(pod, ip)
        assert leaks.difference(before, leaks.snapshot(host, pod)) != leaks.NOTHING
        plumbing.unplumb(pod, ip)
    assert leaks.difference(before, leaks.snapshot(host, pod)) == leaks.NOTHING


def test_open_files_of_a_process_are_listed() -> None:
    before = leaks.open_fds(os.getpid())
    with socket.socket() as sock:
        added = leaks.difference(before, leaks.open_fds(os.getpid())).added
        assert any(what.startswith(f"{sock.fileno()} socket:") for _, _, what in added)
