"""The control plane that the tests of this folder stand on is a real one, and nothing of it stays behind."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from midstream_testbed import state
from midstream_testbed.cluster import ControlPlane

RULE = {"rule": "self.oars % 2 == 0", "message": "oars in pairs"}
CRD: dict[str, Any] = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "boats.smoke.midstream.dev"},
    "spec": {
        "group": "smoke.midstream.dev",
        "scope": "Namespaced",
        "names": {"plural": "boats", "singular": "boat", "kind": "Boat"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "properties": {"oars": {"type": "integer"}},
                                "x-kubernetes-validations": [RULE],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def boat(oars: int) -> dict[str, Any]:
    return {"apiVersion": "smoke.midstream.dev/v1", "kind": "Boat", "metadata": {"name": "b"}, "spec": {"oars": oars}}


def test_a_resource_with_a_rule_is_served(plane: ControlPlane, namespace: str) -> None:
    plane.apply(CRD)
    plane.kubectl("wait", "--for=condition=Established", "crd/boats.smoke.midstream.dev", "--timeout=30s")
    plane.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(boat(2)))
    assert plane.get("boats", "b", "-n", namespace)["spec"] == {"oars": 2}
    refused = plane.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(boat(3)), check=False)
    assert refused.returncode and "oars in pairs" in refused.stderr
    plane.kubectl("delete", "crd", "boats.smoke.midstream.dev")


def test_controllers_and_scheduler_work(plane: ControlPlane, namespace: str) -> None:
    plane.kubectl("create", "deployment", "web", "-n", namespace, "--image=none", "--replicas=2")
    unschedulable = "--for=jsonpath={.status.conditions[0].reason}=Unschedulable"
    plane.kubectl("wait", "-n", namespace, "--for=jsonpath={.status.replicas}=2", "deployment/web", "--timeout=30s")
    plane.kubectl("wait", "-n", namespace, unschedulable, "pod", "-l", "app=web", "--timeout=30s")


def test_a_service_account_may_do_what_was_granted_and_the_audit_log_tells(plane: ControlPlane, namespace: str) -> None:
    plane.kubectl("create", "serviceaccount", "-n", namespace, "reader")
    config = plane.kubeconfig_for(namespace, "reader")
    refused = plane.kubectl("get", "configmaps", config=config, check=False)
    assert "forbidden" in refused.stderr
    plane.kubectl("create", "role", "-n", namespace, "reads", "--verb=list", "--resource=configmaps")
    plane.kubectl("create", "rolebinding", "-n", namespace, "r", "--role=reads", f"--serviceaccount={namespace}:reader")
    plane.kubectl("get", "configmaps", config=config)
    user = f"system:serviceaccount:{namespace}:reader"
    codes = [event["responseStatus"]["code"] for event in plane.audit() if event["user"]["username"] == user]
    assert codes[0] == 403 and codes[-1] == 200


def test_a_webhook_that_a_test_serves_is_called(plane: ControlPlane) -> None:
    """The way from the control plane's namespace to a listener of the machine's own."""

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, name="hook", daemon=True).start()
        try:
            port = plane.expose(server.server_address[1])
            done = plane.place.run(["curl", "-s", "-w", "%{http_code}", f"http://127.0.0.1:{port}/"])
            assert done.stdout == "204"
        finally:
            server.shutdown()


OWNER = """
import os, sys
from midstream_testbed.cluster import ControlPlane
plane = ControlPlane()
print(plane.folder, *[process.pid for process in plane.processes.values()], flush=True)
sys.stdin.read()
plane.close()
"""


@pytest.mark.parametrize("ending", ["orderly", "killed"])
def test_nothing_stays_when_the_owner_ends(ending: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    folder, *pids = owner.stdout.readline().split()
    assert len(pids) == 4 and all(state.is_running(int(pid)) for pid in pids)
    if ending == "killed":
        owner.send_signal(signal.SIGKILL)
    owner.stdin.close()
    owner.wait(timeout=60)
    owner.stdout.close()
    prefix = Path(folder).parent
    deadline = time.monotonic() + 60
    while prefix.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not prefix.exists()
    assert not any(state.is_running(int(pid)) for pid in pids)
    assert not state.cgroup_trees(prefix.name) and not any(prefix.name in name for name in os.listdir("/run/netns"))
