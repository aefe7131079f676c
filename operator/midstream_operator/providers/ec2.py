"""Floating IPs on EC2: secondary private addresses that AssignPrivateIpAddresses moves between interfaces.

`assign` returns with EC2's yes, which comes seconds before its effect and is at times no yes at all; `confirm` asks
three witnesses: EC2's own listing, the node's IMDS (which may be stale) and packets on the path. IAM cannot condition
on the address, so what keeps us from taking a stranger's is here: an address must be in a pool the operator was
installed with, and whoever holds it must be an interface of this cluster.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream_operator.aws_settings import Ec2Settings
from midstream_operator.errors import Final, OperatorError
from midstream_operator.plan_model import CallBudget
from midstream_operator.providers import ec2_pools
from midstream_operator.providers.base import Place
from midstream_operator.providers.ec2_calls import Ec2Calls, Ec2Refusal
from midstream_operator.providers.ec2_interfaces import Interfaces
from midstream_operator.providers.ec2_inventory import CLUSTER_TAG, Interface, Inventory, instance_id
from midstream_operator.settings import Pool

log = logging.getLogger(__name__)
ASSIGN = "assign_private_ip_addresses"

Witness = Callable[[Sequence[str], Place], Awaitable[bool | None]]  # None: cannot say


@dataclass(slots=True)
class _Batch:
    """Addresses that go to one interface in one call."""

    requests: list[tuple[frozenset[str], asyncio.Future[None]]] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        wanted = frozenset[str]().union(*(addresses for addresses, _ in self.requests))
        return sorted(wanted, key=lambda a: ipaddress.ip_address(a).packed)


class Ec2Provider:
    """AddressProvider and NodeWitness."""

    name = "ec2"
    announces = False  # the VPC's network learns of a move from EC2 alone

    def __init__(
        self,
        settings: Ec2Settings,
        pools: Iterable[Pool] = (),
        *,
        imds: Witness | None = None,
        path: Witness | None = None,
    ) -> None:
        self.settings = settings
        self.calls = Ec2Calls(settings)
        self.inventory = Inventory(self.calls)
        self.interfaces = Interfaces(self.calls, self.inventory)
        self._imds, self._path = imds, path
        self._pools = {pool.name: pool for pool in pools if pool.provider == self.name}
        self._checked: set[str] = set()
        self._checking = asyncio.Lock()
        self._epochs: dict[str, int] = {}
        self._doubted: dict[str, str] = {}  # address -> what the last `confirm` missed
        self._batches: dict[str, _Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.calls.close()

    def budget(self) -> CallBudget:
        """For the planner: moves that EC2 allows us now, and how fast more come."""
        return self.calls.budget(ASSIGN)

    # -- AddressProvider

    async def check(self, pool: Pool) -> None:
        await ec2_pools.check(self.calls, self.inventory, pool)
        self._pools[pool.name] = pool
        self._checked.add(pool.name)

    async def _checked_once(self, pool: Pool) -> None:
        """A thousand that come at once make one check."""
        async with self._checking:
            if pool.name not in self._checked:
                await self.check(pool)

    async def assign(self, addresses: Sequence[str], place: Place, epoch: int) -> None:
        self._admit(addresses, epoch)
        for pool in {pool for pool in map(self._pool, addresses) if pool}:
            await self._checked_once(pool)
        for subnet, chosen in self._by_subnet(addresses).items():
            target = await self.interfaces.of(instance_id(place.provider_id), subnet)
            unsure = self.inventory.unsure
            doubted = unsure | self._doubted.keys()  # a yes that did not happen is asked for once more
            missing = [address for address in chosen if address not in target.addresses or address in doubted]
            if not missing:
                continue
            holders = await self._holders(missing)
            await self._check_limit(target, missing)
            fours = [address for address in missing if ":" not in address]
            if fours:
                await self._in_one_call(target, fours)
            sixes = [address for address in missing if ":" in address]
            if sixes:
                await self._move_ipv6(target, sixes, holders)

    async def confirm(self, addresses: Sequence[str], place: Place, *, proved: bool | None = None) -> bool:
        why = await self._missing(addresses, place, proved)
        for address in addresses:
            self._doubted.pop(address, None)
            if why:
                self._doubted[address] = why
        return not why

    def why_not(self, addresses: Sequence[str]) -> str:
        return "; ".join(sorted({self._doubted[a] for a in addresses if a in self._doubted}))

    async def _missing(self, addresses: Sequence[str], place: Place, proved: bool | None) -> str:
        """The witness that does not say so. Packets have the last word: IMDS may lag behind them for long."""
        instance = instance_id(place.provider_id)
        holders = await self.inventory.holders(addresses)
        if not all(a in holders and holders[a].instance == instance for a in addresses):
            return f"EC2's listing does not have it on {instance}"
        by_path = await self._path(addresses, place) if self._path and proved is None else proved
        if by_path is not None:
            return "" if by_path else "EC2 says that it has moved, and no packet takes the new path"
        by_imds = await self._imds(addresses, place) if self._imds else None
        return "EC2 says that it has moved, and the instance's own metadata does not" if by_imds is False else ""

    async def release(self, addresses: Sequence[str], place: Place, epoch: int) -> None:
        self._admit(addresses, epoch)
        for address, holder in (await self._holders(addresses)).items():
            await self._unassign(holder, [address])
            self._doubted.pop(address, None)

    # -- NodeWitness

    async def gone(self, provider_id: str) -> str:
        """That EC2 does not know the instance proves nothing: it may be another account's, or too new."""
        instance = await self.inventory.instance(instance_id(provider_id))
        return f"ec2:{instance.state}" if instance and instance.state in ("terminated", "stopped") else ""

    # -- what may be taken

    def _admit(self, addresses: Iterable[str], epoch: int) -> None:
        for address in addresses:
            if self._pool(address) is None:
                raise Final("address_not_in_pool", f"{address} is in no ec2 pool of this operator: it is not touched")
            newest = self._epochs.get(address, 0)
            if epoch < newest:
                raise Final(
                    "stale_epoch", f"{address}: epoch {epoch} is older than {newest}: another operator is at work"
                )
        self._epochs.update(dict.fromkeys(addresses, epoch))

    def _pool(self, address: str) -> Pool | None:
        return next((pool for pool in self._pools.values() if address in pool), None)

    def _by_subnet(self, addresses: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for address in addresses:
            pool = self._pool(address)
            assert pool is not None
            found.setdefault(pool.subnet, []).append(address)
        return found

    async def _holders(self, addresses: Iterable[str]) -> dict[str, Interface]:
        """Interfaces of ours that hold the addresses now; a stranger's is an error."""
        wanted = set(addresses)
        ours = (await self.inventory.interfaces()).values()
        sure = wanted - self.inventory.unsure
        found = {address: i for i in ours for address in i.addresses & sure}
        unknown = wanted - set(found)
        for address, holder in (await self.inventory.holders(unknown) if unknown else {}).items():
            if not self._is_ours(holder):
                raise Final(
                    "address_foreign",
                    f"{address} is held by {holder.id}, which is not Midstream's: it is not taken away. Reserve the "
                    "pool in the subnet (type explicit), so that EC2 gives its addresses to nobody else",
                )
            found[address] = holder
        return found

    def _is_ours(self, holder: Interface) -> bool:
        return holder.tags.get(CLUSTER_TAG) == self.settings.cluster

    async def _check_limit(self, target: Interface, missing: Sequence[str]) -> None:
        instance = await self.interfaces.living(target.instance)
        limits = await self.inventory.limits(instance.kind)
        for six, limit in ((False, limits.ipv4 - 1), (True, limits.ipv6)):
            after = {address for address in (*target.addresses, *missing) if (":" in address) is six}
            if len(after) > limit:
                raise Final(
                    "address_limit",
                    f"an interface of {instance.kind} holds {limit} floating {'IPv6' if six else 'IPv4'} addresses, "
                    f"{target.id} would need {len(after)}: choose another target or a larger instance",
                )

    # -- calls

    async def _in_one_call(self, target: Interface, addresses: Sequence[str]) -> None:
        """Join the batch of the interface: whoever comes before its call has its turn shares it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        batch = self._batches.get(target.id)
        if batch is None:
            batch = self._batches[target.id] = _Batch()
            task = asyncio.create_task(self._flush(target.id), name=f"ec2-assign-{target.id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        batch.requests.append((frozenset(addresses), future))
        await future

    async def _flush(self, target: str) -> None:
        """Each request gets its own outcome."""
        batch = self._batches[target]
        try:
            await asyncio.sleep(self.settings.batch_s)
            await self.calls.turn(ASSIGN)
            del self._batches[target]
            await self._assign(target, batch.addresses, has_turn=True)
            outcome: OperatorError | None = None
        except Ec2Refusal as e:
            if len(batch.requests) > 1:  # one of them is at fault, and the others must not suffer for it
                for addresses, future in batch.requests:
                    await self._settle(target, addresses, future)
                return
            outcome = e
        except OperatorError as e:
            outcome = e
        except BaseException:  # the operator ends, or a bug: nobody may wait for ever
            for _, future in batch.requests:
                future.cancel()
            raise
        for _, future in batch.requests:
            _finish(future, outcome)

    async def _settle(self, target: str, addresses: frozenset[str], future: asyncio.Future[None]) -> None:
        try:
            await self._assign(target, sorted(addresses))
        except OperatorError as e:
            _finish(future, e)
        else:
            _finish(future, None)

    async def _assign(self, target: str, addresses: Sequence[str], has_turn: bool = False) -> None:
        try:
            await self.calls.mutate(
                ASSIGN,
                has_turn=has_turn,
                NetworkInterfaceId=target,
                PrivateIpAddresses=list(addresses),
                AllowReassignment=True,
            )
        except Ec2Refusal as e:
            if e.aws_code == "PrivateIpAddressLimitExceeded":
                raise Final("address_limit", f"{target} can hold no more addresses: {e.message}") from e
            raise
        finally:
            self.inventory.moved(addresses)

    async def _move_ipv6(self, target: Interface, addresses: Sequence[str], holders: dict[str, Interface]) -> None:
        """IPv6 has no reassignment: off there, on here. Dead in between, the next try finds it nowhere and goes on."""
        for holder in {holders[a].id: holders[a] for a in addresses if a in holders}.values():
            await self._unassign(holder, [a for a in addresses if a in holder.addresses])
        try:
            await self.calls.mutate(
                "assign_ipv6_addresses", NetworkInterfaceId=target.id, Ipv6Addresses=list(addresses)
            )
        finally:
            self.inventory.moved(addresses)

    async def _unassign(self, holder: Interface, addresses: Sequence[str]) -> None:
        """What is gone already is no error."""
        six = ":" in addresses[0]
        action = "unassign_ipv6_addresses" if six else "unassign_private_ip_addresses"
        which: dict[str, Any] = {"Ipv6Addresses" if six else "PrivateIpAddresses": list(addresses)}
        try:
            await self.calls.mutate(action, NetworkInterfaceId=holder.id, **which)
        except Ec2Refusal as e:
            gone = e.aws_code == "InvalidNetworkInterfaceID.NotFound" or "not assigned" in e.message
            if not gone:
                raise
        finally:
            self.inventory.moved(addresses)


def _finish(future: asyncio.Future[None], error: OperatorError | None) -> None:
    if future.done():  # who asked was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
