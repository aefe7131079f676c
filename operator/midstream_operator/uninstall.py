"""`python -m midstream_operator.uninstall`: the chart's hook before `helm uninstall`.

A hold is in the kernel and outlives the agent that made it. Without agents nobody would ever let go of it, and its
clients would wait until they give up. So:

    1  migrations that are under way are waited for; one that does not end in time refuses the uninstall, by name
    2  the operator is scaled to none, so that nothing begins any more
    3  a last look; what began between 1 and 2 gets its operator back, and refuses the uninstall

A job that is Pending has begun nothing and is no reason. Streams that are where they belong need nobody: addresses,
routes and sockets are the nodes' and the pods' own.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence

from midstream_operator.errors import Final, OperatorError
from midstream_operator.kube import Kube, KubeError, as_error, connect, core, ours
from midstream_operator.model import JOBS, Phase, phase_of

PAGE = "500"
NAMED = 10  # jobs in a refusal
POLL_S = 1.0
STOP_S = 60.0  # the operator ends in a second or two; its pod's grace is 30 s
OPERATOR = "app.kubernetes.io/name=midstream,app.kubernetes.io/component=operator"


async def under_way(kube: Kube) -> list[str]:
    """Jobs that have begun and not ended, as a person would look for them."""
    found, token = [], ""
    while True:
        page = await kube.request("GET", ours(JOBS), query=[("limit", PAGE), ("continue", token)])
        for job in page["items"]:
            phase, meta = phase_of(job), job["metadata"]
            if phase is not Phase.PENDING and not phase.ended:
                found.append(f"{meta['namespace']}/{meta['name']} ({phase})")
        token = page["metadata"].get("continue", "")
        if not token:
            return found


async def wait_for_jobs(kube: Kube, seconds: float) -> None:
    end = time.monotonic() + seconds
    while jobs := await under_way(kube):
        if time.monotonic() >= end:
            raise _refusal(jobs)
        await asyncio.sleep(POLL_S)


def _refusal(jobs: Sequence[str]) -> Final:
    named = f"{', '.join(sorted(jobs)[:NAMED])}{' and others' if len(jobs) > NAMED else ''}"
    return Final(
        "migrations_under_way",
        f"not uninstalled: {named} would never end, and clients would hang. Wait for them, or "
        "call them back (kubectl midstream abort JOB), then uninstall again",
    )


async def scale(kube: Kube, namespace: str, replicas: int) -> int:
    """The operator's replicas; how many there were to be before."""
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/midstream-operator/scale"
    before = int((await kube.get(path))["spec"].get("replicas", 0))
    await kube.patch(path, {"spec": {"replicas": replicas}})
    return before


async def wait_for_no_operator(kube: Kube, namespace: str) -> None:
    end = time.monotonic() + STOP_S
    while (await kube.request("GET", core("pods", namespace), query=[("labelSelector", OPERATOR)]))["items"]:
        if time.monotonic() >= end:
            raise Final("operator_stays", f"not uninstalled: the operator's pods did not end within {STOP_S:g} s")
        await asyncio.sleep(POLL_S)


async def allow(kube: Kube, namespace: str, seconds: float) -> None:
    """Final when it must not be uninstalled now."""
    await wait_for_jobs(kube, seconds)
    before = await scale(kube, namespace, 0)
    try:
        await wait_for_no_operator(kube, namespace)
        if jobs := await under_way(kube):
            raise _refusal(jobs)
    except BaseException:
        await scale(kube, namespace, before)
        raise


async def run(namespace: str, seconds: float) -> None:
    kube = await connect()
    try:
        await allow(kube, namespace, seconds)
    except KubeError as e:
        raise as_error(e, "api_unreachable") from e
    finally:
        await kube.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="midstream-uninstall", description="Whether Midstream may be uninstalled now")
    parser.add_argument("--namespace", required=True, help="of the operator")
    parser.add_argument("--seconds", type=float, default=60.0, help="that migrations are waited for")
    args = parser.parse_args(argv)
    try:
        asyncio.run(run(args.namespace, args.seconds))
    except OperatorError as e:
        print(f"{e.code}: {e.message}", file=sys.stderr)
        return 1
    print("no migration is under way, and none begins any more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
