"""A VPC on one machine: hosts as strict as EKS nodes, pods, clients and a network that moves addresses.

    with Vpc.create() as vpc:
        a, b = vpc.host("node-a"), vpc.host("node-b")
        client = vpc.client("client")
        ip = vpc.allocate("10.77.0.100", host=a)
        pod = a.add_pod("llm-0")

What it makes carries one prefix and goes away with the context, also when the process that made it is killed.
README.md beside this package lists what is strict and how.
"""

from midstream_testbed.capture import Capture
from midstream_testbed.fabric import Fabric, FabricError, Move
from midstream_testbed.machine import Client, Eni, Host, Pod
from midstream_testbed.namespace import Namespace, Process
from midstream_testbed.vpc import Vpc

__all__ = [
    "Capture",
    "Client",
    "Eni",
    "Fabric",
    "FabricError",
    "Host",
    "Move",
    "Namespace",
    "Pod",
    "Process",
    "Vpc",
]
