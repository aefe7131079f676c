"""A host of the testbed as a Kubernetes node: a real kubelet and containerd, pods placed by the testbed's CNI plugin.

    with Vpc.create() as vpc, ControlPlane(vpc) as plane:
        node = KubeNode(plane, vpc.host("node-a"), images.prepared(["pause", "agent"]))
        node.wait_ready()

All processes of the host, from then on, share a mount namespace of its own: /var/lib, /var/log, bpffs and the folders
of containers under /run are the node's, at the paths where they are on any node, and what is mounted there goes with
it. Pods' cgroups are below the testbed's, so that the same sweep ends them. Kubernetes' own service is the one cluster
IP that works: a rule of the host leads it to the API server, as kube-proxy would.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from midstream_testbed import images, kernel, state
from midstream_testbed.cluster import ControlPlane
from midstream_testbed.kubeconfig import API_PORT, KUBERNETES_SERVICE
from midstream_testbed.machine import Host
from midstream_testbed.namespace import Argument, Process
from midstream_testbed.vpc import FIRST_POD_BLOCK, SUBNET4, SUBNET6

PAUSE = "localhost/midstream-pause:test"
SOCKET = "/run/containerd/containerd.sock"
CLUSTER_DNS = "10.100.0.10"  # nobody answers there: it keeps the kubelet from warning that it has none
OWN_FOLDERS = ("/var/lib", "/var/log")
OWN_RUN = ("/run/containerd", "/run/netns")
CONTROLLERS = "+cpu +cpuset +io +memory +pids"  # on cgroup v2 a folder says what its children may have
READY_PATIENCE_S = 90.0  # 5 s on an idle machine

_CONTAINERD = f"""
version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "FOLDER/cni/bin"
    conf_dir = "FOLDER/cni/conf"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""

# containerd asks a plugin of this name before ours, which brings lo up itself.
_LOOPBACK = """cat >/dev/null; echo '{"cniVersion": "0.3.1", "ips": []}'"""

_SERVICE_RULES = """
table ip ms_services {{
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    ip daddr {service} tcp dport 443 dnat to {api}
  }}
  chain output {{
    type nat hook output priority -100;
    ip daddr {service} tcp dport 443 dnat to {api}
  }}
}}
"""


class KubeNode:
    """Started when it is made; ends with its host. `store` holds its images, the pause container's among them;
    `may_connect`: namespaces whose pods may begin connections."""

    def __init__(
        self,
        plane: ControlPlane,
        host: Host,
        store: Path,
        *,
        may_connect: tuple[str, ...] = ("midstream-system",),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.plane, self.host = plane, host
        self.folder = host.vpc.folder / f"kube-{host.name}"
        self.folder.mkdir()
        self.disk = state.disk(host.vpc.prefix) / host.name
        host.mntns_fd = kernel.new_mntns(self._own_mounts)
        host.nft(_SERVICE_RULES.format(service=KUBERNETES_SERVICE, api=f"{plane.address}:{API_PORT}"))
        images.link(store, self.disk / "var/lib/containerd")
        self._write_cni(may_connect)
        self._make_cgroups()
        self.containerd = self._start_containerd()
        self.kubelet = self._start_kubelet(labels or {})

    # -- set-up

    def _own_mounts(self) -> None:
        """Runs in the new namespace. Shared, as systemd leaves a node's mounts."""
        for path in OWN_FOLDERS:
            own = self.disk / path.lstrip("/")
            own.mkdir(parents=True)
            kernel.mount(str(own), path, flags=kernel.MS_BIND)
        for path in OWN_RUN:
            Path(path).mkdir(exist_ok=True)
            kernel.mount("tmpfs", path, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
        kernel.mount("bpf", str(state.BPFFS), "bpf", data="mode=700")
        kernel.mount("", "/", flags=kernel.MS_SHARED | kernel.MS_REC)

    def _write_cni(self, may_connect: tuple[str, ...]) -> None:
        offset = (FIRST_POD_BLOCK + self.host.number) * 256
        pods4, pods6 = (ipaddress.ip_network(subnet)[offset] for subnet in (SUBNET4, SUBNET6))
        config = {
            "cniVersion": "0.4.0", "name": "testbed", "type": "midstream-testbed",
            "pods4": f"{pods4}/24", "pods6": f"{pods6}/120", "mtu": self.host.vpc.mtu,
            "state": str(self.folder / "cni/state"), "may_connect": list(may_connect),
        }  # fmt: skip
        for name in ("bin", "conf"):
            (self.folder / "cni" / name).mkdir(parents=True)
        (self.folder / "cni/conf/10-testbed.conf").write_text(json.dumps(config), encoding="utf-8")
        run = f"PYTHONPATH={Path(__file__).parents[1]} exec {sys.executable} -B -m midstream_testbed.cni"
        for plugin, body in (("midstream-testbed", run), ("loopback", _LOOPBACK)):
            path = self.folder / "cni/bin" / plugin
            path.write_text(f"#!/bin/sh\n{body}\n", encoding="ascii")
            path.chmod(0o755)

    @property
    def cgroup(self) -> str:
        """Below each controller's folder; of the testbed's prefix."""
        return f"/{self.host.vpc.prefix}/{self.host.name}"

    def _make_cgroups(self) -> None:
        """The kubelet wants its root in every v1 controller; a new cpuset has no CPUs and takes no process."""
        for base in state.all_cgroup_bases():
            folder = base / self.cgroup.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
            for above, below in ((base, folder.parent), (folder.parent, folder)):
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if (below / name).exists() and not (below / name).read_text().strip():
                        (below / name).write_text((above / name).read_text())
                if (below / "cgroup.subtree_control").exists():
                    (above / "cgroup.subtree_control").write_text(CONTROLLERS)
                    (below / "cgroup.subtree_control").write_text(CONTROLLERS)

    def _start_containerd(self) -> Process:
        config = self.folder / "containerd.toml"
        config.write_text(_CONTAINERD.replace("FOLDER", str(self.folder)), encoding="utf-8")
        process = self.host.popen(["containerd", "--config", config], name="containerd")
        self._wait("containerd", lambda: self.ctr("version", check=False).returncode == 0, process)
        return process

    def _start_kubelet(self, labels: Mapping[str, str]) -> Process:
        name, host, pki = self.host.name, self.host, self.plane.authority
        cert, key = pki.issue(f"system:node:{name}", file=f"kubelet-{name}", also=[name, host.ipv4])
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": str(pki.ca)}},
            "tlsCertFile": str(cert), "tlsPrivateKeyFile": str(key), "failCgroupV1": False, "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.cgroup, "enforceNodeAllocatable": [], "failSwapOn": False, "resolvConf": "",
            "clusterDNS": [CLUSTER_DNS], "evictionHard": {}, "oomScoreAdj": 0, "address": host.ipv4,
            "volumePluginDir": str(self.folder / "plugins"), "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "nodeStatusUpdateFrequency": "2s", "syncFrequency": "5s", "makeIPTablesUtilChains": False,
        }  # fmt: skip
        path = self.folder / "kubelet.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        argv: list[Argument] = [
            self.plane.binaries / "kubelet", f"--config={path}", f"--kubeconfig={self.plane.node_kubeconfig(name)}",
            f"--hostname-override={name}", f"--node-ip={host.ipv4}",
            f"--node-labels={','.join(f'{k}={v}' for k, v in labels.items())}",
        ]  # fmt: skip
        return self.host.popen(argv, name="kubelet")

    # -- what tests do

    def ctr(self, *args: Argument, timeout_s: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """containerd's own command line, in the kubelet's namespace of images and containers."""
        argv = ["ctr", "--address", SOCKET, "--namespace", "k8s.io", *args]
        return self.host.run(argv, timeout_s=timeout_s, check=check)

    def wait_dead(self, pod: Mapping[str, Any]) -> None:
        """Until no container of this pod runs: the API forgets a pod that is deleted by force before it is ended."""
        ids = {status["containerID"].rpartition("/")[2] for status in pod["status"]["containerStatuses"]}

        def ended() -> bool:
            return not ids & set(self.ctr("tasks", "ls", "-q").stdout.split())

        self._wait(f"the end of pod {pod['metadata']['name']}", ended, self.containerd)

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            found: dict[str, Any] = self.plane.get("nodes", f"--field-selector=metadata.name={self.host.name}")
            conditions = [c for node in found["items"] for c in node["status"].get("conditions", [])]
            return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

        self._wait(f"node {self.host.name}", is_ready, self.kubelet)

    def _wait(self, what: str, ready: Callable[[], bool], process: Process) -> None:
        end = time.monotonic() + READY_PATIENCE_S
        while not ready():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{what} is not there ({process.returncode}):\n{process.output()[-6000:]}")
            time.sleep(0.1)
