"""The same commands through the Kubernetes API: `kubectl midstream migrate POD` writes a MigrationJob and follows it.

Whoever may create MigrationJobs may migrate; no certificate and no way to the nodes is needed. The doctor's report
comes from the operator, through the API server's proxy.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from kubernetes.aio import client, config, watch

from midstream_cli.inventory import UsageError
from midstream_cli.progress import Progress

GROUP, VERSION, JOBS, FLOATING_IPS = "midstream.dev", "v1alpha1", "migrationjobs", "floatingips"
ENDED = ("Succeeded", "RolledBack", "Failed", "Aborted")
SERVICE = "midstream-operator:http"
Json = dict[str, Any]
Out = Callable[[str], Any]


class Cluster:
    """One cluster and namespace, as kubeconfig says or the options."""

    def __init__(self, args: argparse.Namespace, namespace: str) -> None:
        self.namespace: str = args.namespace or namespace
        self.operator_namespace: str = args.operator_namespace
        self.objects = client.CustomObjectsApi()
        self.core = client.CoreV1Api()

    @classmethod
    async def connect(cls, args: argparse.Namespace) -> Cluster:
        try:
            await config.load_kube_config(config_file=args.kubeconfig, context=args.context)
            contexts, active = config.list_kube_config_contexts(config_file=args.kubeconfig)
        except (config.ConfigException, OSError) as e:
            raise UsageError(
                f"no cluster: {e}; set KUBECONFIG, or give --inventory for agents without a cluster"
            ) from e
        chosen = next((c for c in contexts if c["name"] == args.context), active)
        return cls(args, chosen["context"].get("namespace") or "default")

    async def close(self) -> None:
        await self.core.api_client.close()
        await self.objects.api_client.close()

    async def job(self, name: str) -> Json:
        try:
            found: Any = await self.objects.get_namespaced_custom_object(GROUP, VERSION, self.namespace, JOBS, name)
        except client.ApiException as e:
            if e.status == 404:
                raise UsageError(f"no MigrationJob {name} in namespace {self.namespace}") from e
            raise
        return dict(found)

    async def follow(self, name: str) -> AsyncIterator[Json]:
        """The job as it is and each time it changes, until it has ended."""
        job = await self.job(name)
        yield job
        if phase_of(job) in ENDED:
            return
        stream = watch.Watch().stream(
            self.objects.list_namespaced_custom_object,
            GROUP,
            VERSION,
            self.namespace,
            JOBS,
            field_selector=f"metadata.name={name}",
            resource_version=job["metadata"]["resourceVersion"],
        )
        async with stream:
            async for event in stream:
                if event["type"] == "DELETED":
                    raise UsageError(f"MigrationJob {name} was deleted: it is aborted if that was still possible")
                yield event["object"]
                if phase_of(event["object"]) in ENDED:
                    return


def phase_of(job: Json) -> str:
    return str((job.get("status") or {}).get("phase", "Pending"))


def job_body(args: argparse.Namespace, now: datetime) -> Json:
    """The MigrationJob that the command's options describe."""
    if args.address:
        raise UsageError("--address is for agents without a cluster: a MigrationJob moves all addresses of its pod")
    if args.to and args.target_pod:
        raise UsageError("give --to NODE or --target-pod POD, not both")
    spec: Json = {"source": {"podName": args.pod}, "switchover": args.switchover.capitalize()}
    spec["kv"] = {"mode": args.kv.capitalize()}
    if args.to:
        spec["target"] = {"nodeName": args.to}
    if args.target_pod:
        spec["target"] = {"podName": args.target_pod}
    if args.deadline_s:
        spec["deadline"] = (now + timedelta(seconds=args.deadline_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
    if args.dry_run:
        spec["dryRun"] = True
    meta = {"name": args.job} if args.job else {"generateName": f"{args.pod[:50].rstrip('.-')}-"}
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "MigrationJob", "metadata": meta, "spec": spec}


async def migrate(cluster: Cluster, args: argparse.Namespace, out: Out) -> int:
    body = job_body(args, datetime.now(UTC))
    job: Any = None
    try:
        job = await cluster.objects.create_namespaced_custom_object(GROUP, VERSION, cluster.namespace, JOBS, body)
    except client.ApiException as e:
        if not (e.status == 409 and args.job):  # the same job again: follow it
            raise
    name = job["metadata"]["name"] if job else args.job
    out(f"migrationjob {cluster.namespace}/{name}")
    if args.no_wait:
        return 0
    return await _follow(cluster, name, args, out)


async def _follow(cluster: Cluster, name: str, args: argparse.Namespace, out: Out) -> int:
    progress = Progress(out, live=sys.stdout.isatty() and out is print)
    try:
        async for job in cluster.follow(name):
            progress.show(job, time.monotonic())
    finally:
        progress.end()
    _print_end(job, out)
    if args.report:
        args.report.write_text(json.dumps(job, indent=2), encoding="utf-8")
    return 0 if phase_of(job) == "Succeeded" else 1


def _print_end(job: Json, out: Out) -> None:
    status = job.get("status") or {}
    reason = status.get("reason", "")
    named = f" ({reason})" if reason not in ("", phase_of(job)) else ""
    out(f"{phase_of(job)}{named}: {status.get('message', '')}")
    counts = status.get("streams")
    if counts:
        why = f" ({', '.join(counts['unmovableReasons'])})" if counts.get("unmovableReasons") else ""
        out(
            f"  streams: {counts['total']} total, {counts['migrated']} migrated, {counts['rolledBack']} rolled back, "
            f"{counts['unmovable']} unmovable{why}, {counts['lost']} lost"
        )


async def status(cluster: Cluster, args: argparse.Namespace, out: Out) -> int:
    if args.job:
        _print_job(await cluster.job(args.job), out)
        return 0
    found: Any
    if args.all_namespaces:
        found = await cluster.objects.list_cluster_custom_object(GROUP, VERSION, JOBS)
    else:
        found = await cluster.objects.list_namespaced_custom_object(GROUP, VERSION, cluster.namespace, JOBS)
    for job in sorted(found["items"], key=lambda j: j["metadata"]["creationTimestamp"]):
        state = job.get("status") or {}
        way = f"{state.get('source', {}).get('nodeName', '?')} -> {state.get('target', {}).get('nodeName', '?')}"
        meta = job["metadata"]
        name = f"{meta['namespace']}/{meta['name']}" if args.all_namespaces else meta["name"]
        why = f"{state.get('reason', '')}: " if state.get("reason", phase_of(job)) != phase_of(job) else ""
        pod = job["spec"]["source"]["podName"]
        out(f"{name:<34} {phase_of(job):<11} {pod:<20} {way}  {why}{state.get('message', '')}".rstrip())
    return 0


def _print_job(job: Json, out: Out) -> None:
    state = job.get("status") or {}
    out(f"{job['metadata']['name']}: {phase_of(job)} {state.get('reason', '')}".rstrip())
    for key in ("message", "plan"):
        if state.get(key):
            out(f"  {key}: {state[key]}")
    for stamp in state.get("phaseTransitionTimestamps", []):
        out(f"  {stamp['time']}  {stamp['phase']}")
    for key in ("streams", "kv", "stall", "timings"):
        if state.get(key):
            out(f"  {key}: {', '.join(f'{k} {v}' for k, v in state[key].items() if v not in ([], ''))}")


async def abort(cluster: Cluster, args: argparse.Namespace, out: Out) -> int:
    """Written into the job; what became of it is its status's to say."""
    job = await cluster.job(args.job)
    if phase_of(job) in ENDED:
        out(f"{args.job} has ended: {phase_of(job)}")
        return 1
    patch = {"spec": {"abort": True}}
    await cluster.objects.patch_namespaced_custom_object(GROUP, VERSION, cluster.namespace, JOBS, args.job, patch)
    async for seen in cluster.follow(args.job):
        job = seen
    _print_end(job, out)
    return 0 if phase_of(job) in ("Aborted", "RolledBack") else 1


async def attach(cluster: Cluster, args: argparse.Namespace, out: Out) -> int:
    raise UsageError("in a cluster the operator brings addresses to pods: make a FloatingIP (examples/floatingip.yaml)")


async def doctor(cluster: Cluster, args: argparse.Namespace, out: Out) -> int:
    findings = await _findings(cluster)
    for f in findings:
        remedy = f"; remedy: {f['remedy']}" if f["remedy"] else ""
        out(f"{f['node'] or 'cluster'}: {f['severity']:<7} {f['check']}: {f['message']}{remedy}")
    if args.bundle:
        await _bundle(cluster, args, findings)
        out(f"bundle: {args.bundle}")
    return 1 if any(f["severity"] == "error" for f in findings) else 0


async def _findings(cluster: Cluster) -> list[Json]:
    """From the operator; that none answers is a finding, too."""
    try:
        data = await _operator(cluster, "doctor")
    except client.ApiException as e:
        remedy = f"is it installed in namespace {cluster.operator_namespace} (--operator-namespace), and running?"
        if e.status == 403:
            remedy = f"you need the right `get services/proxy` in namespace {cluster.operator_namespace}"
        message = f"no report from the operator: {_said(e)}"
        return [{"node": "", "check": "operator", "severity": "error", "message": message, "remedy": remedy}]
    found: list[Json] = json.loads(data)["findings"]
    return found


async def _operator(cluster: Cluster, path: str) -> str:
    """What the operator answers, through the API server's proxy."""
    # read as it is: the client would turn JSON into Python's own notation
    response = await cluster.core.connect_get_namespaced_service_proxy_with_path_without_preload_content(
        SERVICE, cluster.operator_namespace, path
    )
    data: str = (await response.read()).decode()
    if response.status != 200:
        raise client.ApiException(status=response.status, reason=response.reason, body=data)
    return data


async def plan(cluster: Cluster, args: argparse.Namespace, out: Out) -> int:
    """As if the node's notice came now."""
    try:
        out(await _operator(cluster, f"plan/{args.node}/{max(0, args.seconds)}"))
    except client.ApiException as e:
        if e.status == 404 and str(e.body).startswith("unknown_node"):
            raise UsageError(str(e.body)) from e
        raise
    return 0


async def _bundle(cluster: Cluster, args: argparse.Namespace, findings: list[Json]) -> None:
    """What somebody who helps needs to see, as far as the user's rights go; what they do not reach is named in it."""
    where = cluster.operator_namespace
    parts: dict[str, Callable[[], Awaitable[Any]]] = {
        "migrationjobs.json": lambda: cluster.objects.list_cluster_custom_object(GROUP, VERSION, JOBS),
        "floatingips.json": lambda: cluster.objects.list_cluster_custom_object(GROUP, VERSION, FLOATING_IPS),
        "nodes.json": cluster.core.list_node,
        "pods.json": lambda: cluster.core.list_namespaced_pod(where),
        "events.json": lambda: cluster.core.list_namespaced_event(cluster.namespace),
    }
    files: dict[str, str] = {"doctor.json": json.dumps(findings, indent=2)}
    for name, ask in parts.items():
        files[name] = await _told(cluster, ask)
    for pod in json.loads(files["pods.json"]).get("items", []):
        name = pod["metadata"]["name"]
        files[f"logs/{name}.log"] = await _told(cluster, partial(cluster.core.read_namespaced_pod_log, name, where))
    with tarfile.open(args.bundle, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"midstream-doctor/{name}")
            data = text.encode()
            entry.size, entry.mtime = len(data), int(time.time())
            tar.addfile(entry, io.BytesIO(data))


async def _told(cluster: Cluster, ask: Callable[[], Awaitable[Any]]) -> str:
    try:
        answer = await ask()
    except client.ApiException as e:
        return json.dumps({"error": f"{e.status} {e.reason}"})
    if isinstance(answer, str):
        return answer
    return json.dumps(cluster.core.api_client.sanitize_for_serialization(answer), indent=1)


COMMANDS = {
    "migrate": migrate, "attach": attach, "status": status, "plan": plan, "abort": abort, "doctor": doctor,
}  # fmt: skip


async def run(args: argparse.Namespace, out: Out = print) -> int:
    cluster = await Cluster.connect(args)
    try:
        return await COMMANDS[args.command](cluster, args, out)
    except client.ApiException as e:
        raise UsageError(f"the API server refused: {_said(e)}") from e
    finally:
        await cluster.close()


def _said(e: client.ApiException) -> str:
    try:
        return str(json.loads(e.body or "")["message"])
    except (TypeError, ValueError, KeyError):
        return f"{e.status} {e.reason}"
