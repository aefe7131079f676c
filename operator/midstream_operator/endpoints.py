"""The EndpointSlice of a FloatingIP, for a Service without a selector. A pure function.

What consumers want of it (facts from their sources): the AWS load balancer controller skips endpoints without a
targetRef, or whose pod is gone, so both change in one update, before the source pod goes; topology-aware routing
wants nodeName and zone; and an endpoint that is not ready for a moment makes a load balancer cut its connections,
so it is ready throughout a migration.
"""

from __future__ import annotations

import ipaddress

from midstream_operator.model import API_VERSION, FipSpec, Json
from midstream_operator.providers.base import Place

MANAGER = "midstream.dev"


def slice_name(fip: Json) -> str:
    return f"midstream-{fip['metadata']['name']}"


def endpoint_slice(fip: Json, spec: FipSpec, address: str, place: Place | None) -> Json:
    """With no place it has no endpoints: the address leads nowhere."""
    meta = fip["metadata"]
    family = ipaddress.ip_address(address).version
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": slice_name(fip),
            "namespace": meta["namespace"],
            "labels": {
                "kubernetes.io/service-name": spec.service,
                "endpointslice.kubernetes.io/managed-by": MANAGER,
            },
            "ownerReferences": [
                {"apiVersion": API_VERSION, "kind": "FloatingIP", "name": meta["name"], "uid": meta["uid"]}
            ],
        },
        "addressType": f"IPv{family}",
        "ports": [{"name": name, "port": port, "protocol": "TCP"} for name, port in spec.ports],
        "endpoints": [_endpoint(address, place)] if place else [],
    }


def _endpoint(address: str, place: Place) -> Json:
    endpoint: Json = {
        "addresses": [address],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": place.node,
        "targetRef": {"kind": "Pod", "namespace": place.namespace, "name": place.pod, "uid": place.pod_uid},
    }
    return {**endpoint, "zone": place.zone} if place.zone else endpoint
