"""gRPC to the agents: found by their DaemonSet's pods, recognised by the node's name in their certificate.

An agent's refusal comes as `code: message` in the call's details; it becomes Retryable or Final here, so that the
rest of the operator knows one error tree.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc

from midstream_operator.errors import Final, OperatorError, Retryable
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


@dataclass(slots=True, eq=False)
class _Known:
    """One node's channel; its stub is made once, since that costs as much as a call."""

    endpoint: str
    channel: aio.Channel
    stub: rpc.AgentAsyncStub


@dataclass(slots=True)
class Agents:
    """Channels to agents, one a node, opened when first used and anew when the agent's address changes."""

    settings: Settings
    view: View
    _channels: dict[str, _Known] = field(default_factory=dict)

    async def close(self) -> None:
        await asyncio.gather(*(known.channel.close(None) for known in self._channels.values()))
        self._channels.clear()

    async def _of(self, node: str) -> _Known:
        agent = self.view.agent(node)
        if agent is None:
            raise Retryable("no_agent", f"no agent on node {node}: does the DaemonSet cover it?")
        known = self._channels.get(node)
        if known is None or known.endpoint != agent.endpoint:
            channel = self._open(node, agent.endpoint)
            old, known = known, _Known(agent.endpoint, channel, rpc.AgentStub(channel))
            self._channels[node] = known  # before anything is awaited: two calls would open one each
            if old is not None:
                await old.channel.close(None)
        return known

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

    async def _forget(self, node: str, broken: _Known | None) -> None:
        """Certificates may have been renewed on either side: the next call opens a channel anew. One that another call
        has opened meanwhile is left alone, with the calls that it carries."""
        if broken is not None and self._channels.get(node) is broken:
            del self._channels[node]
            await broken.channel.close(None)

    # -- calls -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _asking(self, node: str) -> AsyncIterator[rpc.AgentAsyncStub]:
        """Whatever goes wrong with the call becomes Retryable or Final.

        Calls to a node share its channel. The one that finds it broken closes it, and the others are cancelled by
        that: to them it is an agent that does not answer, and not the end of their own task.
        """
        known = None
        try:
            known = await self._of(node)
            yield known.stub
        except aio.AioRpcError as e:
            raise await self._said(node, known, e) from e
        except asyncio.CancelledError as e:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            text = f"the connection to the agent on {node} was found broken by another call"
            raise Retryable("agent_unreachable", text) from e

    async def describe(self, node: str) -> pb.DescribeReply:
        async with self._asking(node) as stub:
            return await stub.Describe(pb.DescribeRequest(), timeout=self.settings.timeouts.agent_reply_s)

    async def doctor(self, node: str, others: Iterable[str] = ()) -> pb.DoctorReply:
        """The node's findings; `others`: nodes to which it tries the tunnel."""
        agents = (self.view.agent(n) for n in others)
        peers = [pb.NodeRef(name=a.node, endpoint=a.endpoint) for a in agents if a is not None]
        async with self._asking(node) as stub:
            return await stub.Doctor(pb.DoctorRequest(peers=peers), timeout=self.settings.timeouts.agent_reply_s)

    async def survey(self, node: str, pod: pb.PodRef, timeout_s: float) -> pb.SurveyReply:
        """What the pod serves now, for the planner."""
        async with self._asking(node) as stub:
            try:
                return await stub.Survey(pb.SurveyRequest(pod=pod), timeout=timeout_s)
            except aio.AioRpcError as e:
                if e.code() is grpc.StatusCode.UNIMPLEMENTED:  # of an older version: its other calls are sound
                    raise Final("agent_surveys_nothing", f"the agent on {node} is older than this operator") from e
                if e.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # no reason to close the channel: a job may run
                    text = f"the agent on {node} did not tell within {timeout_s:g} s"
                    raise Retryable("agent_unreachable", text) from e
                raise

    async def warm(self, node: str, request: pb.WarmRequest) -> pb.WarmReply:
        """KV goes ahead to where the pod may move; as long as it takes. The agent stops when this is cancelled."""
        async with self._asking(node) as stub:
            try:
                return await stub.Warm(request)
            except aio.AioRpcError as e:
                if e.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise Final("agent_warms_nothing", f"the agent on {node} is older than this operator") from e
                raise

    async def sees(self, node: str, addresses: Sequence[str]) -> bool | None:
        """Whether the node's own metadata has these addresses on its interface; None: it says nothing."""
        try:
            async with self._asking(node) as stub:
                reply = await stub.Metadata(pb.MetadataRequest(), timeout=self.settings.timeouts.agent_reply_s)
        except OperatorError:  # also an agent of an older version
            return None
        return None if reply.absent else set(addresses) <= set(reply.addresses)

    async def attach(self, node: str, request: pb.AttachAddressRequest) -> None:
        async with self._asking(node) as stub:
            await stub.AttachAddress(request, timeout=self.settings.timeouts.agent_reply_s)

    async def detach(self, node: str, request: pb.DetachAddressRequest) -> None:
        async with self._asking(node) as stub:
            await stub.DetachAddress(request, timeout=self.settings.timeouts.agent_reply_s)

    async def migrate(self, node: str, request: pb.MigrateRequest) -> AsyncIterator[pb.MigrateEvent]:
        """Start the job or follow it; ends after the event that carries the report."""
        async with self._asking(node) as stub:
            async for event in stub.Migrate(request):
                yield event

    async def status(self, node: str, job: str) -> pb.JobReport | None:
        """None: this agent knows no such job."""
        request = pb.StatusRequest(job_id=job)
        try:
            async with self._asking(node) as stub:
                reply = await stub.Status(request, timeout=self.settings.timeouts.agent_reply_s)
        except Final as e:
            if e.code == "unknown_job":
                return None
            raise
        return reply.jobs[0] if reply.jobs else None

    async def abort(self, node: str, job: str) -> tuple[bool, str]:
        async with self._asking(node) as stub:
            reply = await stub.Abort(pb.AbortRequest(job_id=job), timeout=self.settings.timeouts.agent_reply_s)
        return reply.accepted, reply.message

    async def declare_gone(self, node: str, request: pb.DeclareGoneRequest) -> pb.DeclareGoneReply:
        """To the source's agent of its target's node, or to the target's of its source's."""
        async with self._asking(node) as stub:
            return await stub.DeclareGone(request, timeout=self.settings.timeouts.agent_reply_s)

    async def notices(self, node: str) -> AsyncIterator[pb.Notice]:
        """What the node's instance metadata says of its end: all that stands, then each change."""
        async with self._asking(node) as stub:
            async for notice in self._notices(node, stub):
                yield notice

    async def _notices(self, node: str, stub: rpc.AgentAsyncStub) -> AsyncIterator[pb.Notice]:
        try:
            async for notice in stub.Notices(pb.NoticesRequest()):
                yield notice
        except aio.AioRpcError as e:
            if e.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            # of an older version: its other calls are sound
            text = f"the agent on {node} tells no notices: it is older than this operator"
            raise Final("agent_tells_no_notices", text) from e

    async def _said(self, node: str, known: _Known | None, e: aio.AioRpcError) -> Final | Retryable:
        """The agent's own words, or that it does not answer."""
        details = e.details() or ""
        found = _CODE.match(details)
        if e.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED) and found:
            return Final(found[1], found[2])
        if e.code() is grpc.StatusCode.UNAVAILABLE and found and found[1].islower() and "_" in found[1]:
            return Retryable(found[1], found[2])
        await self._forget(node, known)
        text = f"the agent on {node} does not answer ({e.code().name}: {details[:200]})"
        return Retryable("agent_unreachable", text)
