"""That a pool can be served: its subnet, its zone, and the reservation that keeps strangers out of it.

A released secondary address may be handed out by EC2 to anybody who asks for "one more address" in the subnet. A subnet
CIDR reservation of type `explicit` is never used for that, so an ec2 pool has to be covered by such reservations.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

from midstream_operator.errors import Final
from midstream_operator.providers.ec2_calls import Ec2Calls, Ec2Refusal
from midstream_operator.providers.ec2_inventory import CLUSTER_TAG, Inventory
from midstream_operator.settings import Pool

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


async def check(calls: Ec2Calls, inventory: Inventory, pool: Pool) -> None:
    if not pool.subnet:
        raise Final("no_subnet", f"pool {pool.name}: an ec2 pool names its subnet (pools[].subnet)")
    subnet = await _subnet(calls, pool)
    if pool.zone and pool.zone != subnet["AvailabilityZone"]:
        text = f"pool {pool.name}: {pool.subnet} is in {subnet['AvailabilityZone']}, not in {pool.zone}"
        raise Final("wrong_zone", f"{text}: an address cannot leave its zone")
    blocks = [ipaddress.ip_network(subnet["CidrBlock"])]
    blocks += [ipaddress.ip_network(a["Ipv6CidrBlock"]) for a in subnet.get("Ipv6CidrBlockAssociationSet", [])]
    cidrs = [ipaddress.ip_network(cidr) for cidr in pool.cidrs]
    for cidr in cidrs:
        if not _covered(cidr, blocks):
            text = f"pool {pool.name}: {cidr} is not inside {pool.subnet} ({', '.join(map(str, blocks))})"
            raise Final("pool_outside_subnet", text)
    await _check_reserved(calls, pool, cidrs)
    await _check_strangers(inventory, calls.settings.cluster, pool)


async def _subnet(calls: Ec2Calls, pool: Pool) -> Any:
    try:
        return (await calls.read("describe_subnets", SubnetIds=[pool.subnet]))["Subnets"][0]
    except Ec2Refusal as e:
        raise Final("no_subnet", f"pool {pool.name}: {e.message}") from e


async def _check_reserved(calls: Ec2Calls, pool: Pool, cidrs: Iterable[Network]) -> None:
    answer = await calls.read("get_subnet_cidr_reservations", SubnetId=pool.subnet)
    listed = [*answer["SubnetIpv4CidrReservations"], *answer["SubnetIpv6CidrReservations"]]
    explicit = [ipaddress.ip_network(entry["Cidr"]) for entry in listed if entry["ReservationType"] == "explicit"]
    for cidr in cidrs:
        if _covered(cidr, explicit):
            continue
        if not calls.settings.create_reservations:
            raise Final(
                "no_reservation",
                f"pool {pool.name}: {cidr} is not reserved in {pool.subnet}: EC2 may give its addresses to others. "
                f"Run: aws ec2 create-subnet-cidr-reservation --subnet-id {pool.subnet} --cidr {cidr} "
                "--reservation-type explicit",
            )
        await _reserve(calls, pool, cidr)


async def _reserve(calls: Ec2Calls, pool: Pool, cidr: Network) -> None:
    tags = [{"Key": CLUSTER_TAG, "Value": calls.settings.cluster}]
    await calls.mutate(
        "create_subnet_cidr_reservation",
        SubnetId=pool.subnet,
        Cidr=str(cidr),
        ReservationType="explicit",
        Description=f"midstream: pool {pool.name}",
        TagSpecifications=[{"ResourceType": "subnet-cidr-reservation", "Tags": tags}],
    )


def _covered(cidr: Network, blocks: Iterable[Network]) -> bool:
    return any(
        cidr.version == block.version and cidr.subnet_of(block)  # type: ignore[arg-type]
        for block in blocks
    )


async def _check_strangers(inventory: Inventory, cluster: str, pool: Pool) -> None:
    """Somebody who had an address before the range was reserved keeps it."""
    for holder in await inventory.in_subnet(pool.subnet):
        taken = sorted(address for address in holder.addresses if address in pool)
        if taken and holder.tags.get(CLUSTER_TAG) != cluster:
            raise Final(
                "address_foreign",
                f"pool {pool.name}: {taken[0]} is held by {holder.id}, which is not Midstream's: free it or leave it "
                "out of the pool",
            )
