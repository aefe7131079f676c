"""The Lease: one replica writes, the other waits with everything loaded.

Losing the Lease is no fence by itself: a process that was stopped for a minute may wake up in mid-request. So every
command to an agent carries an epoch, and agents refuse one that is older than the newest they have seen. Epochs come
from the term that the Lease records: each leader starts above all that its predecessors could have given out, and
above the clock in milliseconds, which is what the CLI uses where there is no operator.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from midstream_operator.kube import Kube, KubeError, leases
from midstream_operator.model import Json
from midstream_operator.settings import Settings

log = logging.getLogger(__name__)
NAME = "midstream-operator"
TERM = "midstream.dev/term"  # annotation: the first epoch of the holder's term
TERM_SIZE = 1 << 20  # epochs that one leader may give out; together they stay below 2^53, exact in JSON
NOT_FOUND, CONFLICT = 404, 409


@dataclass(slots=True)
class Epochs:
    """Numbers of one term, each larger than the last."""

    first: int
    _given: int = 0

    def raise_above(self, seen: int) -> None:
        """Where objects tell of newer epochs than the Lease, it was deleted or restored: go on from there."""
        if seen >= self.first + self._given:
            self.first, self._given = seen + TERM_SIZE, 0

    def next(self) -> int:
        self._given += 1
        if self._given >= TERM_SIZE:
            raise RuntimeError("this term's epochs are used up: the process has to end and another one to take over")
        return self.first + self._given


def next_term(recorded: int, now_ms: int) -> int:
    """Above every epoch of the term before, whatever the clocks say."""
    return max(recorded + TERM_SIZE, now_ms)


@dataclass(slots=True)
class Lease:
    """Takes the Lease, keeps it, says when it is lost. `held` is what every writer asks."""

    kube: Kube  # with connections of its own: a thousand jobs that write must not keep the renewal waiting
    settings: Settings
    epochs: Epochs | None = None
    _observed: tuple[str, float] = ("", 0.0)  # (renewTime as written, when we saw it): clocks may differ
    _renewed: float = field(default=0.0)

    @property
    def held(self) -> bool:
        """False as soon as another replica may hold it, also while this process was stopped."""
        timeouts = self.settings.timeouts
        return self.epochs is not None and time.monotonic() - self._renewed < timeouts.lease_give_up_s

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Wait for the Lease, then run `lead` until it ends or the Lease is lost (then this returns)."""
        timeouts = self.settings.timeouts
        while not await self._try():  # noqa: ASYNC110  # what it waits for happens elsewhere
            await asyncio.sleep(timeouts.lease_renew_s)
        log.info("%s leads, with epochs from %s", self.settings.identity, self.epochs.first if self.epochs else 0)
        work = asyncio.ensure_future(lead())
        try:
            while self.held and not work.done():
                await asyncio.wait({work}, timeout=timeouts.lease_renew_s)
                await self._try()
            if work.done():
                work.result()
            else:
                log.error("the Lease is lost: another replica may lead")
        finally:
            self.epochs = None
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def release(self) -> None:
        """Give it up at a graceful end, so that the other replica need not wait."""
        path = leases(self.settings.namespace, NAME)
        try:
            found = await self.kube.get(path)
            if found["spec"].get("holderIdentity") == self.settings.identity:
                found["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self.kube.replace(path, found)
        except KubeError as e:
            log.warning("the Lease could not be released: %s", e)

    async def _try(self) -> bool:
        """One attempt to take or renew it; whether it is ours."""
        began = time.monotonic()
        path = leases(self.settings.namespace, NAME)
        try:
            try:
                found = await self.kube.request("GET", path, timeout_s=self._patience_s)
            except KubeError as e:
                if e.status != NOT_FOUND:
                    raise
                found = None
            if found is not None and not self._ours(found) and not self._expired(found):
                self.epochs = None
                return False
            await self._write(path, found)
        except KubeError as e:
            if e.status != CONFLICT:
                log.warning("the Lease could not be renewed: %s", e)
            return self.held
        self._renewed = began
        return True

    @property
    def _patience_s(self) -> float:
        """With one request: a lost one leaves time for another try."""
        return self.settings.timeouts.lease_give_up_s / 3

    def _ours(self, found: Json) -> bool:
        return self.epochs is not None and found["spec"].get("holderIdentity") == self.settings.identity

    def _expired(self, found: Json) -> bool:
        """By our own clock since we saw it change, as other clocks may be wrong."""
        spec = found["spec"]
        if not spec.get("holderIdentity"):
            return True
        renewed = str(spec.get("renewTime", ""))
        if self._observed[0] != renewed:
            self._observed = renewed, time.monotonic()
            return False
        return time.monotonic() - self._observed[1] > float(spec.get("leaseDurationSeconds", 0))

    async def _write(self, path: str, found: Json | None) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec: Json = dict(found["spec"]) if found else {}
        meta: Json = dict(found["metadata"]) if found else {"name": NAME, "namespace": self.settings.namespace}
        epochs = self.epochs
        if epochs is None:
            recorded = int((meta.get("annotations") or {}).get(TERM, 0))
            epochs = Epochs(next_term(recorded, time.time_ns() // 1_000_000))
            transitions = int(spec.get("leaseTransitions", 0)) + 1 if found else 0
            spec |= {"acquireTime": now, "leaseTransitions": transitions}
        spec |= {
            "holderIdentity": self.settings.identity,
            "leaseDurationSeconds": int(self.settings.timeouts.lease_s),
            "renewTime": now,
        }
        meta["annotations"] = {**(meta.get("annotations") or {}), TERM: str(epochs.first)}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
        # with the resource version that was read: of two that try at once, one gets a conflict
        method, where = ("PUT", path) if found else ("POST", leases(self.settings.namespace))
        await self.kube.request(method, where, body, timeout_s=self._patience_s)
        self.epochs = epochs
