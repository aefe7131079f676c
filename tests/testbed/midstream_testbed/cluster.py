"""A Kubernetes control plane of one's own: etcd, kube-apiserver, controller-manager and scheduler, ready in seconds.

They run in a network namespace of their own, on their usual ports, so that several control planes live beside each
other: a client of a Vpc whose hosts shall be nodes (`ControlPlane(vpc=vpc)`), or one that nothing else is in. The
machine's own namespace reaches the API server through a relay on a loopback port (see relay.py): that is what the
kubeconfig files say. `inside(config)` is the same for processes that run in the testbed.

    with ControlPlane() as plane:
        plane.kubectl("apply", "-f", "-", input=manifest)
        operator = subprocess.Popen([...], env={"KUBECONFIG": str(plane.kubeconfig)})

Binaries come from build/kube, which scripts/kube.sh fills. Everything ends with the testbed's prefix, also after a
crash of the process that owns it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from midstream_testbed import kubeconfig, relay, state
from midstream_testbed.certs import Authority, write_key
from midstream_testbed.kubeconfig import API_PORT, KUBERNETES_SERVICE, MASTERS, Commands
from midstream_testbed.namespace import Argument, Namespace, Process
from midstream_testbed.pod_net import bring_up
from midstream_testbed.vpc import Vpc

CHECKOUT = Path(__file__).resolve().parents[3]
BINARIES = CHECKOUT / "build/kube"
LONELY_ADDRESS = "192.0.2.1"  # of a control plane without a Vpc: Kubernetes refuses to advertise a loopback address
READY_PATIENCE_S = 60.0  # 5 s on an idle machine
KUBECTL_PATIENCE_S = 60.0


class ControlPlane:
    """Owner of the four processes, their certificates and kubeconfig files. A context manager; `close` may be called
    again."""

    def __init__(self, vpc: Vpc | None = None, *, binaries: Path = BINARIES) -> None:
        if not (binaries / "kube-apiserver").exists():
            raise FileNotFoundError(f"no Kubernetes binaries in {binaries}: run scripts/kube.sh")
        self.binaries = binaries
        self.closed = False
        self._ends = contextlib.ExitStack()
        self._owner_pid = os.getpid()
        try:
            self.place, self.address, top = self._in_vpc(vpc) if vpc else self._alone()
            self.folder = top / "control-plane"
            self.folder.mkdir()
            self.authority = Authority(self.folder / "pki")
            self.commands = Commands(binaries, self.folder, self.authority, self.address)
            self._start()
        except BaseException:
            self.close()
            raise

    # -- where it runs

    def _in_vpc(self, vpc: Vpc) -> tuple[Namespace, str, Path]:
        client = vpc.client("control-plane", in_vpc=True)
        self._ends.callback(client.delete)
        return client, client.ipv4, vpc.folder

    def _alone(self) -> tuple[Namespace, str, Path]:
        prefix, folder = state.claim()
        self._ends.callback(state.sweep, prefix)
        cgroups = [base / prefix / "control-plane" for base in state.cgroup_bases(("pids",))]
        place = Namespace("control-plane", f"{prefix}-control-plane", cgroups, folder)
        self._ends.callback(place.delete)

        def body(ip: Any) -> None:
            ip.addr("add", index=bring_up(ip, "lo"), address=LONELY_ADDRESS, prefixlen=32)

        place.netlink(body)
        self._watch_owner(place, prefix)
        return place, LONELY_ADDRESS, folder

    def _watch_owner(self, place: Namespace, prefix: str) -> None:
        """A process that sees its stdin end when this one crashes, and then takes away what is left."""
        theirs, ours = os.pipe()
        clean = 'cat >/dev/null; exec "$@"'
        argv = ["/bin/sh", "-c", clean, "sh", sys.executable, "-m", "midstream_testbed", "clean", prefix]
        try:
            place.popen(argv, name="watch", stdin=theirs, env={"PYTHONPATH": str(Path(__file__).parents[1])})
        finally:
            os.close(theirs)
        self._ends.callback(os.close, ours)

    # -- set-up

    def _start(self) -> None:
        self.port = self.reach(API_PORT)
        self._make_certificates()
        self.kubeconfig = self._certificate_config("admin", "midstream-testbed-admin", MASTERS)
        for name in ("kube-controller-manager", "kube-scheduler"):
            self.inside(self._certificate_config(name, f"system:{name}", "system:authenticated"))
        self.processes = {"etcd": self.place.popen(self.commands.etcd(), name="etcd")}
        self.processes["kube-apiserver"] = self.place.popen(self.commands.api_server(), name="kube-apiserver")
        self._wait("the API server", self._is_ready)
        for name, argv in (
            ("kube-controller-manager", self.commands.controller_manager()),
            ("kube-scheduler", self.commands.scheduler()),
        ):
            self.processes[name] = self.place.popen(argv, name=name)
        self._wait_for_account("default")

    def _make_certificates(self) -> None:
        names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
        addresses = ["127.0.0.1", self.address, KUBERNETES_SERVICE]
        self.authority.issue("kube-apiserver", file="apiserver", also=[*names, *addresses])
        self.authority.issue("kube-apiserver-kubelet-client", file="kubelet-client", groups=[MASTERS])
        key = ec.generate_private_key(ec.SECP256R1())
        write_key(self.authority.folder / "service-account.key", key)
        (self.authority.folder / "service-account.pub").write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )

    def _certificate_config(self, file: str, user: str, group: str) -> Path:
        user_files = self.authority.issue(user, file=file, groups=[group])
        return self._write_config(file, kubeconfig.certificate_user(*user_files))

    def _write_config(self, name: str, user: dict[str, str], namespace: str = "default") -> Path:
        path = self.folder / f"{name}.kubeconfig"
        return kubeconfig.write(path, f"https://127.0.0.1:{self.port}", self.authority.ca, user, namespace)

    def _wait(self, what: str, ready: Any) -> None:
        end = time.monotonic() + READY_PATIENCE_S
        while not ready():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode}:\n{process.output()[-4000:]}")
            if time.monotonic() > end:
                logs = "\n".join(process.output()[-2000:] for process in self.processes.values())
                raise TimeoutError(f"{what} is not there after {READY_PATIENCE_S:g} s:\n{logs}")
            time.sleep(0.05)

    def _wait_for_account(self, namespace: str) -> None:
        """Pods are refused until the controller-manager has made the namespace's default account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        self._wait(f"the service account of namespace {namespace}", lambda: self._get(path))

    def _is_ready(self) -> bool:
        return self._get("/readyz") is not None

    def _get(self, path: str) -> bytes | None:
        """Body of a GET as the administrator; None while there is no such thing or no answer."""
        try:
            return self._ask("GET", path, None, "", 5)
        except (OSError, urllib.error.URLError):
            return None

    def _ask(self, method: str, path: str, body: bytes | None, content: str, timeout_s: float) -> bytes:
        context = ssl.create_default_context(cafile=str(self.authority.ca))
        context.load_cert_chain(self.authority.folder / "admin.pem", self.authority.folder / "admin.key")
        headers = {"Content-Type": content} if body is not None else {}
        asked = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", body, headers, method=method)
        with urllib.request.urlopen(asked, context=context, timeout=timeout_s) as answer:
            return bytes(answer.read())

    # -- ways in and out

    def reach(self, port: int, host: str = "127.0.0.1") -> int:
        """A loopback port of the machine that leads to `host`:`port` as seen from the control plane."""
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
            argv = [sys.executable, "-I", relay.__file__, str(listener.fileno()), host, str(port)]
            self.place.popen(argv, name="relay", pass_fds=[listener.fileno()])
            return int(listener.getsockname()[1])

    def expose(self, port: int, host: str = "127.0.0.1") -> int:
        """A port of the control plane's loopback that leads to `host`:`port` of the machine: for a webhook that a
        test serves."""
        with self.place.listen("127.0.0.1") as listener:
            argv = [sys.executable, "-I", relay.__file__, str(listener.fileno()), host, str(port)]
            process = subprocess.Popen(argv, pass_fds=[listener.fileno()], start_new_session=True)
            self._ends.callback(_end, process)
            for folder in self.place.cgroups:
                (folder / "cgroup.procs").write_text(str(process.pid))
            return int(listener.getsockname()[1])

    def inside(self, config: Path) -> Path:
        """The same kubeconfig for a process in the control plane's own namespace or elsewhere in its Vpc."""
        path = config.with_suffix(".inside")
        content = config.read_text(encoding="utf-8").replace(
            f"https://127.0.0.1:{self.port}", f"https://{self.address}:{API_PORT}"
        )
        path.write_text(content, encoding="utf-8")
        path.chmod(0o600)
        return path

    def kubeconfig_for(self, namespace: str, service_account: str) -> Path:
        """What a pod with this service account could do: a token, good for a day. The account must exist."""
        token = self.kubectl("create", "token", "-n", namespace, service_account, "--duration=24h").stdout.strip()
        return self._write_config(f"{namespace}-{service_account}", {"token": token}, namespace)

    def node_kubeconfig(self, name: str) -> Path:
        """A kubelet's: the node authorizer knows it by name and group. For use in the Vpc."""
        return self.inside(self._certificate_config(f"node-{name}", f"system:node:{name}", "system:nodes"))

    # -- what tests do

    def run(
        self,
        tool: str,
        *args: Argument,
        input: str | None = None,
        check: bool = True,
        config: Path | None = None,
        timeout_s: float = KUBECTL_PATIENCE_S,
    ) -> subprocess.CompletedProcess[str]:
        """kubectl, or another tool of the same folder, from the machine, as the administrator or as `config` says."""
        env = {**os.environ, "KUBECONFIG": str(config or self.kubeconfig), "HOME": str(self.folder)}
        argv = [str(self.binaries / tool), *args]
        done = subprocess.run(
            argv, env=env, input=input, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode:
            said = done.stdout + done.stderr
            raise RuntimeError(f"{tool} {' '.join(map(str, args))} exited with {done.returncode}:\n{said}")
        return done

    def kubectl(self, *args: Argument, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("kubectl", *args, **options)

    def request(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        """As the administrator, without a process for each: JSON in, JSON out; urllib's HTTPError for a no."""
        data = None if body is None else json.dumps(body).encode()
        return json.loads(self._ask(method, path, data, content, KUBECTL_PATIENCE_S))

    def apply(self, *objects: dict[str, Any], server_side: bool = False, **options: Any) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": objects}
        how = ["--server-side", "--force-conflicts"] if server_side else []
        self.kubectl("apply", *how, "-f", "-", input=json.dumps(items), **options)

    def get(self, *args: Argument, **options: Any) -> Any:
        """``kubectl get ... -o json``, read."""
        return json.loads(self.kubectl("get", *args, "-o", "json", **options).stdout)

    @contextlib.contextmanager
    def namespace(self, prefix: str = "test") -> Iterator[str]:
        """A namespace of the API for one test."""
        name = f"{prefix}-{secrets.token_hex(3)}"
        self.kubectl("create", "namespace", name)
        self._wait_for_account(name)
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    def audit(self) -> list[dict[str, Any]]:
        """Audit events so far, one a finished request. An event is written when its answer has been: a marker request
        is sent last and waited for."""
        marker = f"/api/v1/namespaces/default/configmaps/audit-{secrets.token_hex(4)}"
        self._get(marker)
        path = self.folder / "audit.log"
        end = time.monotonic() + READY_PATIENCE_S
        while marker not in (text := path.read_text(encoding="utf-8")):
            if time.monotonic() > end:
                raise TimeoutError("the audit log does not come forward")
            time.sleep(0.1)
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    # -- the end

    def __enter__(self) -> ControlPlane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove every file; a forked child that leaves the context is no owner."""
        if self.closed or os.getpid() != self._owner_pid:
            return
        self.closed = True
        self._ends.close()


def _end(process: subprocess.Popen[bytes] | Process) -> None:
    process.kill()
    process.wait()
