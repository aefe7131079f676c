"""IMDS as a witness of an address's move: which addresses the cloud says the floating IPs' interface has.

EC2's own listing answers for the account, packets for the path, and this one for the instance: a yes of EC2 that did
not happen shows here as an address that does not come. It may lag behind, so it is asked again, and packets go before.
"""

from __future__ import annotations

from midstream_runtime.contract.errors import MidstreamError

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.imds import Imds
from midstream_agent.settings import ImdsSettings

_KINDS = ("local-ipv4s", "ipv6s")


class AddressWitness:
    """One a node: it keeps IMDS' session token."""

    def __init__(self, settings: ImdsSettings, mac: str) -> None:
        self._imds = Imds(settings) if settings.host else None
        self._mac = mac

    async def ask(self) -> pb.MetadataReply:
        if self._imds is None:
            return pb.MetadataReply(absent="this agent asks no instance metadata: --imds-host is not set")
        try:
            found = [await self._imds.get(f"network/interfaces/macs/{self._mac}/{kind}") for kind in _KINDS]
        except MidstreamError as e:
            return pb.MetadataReply(absent=f"{e.code}: {e.message}")
        if found == [None, None]:
            return pb.MetadataReply(absent=f"IMDS knows no interface {self._mac}")
        return pb.MetadataReply(addresses=sorted({a for text in found if text for a in text.split()}))
