"""A pod is found by its cgroup in every layout that nodes have: v1 and v2, by the kubelet itself or by systemd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from midstream_agent.pods import find_pod
from midstream_runtime.contract.errors import Final

UID = "9b1f5c3e-7d2a-4c88-b1de-0a6f6f0e2a11"
UNDERSCORES = UID.replace("-", "_")
CONTAINER = "0f" * 32

LAYOUTS = {
    "v1-cgroupfs": f"memory/kubepods/burstable/pod{UID}/{CONTAINER}",
    "v1-systemd": f"memory/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORES}.slice/"
    f"cri-containerd-{CONTAINER}.scope",
    "v2-cgroupfs": f"kubepods/pod{UID}/{CONTAINER}",
    "v2-systemd": f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORES}.slice/"
    f"cri-containerd-{CONTAINER}.scope",
    "v2-systemd-guaranteed": f"kubepods.slice/kubepods-pod{UNDERSCORES}.slice/crio-{CONTAINER}.scope/container",
    "v2-systemd-below-a-root": f"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDERSCORES}.slice/"
    f"cri-containerd-{CONTAINER}.scope",
}


def node(root: Path, layout: str, pid: int) -> None:
    """With the pod's processes in its container's cgroup alone: on v2 a cgroup with children has none itself."""
    leaf = root / layout
    leaf.mkdir(parents=True)
    for folder in (leaf, *leaf.parents):
        if folder == root.parent:
            break
        (folder / "cgroup.procs").write_text(f"{pid}\n" if folder == leaf else "", encoding="ascii")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_its_processes_are_found(tmp_path: Path, layout: str) -> None:
    node(tmp_path, layout, os.getpid())
    pod = find_pod(tmp_path, UID)
    try:
        assert pod.pids() == {os.getpid()}
        assert os.readlink(f"/proc/self/fd/{pod.netns_fd}") == os.readlink("/proc/self/ns/net")
    finally:
        pod.close()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("other", [UID[:-1], f"{UID[:-1]}2", CONTAINER[:20]])
def test_no_other_pod_is_taken_for_it(tmp_path: Path, layout: str, other: str) -> None:
    node(tmp_path, layout, os.getpid())
    with pytest.raises(Final, match="unknown_pod"):
        find_pod(tmp_path, other)


def test_a_threaded_cgroup_whose_processes_cannot_be_read_hides_nobody_else(tmp_path: Path) -> None:
    """cgroup v2 answers EOPNOTSUPP for `cgroup.procs` of a threaded one."""
    node(tmp_path, LAYOUTS["v2-systemd"], os.getpid())
    threaded = (tmp_path / LAYOUTS["v2-systemd"]).parent / "threaded"
    threaded.mkdir()
    (threaded / "cgroup.procs").mkdir()  # reading it is an OSError, too
    pod = find_pod(tmp_path, UID)
    pod.close()
    assert pod.pids() == {os.getpid()}
