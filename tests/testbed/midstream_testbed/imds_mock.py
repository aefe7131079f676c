"""AWS's own mock of the instance metadata service, at 169.254.169.254 of a host's namespace and nowhere else.

amazon-ec2-metadata-mock is what AWS's own handlers are tested with: its paths and bodies are not ours. What it cannot
do is in imds.py: notices that come later or are withdrawn, errors, addresses that move. scripts/kube.sh builds it.
"""

from __future__ import annotations

from pathlib import Path

from midstream_testbed.imds import ADDRESS
from midstream_testbed.machine import Host
from midstream_testbed.namespace import Process

BINARY = Path(__file__).resolve().parents[3] / "build/kube/ec2-metadata-mock"
KNOWN_MAC = "0e:49:61:0f:c3:11"  # the interface that it describes


def start(host: Host, *options: str) -> Process:
    """IMDSv2 only, as EKS sets its nodes up. It ends with the host; wait for its path to answer."""
    if not BINARY.exists():
        raise FileNotFoundError(f"no metadata mock at {BINARY}: run scripts/kube.sh imds")
    host.netlink(lambda ip: ip.addr("add", index=ip.link_lookup(ifname="lo")[0], address=ADDRESS, prefixlen=32))
    argv = [str(BINARY), *options, "--imdsv2", "--hostname", ADDRESS, "--port", "80"]
    return host.popen(argv, env={"HOME": "/nonexistent"}, name="metadata-mock")
