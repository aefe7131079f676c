"""A CNI plugin that places a kubelet's pods as the testbed places its own: as the VPC CNI does, as strict as EKS.

containerd runs it in the host's network namespace with CNI's environment and the configuration on stdin (version
0.4.0 of the specification). Addresses are counted up in a folder of the node and never given out twice. Pods of the
namespaces in `may_connect` are left out of the policy that drops what a pod begins.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute  # type: ignore[import-untyped,unused-ignore]

from midstream_testbed import kernel, pod_net
from midstream_testbed.pod_net import PodWire

FIRST = 64  # of a node's pod numbers; the testbed's own pods have those below


def wire_of(config: dict[str, Any], number: int, container: str) -> PodWire:
    """`pods4` and `pods6` are the node's ranges."""
    ipv4, ipv6 = (str(ipaddress.ip_network(config[key])[number]) for key in ("pods4", "pods6"))
    return PodWire(f"eni{hashlib.sha1(container.encode()).hexdigest()[:11]}", ipv4, ipv6, number, config["mtu"])


def take_number(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "next").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = int(file.read() or FIRST)
        file.truncate(0)
        file.write(str(number + 1))
    return number


def add(config: dict[str, Any], container: str, netns: str, namespace: str) -> dict[str, Any]:
    folder = Path(config["state"])
    number = take_number(folder)
    wire = wire_of(config, number, container)
    (folder / container).write_text(str(number))
    pod = os.open(netns, os.O_RDONLY)

    def inside() -> None:
        with IPRoute() as ip:
            pod_net.plumb_pod_side(ip, wire, mac)

    try:
        with IPRoute() as ip:
            mac = pod_net.plumb_host_side(ip, wire, pod)
        kernel.in_namespaces(inside, pod)
    finally:
        os.close(pod)
    if namespace in config["may_connect"]:
        rule = f"add element inet ms_strict may_connect {{ {wire.host_ifname} }}"
        subprocess.run(["nft", rule], check=True, stdout=sys.stderr)
    ips = [{"version": "4", "address": f"{wire.ipv4}/32"}, {"version": "6", "address": f"{wire.ipv6}/128"}]
    return {"cniVersion": "0.4.0", "interfaces": [], "ips": ips, "dns": {}}


def delete(config: dict[str, Any], container: str) -> None:
    """May be called again, and for what was never added."""
    noted = Path(config["state"], container)
    if noted.exists():
        with IPRoute() as ip:
            pod_net.unplumb(ip, wire_of(config, int(noted.read_text()), container))
        noted.unlink()


def main() -> None:
    command, container = os.environ["CNI_COMMAND"], os.environ.get("CNI_CONTAINERID", "")
    if command == "VERSION":
        print(json.dumps({"cniVersion": "0.4.0", "supportedVersions": ["0.3.1", "0.4.0"]}))
        return
    config = json.load(sys.stdin)
    pairs = dict(pair.partition("=")[::2] for pair in os.environ.get("CNI_ARGS", "").split(";"))
    if command == "ADD":
        print(json.dumps(add(config, container, os.environ["CNI_NETNS"], pairs.get("K8S_POD_NAMESPACE", ""))))
    elif command == "DEL":
        delete(config, container)


if __name__ == "__main__":
    main()
