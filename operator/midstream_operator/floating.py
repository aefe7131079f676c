"""FloatingIPs: an address out of a pool, on a serving pod, published for a Service.

    no address            take a free one of the pool; recorded before it is used
    no pod, or its pod    choose a Ready pod that the selector takes, the one with fewest addresses; detach from the
      is gone             old one, assign, attach, confirm; the slice follows
    its pod has a job     hands off: the job moves it, and says `moved`
    the agent has lost    attach again (its node rebooted, or the pod's sandbox was made anew)
      it
    being deleted         detach, release, finalizer off; after a limit also when nobody answers

Every pass starts from what is there, so a pass that was cut off is made good by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from midstream_agent.contract import agent_pb2 as pb

from midstream_operator.context import Context
from midstream_operator.endpoints import endpoint_slice, slice_name
from midstream_operator.errors import Final, NotLeader, OperatorError, Retryable, reason_of
from midstream_operator.events import reference
from midstream_operator.kube import KubeError, core, ours, slices, until_done
from midstream_operator.model import FLOATING_IPS, FipSpec, Json, matches, now, parse_time, version_of
from midstream_operator.providers.base import AddressProvider, Place
from midstream_operator.settings import Pool
from midstream_operator.status import new_condition, with_condition
from midstream_operator.tasks import Tasks
from midstream_operator.view import Pod

log = logging.getLogger(__name__)
FINALIZER = "midstream.dev/address"
INTERFACE = "eth0"
NOT_FOUND = 404
_ROUTES_KEPT_S = 5.0  # an agent's answer serves all addresses of its node


class FloatingIPs:
    """All FloatingIPs of the cluster. Only the leader acts; the others keep the objects ready."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.objects: dict[str, Json] = {}
        self._on: dict[str, set[str]] = {}  # pod uid -> uids of the FloatingIPs on it
        self.busy: set[str] = set()  # uids of pods whose addresses a job is moving
        self._pauses_s: dict[str, float] = {}  # before the next try of one that failed
        self._stranded: dict[str, Json] = {}  # address -> the deleted FloatingIP, whose node never answered
        self._freed: set[str] = set()  # deleted ones whose address has been given back
        self._served: set[str] = set()  # pools that their provider has found to be in order
        self._taken: dict[str, str] = {}  # uid of the FloatingIP -> address, also before it is in the status
        self._locks: dict[str, asyncio.Lock] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._routes: dict[str, tuple[float, frozenset[str]]] = {}
        ctx.view.pod_listeners.append(self._pod_changed)

    # -- what others ask -------------------------------------------------------------------------------

    def on_pod(self, pod_uid: str) -> list[Json]:
        return [self.objects[uid] for uid in self._on.get(pod_uid, ()) if _status(self.objects[uid]).get("address")]

    def addresses_per_pod(self) -> Counter[str]:
        return Counter({pod_uid: len(uids) for pod_uid, uids in self._on.items()})

    def checked_pool(self, obj: Json) -> Pool:
        """The pool of a FloatingIP; Final when the address is not of it: no other address is ever touched."""
        spec = FipSpec.of(obj)
        pool = self._ctx.settings.pool(spec.pool)
        address = _status(obj).get("address")
        if pool.provider != spec.provider:
            raise Final("wrong_provider", f"pool {pool.name} is of provider {pool.provider}, not {spec.provider}")
        if address and address not in pool:
            raise Final("foreign_address", f"{address} is not of pool {pool.name}: it will not be touched")
        return pool

    # -- the objects, as kopf sees them ------------------------------------------------------------------

    def seen(self, obj: Json) -> None:
        uid = obj["metadata"]["uid"]
        if uid in self.objects and version_of(obj) < version_of(self.objects[uid]):
            return  # the watch is behind what we wrote ourselves
        self._put(obj)
        if address := _status(obj).get("address"):
            self._taken[uid] = address
        self._wake(uid)

    def _put(self, obj: Json) -> None:
        """Keep the object, without the field managers' book-keeping, and know it by its pod."""
        uid = obj["metadata"]["uid"]
        obj["metadata"].pop("managedFields", None)
        self._off(uid)
        self.objects[uid] = obj
        if pod_uid := _status(obj).get("podUID"):
            self._on.setdefault(pod_uid, set()).add(uid)

    def _off(self, uid: str) -> None:
        old = _status(self.objects.pop(uid, {})).get("podUID")
        if old in self._on:
            self._on[old].discard(uid)
            if not self._on[old]:
                del self._on[old]

    def gone(self, uid: str) -> None:
        self._off(uid)
        self._taken.pop(uid, None)
        self._locks.pop(uid, None)
        self._freed.discard(uid)
        self._pauses_s.pop(uid, None)

    def _pod_changed(self, pod: Pod) -> None:
        for uid, obj in self.objects.items():
            waits = not _status(obj).get("podUID") and obj["metadata"]["namespace"] == pod.namespace
            if waits or _status(obj).get("podUID") == pod.uid:
                self._wake(uid)

    def wake_pod(self, pod_uid: str) -> None:
        for obj in self.on_pod(pod_uid):
            self._wake(obj["metadata"]["uid"])

    def _wake(self, uid: str) -> None:
        if uid not in self._queued:
            self._queued.add(uid)
            self._queue.put_nowait(uid)

    # -- the leader's loop -------------------------------------------------------------------------------

    async def run(self, workers: int = 8) -> None:
        """While this replica leads."""
        tasks = Tasks()
        for uid in self.objects:
            self._wake(uid)
        for i in range(workers):
            tasks.start(f"floating ips {i}", self._work())
        try:
            while True:
                await asyncio.sleep(self._ctx.settings.timeouts.resync_s)
                self._count()
                await self._take_back()
                for uid in list(self.objects):
                    self._wake(uid)
        finally:
            await tasks.stop()

    async def _work(self) -> None:
        while True:
            uid = await self._queue.get()
            self._queued.discard(uid)
            try:
                async with self._lock(uid):
                    await self._reconcile(uid)
                self._pauses_s.pop(uid, None)
            except (KubeError, OperatorError) as e:
                log.warning("floating ip %s: %s", self._name(uid), e)
                self._wake_later(uid)
            except Exception:
                log.exception("floating ip %s: looked at again at the next pass", self._name(uid))

    def _wake_later(self, uid: str) -> None:
        timeouts = self._ctx.settings.timeouts
        pause_s = min(self._pauses_s.get(uid, timeouts.retry_s / 2) * 2, timeouts.retry_max_s)
        self._pauses_s[uid] = pause_s
        asyncio.get_running_loop().call_later(pause_s, self._wake, uid)

    def _lock(self, uid: str) -> asyncio.Lock:
        return self._locks.setdefault(uid, asyncio.Lock())

    def _name(self, uid: str) -> str:
        return str(self.objects[uid]["metadata"]["name"]) if uid in self.objects else uid

    def _count(self) -> None:
        ready = Counter(_is_ready(o) for o in self.objects.values())
        for state in (True, False):
            self._ctx.metrics.addresses.labels(str(state).lower()).set(ready[state])

    # -- one object --------------------------------------------------------------------------------------

    async def _reconcile(self, uid: str) -> None:
        obj = self.objects.get(uid)
        if obj is None:
            return
        if obj["metadata"].get("deletionTimestamp"):
            await self._delete(obj)
            return
        try:
            await self._establish(obj)
        except NotLeader:
            raise
        except OperatorError as e:
            await self._not_ready(obj, e.code, e.message)
            if isinstance(e, Retryable) and e.code != "no_pod":
                raise

    async def _establish(self, obj: Json) -> None:
        pool, provider = self.checked_pool(obj), self._provider(obj)
        if pool.name not in self._served:
            await provider.check(pool)
            self._served.add(pool.name)
        status = _status(obj)
        if status.get("podUID") in self.busy:
            return
        await self._mark(obj)
        address = status.get("address") or await self._allocate(obj, pool)
        pod = self._ctx.view.pods.get(status.get("podUID", ""))
        if pod is not None and _stays(pod):
            await self._keep(obj, provider, address, pod)
        else:
            await self._bring(obj, pool, provider, address)

    def _provider(self, obj: Json) -> AddressProvider:
        name = FipSpec.of(obj).provider
        if name not in self._ctx.providers:
            raise Final("no_provider", f"the operator runs without provider {name}")
        return self._ctx.providers[name]

    async def _mark(self, obj: Json) -> None:
        """The finalizer, before anything that has to be undone."""
        finalizers = obj["metadata"].get("finalizers") or []
        if FINALIZER not in finalizers:
            await self._set_finalizers(obj, [*finalizers, FINALIZER])

    async def _set_finalizers(self, obj: Json, finalizers: list[str]) -> None:
        """With the resource version, so that somebody else's finalizer is not overwritten."""
        meta = obj["metadata"]
        body = {"metadata": {"finalizers": finalizers, "resourceVersion": meta["resourceVersion"]}}
        done = await self._ctx.kube.patch(ours(FLOATING_IPS, meta["namespace"], meta["name"]), body)
        obj["metadata"] = done["metadata"]

    async def _allocate(self, obj: Json, pool: Pool) -> str:
        uid = obj["metadata"]["uid"]
        taken = {*self._taken.values(), *self._stranded}
        address = self._taken.get(uid) or next((a for a in pool.addresses() if a not in taken), None)
        if address is None:
            raise Final("pool_exhausted", f"all addresses of pool {pool.name} are taken: give it more, or delete some")
        self._taken[uid] = address
        await self._write(obj, {"address": address})
        return address

    async def _keep(self, obj: Json, provider: AddressProvider, address: str, pod: Pod) -> None:
        """Where it is. Attached once more where the agent does not have it."""
        if _is_ready(obj) and address in await self._routed(pod.node):
            return
        await self._attach(obj, provider, address, self._place(pod))

    async def _routed(self, node: str) -> frozenset[str]:
        known = self._routes.get(node)
        if known is None or time.monotonic() - known[0] > _ROUTES_KEPT_S:
            reply = await self._ctx.agents.describe(node)
            known = time.monotonic(), frozenset(reply.floating_addresses)
            self._routes[node] = known
        return known[1]

    async def _bring(self, obj: Json, pool: Pool, provider: AddressProvider, address: str) -> None:
        """To a pod that can serve it."""
        await self._leave(obj, provider, address)
        pod = self._choose(obj, pool)
        await self._attach(obj, provider, address, self._place(pod))

    async def _leave(self, obj: Json, provider: AddressProvider, address: str) -> None:
        """Off the old pod, which is gone or is not ours any more; then nothing in the status names it."""
        status = _status(obj)
        if not status.get("podUID"):
            return
        await self._publish(obj, address, None)
        await self._detach(obj, address)
        await provider.release([address], self._old_place(obj), self._ctx.epoch())
        empty = {"node": None, "pod": None, "podUID": None, "interface": None}
        await self._write(obj, {**empty, "conditions": self._conditions(obj, "False", "no_pod", "its pod is gone")})

    async def _detach(self, obj: Json, address: str) -> None:
        """An agent that knows no such pod has nothing to detach; one whose node is gone neither."""
        status = _status(obj)
        if status["node"] not in self._ctx.view.nodes:
            return
        ref = pb.PodRef(namespace=obj["metadata"]["namespace"], name=status.get("pod", ""), uid=status["podUID"])
        request = pb.DetachAddressRequest(pod=ref, address=address, epoch=self._ctx.epoch())
        try:
            await self._ctx.agents.detach(status["node"], request)
        except Final as e:
            if e.code not in ("unknown_pod", "no_floating_ip"):
                raise
        except Retryable:
            node = self._ctx.view.nodes.get(status["node"])
            if node is not None and node.ready and self._ctx.view.agent(node.name) is not None:
                raise
            log.warning("%s: node %s does not answer and is not Ready: taken as gone", address, status["node"])

    def _choose(self, obj: Json, pool: Pool) -> Pod:
        held = self.addresses_per_pod()
        spec = FipSpec.of(obj)
        pods = [
            p
            for p in self._ctx.view.pods_of(obj["metadata"]["namespace"])
            if matches(spec.selector, p.labels) and self._can_hold(p, pool)
        ]
        if not pods:
            raise Retryable("no_pod", "no Ready pod with the label for migrations, on a node with an agent, matches")
        return min(pods, key=lambda p: (held[p.uid], p.name))

    def _can_hold(self, pod: Pod, pool: Pool) -> bool:
        node, agent = self._ctx.view.nodes.get(pod.node), self._ctx.view.agent(pod.node)
        if node is None or agent is None or not agent.ready or node.leaving:
            return False
        return pod.ready and pod.deletion is None and not pod.host_network and pool.zone in ("", node.zone)

    async def _attach(self, obj: Json, provider: AddressProvider, address: str, place: Place) -> None:
        """Intent into the status, then network, pod, proof; only then it is published."""
        epoch = self._ctx.epoch()
        bound = {"node": place.node, "pod": place.pod, "podUID": place.pod_uid, "interface": INTERFACE, "epoch": epoch}
        said = f"{address} is being brought to {place.pod} on {place.node}"
        await self._write(obj, {**bound, "conditions": self._conditions(obj, "False", "attaching", said)})
        await provider.assign([address], place, epoch)
        ref = pb.PodRef(namespace=place.namespace, name=place.pod, uid=place.pod_uid)
        request = pb.AttachAddressRequest(pod=ref, address=address, epoch=epoch, announce=provider.announces)
        await self._ctx.agents.attach(place.node, request)
        self._routes.pop(place.node, None)
        await self._confirmed(provider, [address], place)
        await self._ready(obj, address, place)

    async def _confirmed(
        self, provider: AddressProvider, addresses: Sequence[str], place: Place, proved: bool | None = None
    ) -> None:
        timeouts = self._ctx.settings.timeouts
        end = time.monotonic() + timeouts.address_confirm_s
        while not await provider.confirm(addresses, place, proved=proved):
            if time.monotonic() > end:
                why = provider.why_not(addresses)
                raise Retryable(
                    "address_not_moved",
                    f"{', '.join(addresses)} did not reach {place.node} within {timeouts.address_confirm_s:g} s"
                    f"{f': {why}' if why else ''}; it is asked for again",
                )
            await asyncio.sleep(timeouts.retry_s)

    async def _ready(self, obj: Json, address: str, place: Place) -> None:
        await self._publish(obj, address, place)
        said = f"{address} leads to {place.pod} on {place.node}"
        await self._write(obj, {"conditions": self._conditions(obj, "True", "ready", said)})
        self._ctx.events.note(reference(obj, "FloatingIP"), "Ready", said)

    async def _not_ready(self, obj: Json, code: str, message: str) -> None:
        conditions = self._conditions(obj, "False", code, message)
        if conditions != _status(obj).get("conditions"):
            log.warning("floating ip %s: %s: %s", obj["metadata"]["name"], code, message)
            self._ctx.events.note(reference(obj, "FloatingIP"), reason_of(code), message, warning=True)
            await self._write(obj, {"conditions": conditions})

    # -- moved by a job ----------------------------------------------------------------------------------

    async def moved(self, uids: Sequence[str], target: Pod, proved: bool | None = None) -> None:
        """A job has moved these FloatingIPs' streams to the target, and its agent has the addresses: let the network
        follow, then status and slice. `proved`: by packets, see AddressProvider.confirm. Raises Retryable until that
        is so; idempotent."""
        for name, objs in self._by_provider(uids).items():
            await self._move(self._ctx.providers[name], objs, self._place(target), proved)

    async def missing(self, uids: Sequence[str], target: Pod, proved: bool | None) -> str:
        """Of addresses that were asked for: what does not say yet that they are at the target; empty: all does. What it
        names is asked for once more by the next `ask`."""
        found = []
        for name, objs in self._by_provider(uids).items():
            provider, addresses = self._ctx.providers[name], [_status(o)["address"] for o in objs]
            if not provider.announces and not await provider.confirm(addresses, self._place(target), proved=proved):
                found.append(provider.why_not(addresses))
        return "; ".join(found)

    async def ask(self, uids: Sequence[str], target: Pod) -> None:
        """The streams of these FloatingIPs are at the target: have a network that hears no announcement begin to move
        their addresses. The agents' own proof of the path waits for it. Idempotent."""
        for name, objs in self._by_provider(uids).items():
            provider = self._ctx.providers[name]
            if not provider.announces:
                addresses = [_status(o)["address"] for o in objs]
                await provider.assign(addresses, self._place(target), self._ctx.epoch())

    def _by_provider(self, uids: Sequence[str]) -> dict[str, list[Json]]:
        found: dict[str, list[Json]] = {}
        for uid in uids:
            if (obj := self.objects.get(uid)) is not None:
                found.setdefault(FipSpec.of(obj).provider, []).append(obj)
        return found

    async def _move(self, provider: AddressProvider, objs: list[Json], place: Place, proved: bool | None) -> None:
        addresses = [_status(o)["address"] for o in objs]
        epoch = self._ctx.epoch()
        await provider.assign(addresses, place, epoch)
        await self._confirmed(provider, addresses, place, proved)
        bound = {"node": place.node, "pod": place.pod, "podUID": place.pod_uid, "interface": INTERFACE, "epoch": epoch}
        for obj, address in zip(objs, addresses, strict=True):
            async with self._lock(obj["metadata"]["uid"]):
                await self._write(obj, bound)
                await self._ready(obj, address, place)

    # -- deletion ----------------------------------------------------------------------------------------

    async def _delete(self, obj: Json) -> None:
        """Address off the pod and back to the pool. What cannot be undone in time is said and left."""
        finalizers = obj["metadata"].get("finalizers") or []
        if FINALIZER not in finalizers or obj["metadata"]["uid"] in self._freed:
            return
        try:
            await self._free(obj)
        except (OperatorError, KubeError) as e:
            since = now() - parse_time(obj["metadata"]["deletionTimestamp"])
            if since < timedelta(seconds=self._ctx.settings.timeouts.address_release_s):
                raise
            text = f"given up after {since.total_seconds():.0f} s: {e}; the address may still be on its node"
            self._ctx.events.note(reference(obj, "FloatingIP"), "NotReleased", text, warning=True)
            log.error("floating ip %s: %s", obj["metadata"]["name"], text)
            if address := _status(obj).get("address"):
                self._stranded[address] = obj
        await self._set_finalizers(obj, [f for f in finalizers if f != FINALIZER])
        # a late event must not have the address detached once more: it may be somebody else's by then
        self._freed.add(obj["metadata"]["uid"])

    async def _take_back(self) -> None:
        """Addresses that were given up while their node was silent: nobody gets one before it is off that node."""
        for address, obj in list(self._stranded.items()):
            try:
                await self._free(obj)
            except (OperatorError, KubeError) as e:
                log.info("%s is still out: %s", address, e)
            else:
                del self._stranded[address]

    async def _free(self, obj: Json) -> None:
        status = _status(obj)
        if status.get("podUID") in self.busy:
            raise Retryable("pod_busy", f"a job is moving {status.get('address')}: released when it has ended")
        address = status.get("address")
        if address and status.get("podUID"):
            pool = self._ctx.settings.pool(FipSpec.of(obj).pool)
            if address not in pool:
                return
            await self._detach(obj, address)
            await self._provider(obj).release([address], self._old_place(obj), self._ctx.epoch())

    # -- writing -----------------------------------------------------------------------------------------

    def _conditions(self, obj: Json, status: str, code: str, message: str) -> list[Json]:
        generation = int(obj["metadata"].get("generation", 1))
        new = new_condition("Ready", status, reason_of(code), message, generation)
        return with_condition(_status(obj).get("conditions") or [], new, now())

    async def _write(self, obj: Json, changes: Json) -> None:
        """Until it is written. The object in hand is brought up to date, whenever the watch tells."""
        meta, timeouts = obj["metadata"], self._ctx.settings.timeouts
        body = {"status": {**changes, "observedGeneration": meta.get("generation", 1)}}
        path = f"{ours(FLOATING_IPS, meta['namespace'], meta['name'])}/status"
        done = await until_done(lambda: self._ctx.kube.patch(path, body), timeouts.retry_s, timeouts.retry_max_s)
        if meta["uid"] in self.objects:
            self._put(done)
        obj["status"], obj["metadata"] = done.get("status", {}), done["metadata"]

    async def _publish(self, obj: Json, address: str, place: Place | None) -> None:
        spec, kube = FipSpec.of(obj), self._ctx.kube
        if not spec.service:
            return
        namespace = obj["metadata"]["namespace"]
        if place is not None:
            await self._check_service(obj, spec)
        wanted = endpoint_slice(obj, spec, address, place)
        try:
            await kube.patch(slices(namespace, slice_name(obj)), wanted)
        except KubeError as e:
            if e.status != NOT_FOUND:
                raise
            if place is not None:
                await kube.create(slices(namespace), wanted)

    async def _check_service(self, obj: Json, spec: FipSpec) -> None:
        """A selector would have Kubernetes publish the pods' own addresses beside, whose streams cannot move."""
        about = reference(obj, "FloatingIP")
        try:
            service = await self._ctx.kube.get(core("services", obj["metadata"]["namespace"], spec.service))
        except KubeError as e:
            if e.status != NOT_FOUND:
                raise
            self._ctx.events.note(about, "NoService", f"there is no Service {spec.service} yet", warning=True)
            return
        if service["spec"].get("selector"):
            text = f"Service {spec.service} has a selector: clients also get pods' own addresses, which cannot move"
            self._ctx.events.note(about, "ServiceHasSelector", text, warning=True)

    def _old_place(self, obj: Json) -> Place:
        """Where the status says that it is; the pod may be gone."""
        status = _status(obj)
        node = self._ctx.view.nodes.get(status["node"])
        provider_id, zone = (node.provider_id, node.zone) if node else ("", "")
        pod = status.get("pod", "")
        return Place(status["node"], provider_id, zone, obj["metadata"]["namespace"], pod, status["podUID"])

    def _place(self, pod: Pod) -> Place:
        node = self._ctx.view.nodes.get(pod.node)
        provider_id, zone = (node.provider_id, node.zone) if node else ("", "")
        return Place(pod.node, provider_id, zone, pod.namespace, pod.name, pod.uid)


def _status(obj: Json) -> Json:
    status: Json = obj.get("status") or {}
    return status


def _is_ready(obj: Json) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in _status(obj).get("conditions") or [])


def _stays(pod: Pod) -> bool:
    """A pod that is being deleted keeps its address until it is gone, unless a job moves it."""
    return pod.phase in ("Running", "Pending")
