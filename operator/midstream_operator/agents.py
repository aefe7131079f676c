"""gRPC to the agents: found by their DaemonSet's pods, recognised by the node's name in their certificate.

An agent's refusal comes as `code: message` in the call's details; it becomes Retryable or Final here, so that the
rest of the operator knows one error tree.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import grpc
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc

from midstream_operator.errors import Final, Retryable
from midstream_operator.settings import Settings
from midstream_operator.view import View

_CODE = re.compile(r"^([a-z][a-z0-9_]*): (.*)$", re.DOTALL)
# An agent that died takes a few seconds to be noticed on an idle stream; TCP alone would take minutes.
_OPTIONS = [
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(slots=True)
class Agents:
    """Channels to agents, one a node, opened when first used and anew when the agent's address changes."""

    settings: Settings
    view: View
    _channels: dict[str, tuple[str, aio.Channel]] = field(default_factory=dict)

    async def close(self) -> None:
        await asyncio.gather(*(channel.close(None) for _, channel in self._channels.values()))
        self._channels.clear()

    async def _stub(self, node: str) -> rpc.AgentAsyncStub:
        agent = self.view.agent(node)
        if agent is None:
            raise Retryable("no_agent", f"no agent on node {node}: does the DaemonSet cover it?")
        known = self._channels.get(node)
        if known is None or known[0] != agent.endpoint:
            if known is not None:
                await known[1].close(None)
            known = agent.endpoint, self._open(node, agent.endpoint)
            self._channels[node] = known
        return rpc.AgentStub(known[1])

    def _open(self, node: str, endpoint: str) -> aio.Channel:
        tls = self.settings.tls
        try:
            files = [p.read_bytes() for p in (tls.ca, tls.key, tls.cert)]
        except OSError as e:
            raise Final(
                "tls_files", f"cannot read the operator's TLS material: {e}; see tls in its configuration"
            ) from e
        options = [*_OPTIONS, ("grpc.ssl_target_name_override", node)]
        return aio.secure_channel(endpoint, grpc.ssl_channel_credentials(*files), options)

    async def _forget(self, node: str) -> None:
        """Certificates may have been renewed on either side: the next call opens a channel anew."""
        known = self._channels.pop(node, None)
        if known is not None:
            await known[1].close(None)

    # -- calls -----------------------------------------------------------------------------------------

    async def describe(self, node: str) -> pb.DescribeReply:
        try:
            stub = await self._stub(node)
            return await stub.Describe(pb.DescribeRequest(), timeout=self.settings.timeouts.agent_reply_s)
        except aio.AioRpcError as e:
            raise await self._said(node, e) from e

    async def doctor(self, node: str, others: Iterable[str] = ()) -> pb.DoctorReply:
        """The node's findings; `others`: nodes to which it tries the tunnel."""
        agents = (self.view.agent(n) for n in others)
        peers = [pb.NodeRef(name=a.node, endpoint=a.endpoint) for a in agents if a is not None]
        try:
            stub = await self._stub(node)
            return await stub.Doctor(pb.DoctorRequest(peers=peers), timeout=self.settings.timeouts.agent_reply_s)
        except aio.AioRpcError as e:
            raise await self._said(node, e) from e

    async def attach(self, node: str, request: pb.AttachAddressRequest) -> None:
        try:
            stub = await self._stub(node)
            await stub.AttachAddress(request, timeout=self.settings.timeouts.agent_reply_s)
        except aio.AioRpcError as e:
            raise await self._said(node, e) from e

    async def detach(self, node: str, request: pb.DetachAddressRequest) -> None:
        try:
            stub = await self._stub(node)
            await stub.DetachAddress(request, timeout=self.settings.timeouts.agent_reply_s)
        except aio.AioRpcError as e:
            raise await self._said(node, e) from e

    async def migrate(self, node: str, request: pb.MigrateRequest) -> AsyncIterator[pb.MigrateEvent]:
        """Start the job or follow it; ends after the event that carries the report."""
        try:
            stub = await self._stub(node)
            async for event in stub.Migrate(request):
                yield event
        except aio.AioRpcError as e:
            raise await self._said(node, e) from e

    async def status(self, node: str, job: str) -> pb.JobReport | None:
        """None: this agent knows no such job."""
        try:
            stub = await self._stub(node)
            reply = await stub.Status(pb.StatusRequest(job_id=job), timeout=self.settings.timeouts.agent_reply_s)
        except aio.AioRpcError as e:
            error = await self._said(node, e)
            if error.code == "unknown_job":
                return None
            raise error from e
        return reply.jobs[0] if reply.jobs else None

    async def abort(self, node: str, job: str) -> tuple[bool, str]:
        try:
            stub = await self._stub(node)
            reply = await stub.Abort(pb.AbortRequest(job_id=job), timeout=self.settings.timeouts.agent_reply_s)
        except aio.AioRpcError as e:
            raise await self._said(node, e) from e
        return reply.accepted, reply.message

    async def declare_gone(self, node: str, request: pb.DeclareGoneRequest) -> pb.DeclareGoneReply:
        """To the source's agent of its target's node, or to the target's of its source's."""
        try:
            stub = await self._stub(node)
            return await stub.DeclareGone(request, timeout=self.settings.timeouts.agent_reply_s)
        except aio.AioRpcError as e:
            raise await self._said(node, e) from e

    async def notices(self, node: str) -> AsyncIterator[pb.Notice]:
        """What the node's instance metadata says of its end: all that stands, then each change."""
        try:
            stub = await self._stub(node)
            async for notice in stub.Notices(pb.NoticesRequest()):
                yield notice
        except aio.AioRpcError as e:
            if e.code() is grpc.StatusCode.UNIMPLEMENTED:  # of an older version: its other calls are sound
                text = f"the agent on {node} tells no notices: it is older than this operator"
                raise Final("agent_tells_no_notices", text) from e
            raise await self._said(node, e) from e

    async def _said(self, node: str, e: aio.AioRpcError) -> Final | Retryable:
        """The agent's own words, or that it does not answer."""
        details = e.details() or ""
        found = _CODE.match(details)
        if e.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED) and found:
            return Final(found[1], found[2])
        if e.code() is grpc.StatusCode.UNAVAILABLE and found and found[1].islower() and "_" in found[1]:
            return Retryable(found[1], found[2])
        await self._forget(node)
        text = f"the agent on {node} does not answer ({e.code().name}: {details[:200]})"
        return Retryable("agent_unreachable", text)
