"""kopf: the watch of our own two kinds. Handlers only keep the objects and wake who looks after them.

They are event handlers: those put neither finalizers nor annotations on anything, so both replicas run them and the
one without the Lease has everything loaded when it takes over. kopf's own delays are all set here, and so is that it
keeps no state of its own: what it would compare for handlers of changes, of which there are none, took more time than
a whole job (`NoEssence`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import kopf

from midstream_operator.floating import FloatingIPs
from midstream_operator.jobs import Jobs
from midstream_operator.kube import in_cluster, server_address
from midstream_operator.model import FLOATING_IPS, GROUP, JOBS, VERSION
from midstream_operator.settings import Timeouts


class NoEssence(kopf.DiffBaseStorage):
    """kopf works out at each event what has changed since the last one, also where no handler asks for it: four copies
    of the object, 1 ms. Nothing has, and nothing is stored."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("no handler of changes is registered")


class NoProgress(kopf.ProgressStorage):
    """Of handlers that are to be tried again; event handlers are not."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("no handler of changes is registered")

    purge = touch = store

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def registry(jobs: Jobs, fips: FloatingIPs) -> kopf.OperatorRegistry:
    found = kopf.OperatorRegistry()

    @kopf.on.login(registry=found)
    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        """The same cluster as the client's: see kube.connect. By address, as kopf's own choice of a name would make
        the operator wait for the cluster's DNS."""
        if not in_cluster():
            return kopf.login_with_kubeconfig(**kwargs)
        account = kopf.login_with_service_account(**kwargs)
        return replace(account, server=server_address()) if account else None

    @kopf.on.event(GROUP, VERSION, JOBS, registry=found)
    async def job(event: Any, **_: Any) -> None:
        _hand_over(jobs, event)

    @kopf.on.event(GROUP, VERSION, FLOATING_IPS, registry=found)
    async def floating_ip(event: Any, **_: Any) -> None:
        _hand_over(fips, event)

    return found


def _hand_over(keeper: Jobs | FloatingIPs, event: Any) -> None:
    obj = dict(event["object"])
    if event["type"] == "DELETED":
        keeper.gone(obj["metadata"]["uid"])
    else:
        keeper.seen(obj)


def settings(timeouts: Timeouts) -> kopf.OperatorSettings:
    found = kopf.OperatorSettings()
    found.posting.enabled = False  # Events are ours (events.py)
    found.scanning.disabled = True  # the CRDs are there before the operator: the chart installs them
    found.peering.standalone = True  # the Lease decides who writes
    found.watching.server_timeout = timeouts.watch_s
    found.watching.client_timeout = timeouts.watch_s + 30
    found.watching.connect_timeout = timeouts.agent_reply_s
    found.watching.inactivity_timeout = timeouts.watch_s + 30
    found.watching.reconnect_backoff = timeouts.retry_s
    found.watching.chunk_size = 500
    found.queueing.worker_limit = 200
    found.queueing.idle_timeout = 1.0
    found.queueing.exit_timeout = 1.0
    found.networking.request_timeout = 30.0
    found.networking.connect_timeout = 5.0
    found.networking.error_backoffs = (0.2, 0.5, 1, 2, 5)
    found.execution.default_backoff = timeouts.retry_s
    found.process.ultimate_exiting_timeout = 10.0
    found.persistence.finalizer = "midstream.dev/kopf"
    found.persistence.diffbase_storage = NoEssence()
    found.persistence.progress_storage = NoProgress()
    return found
