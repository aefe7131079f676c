"""The agent's gRPC server: `Agent` for the operator and the CLI, `Peer` for the other agents."""

from __future__ import annotations

from typing import Any

import grpc
from grpc import aio
from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import __version__, doctor, peer, takeover, tls, tunnel_check
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_agent.jobs import SourceJobs
from midstream_agent.node import Node
from midstream_agent.notices import NoticesMixin
from midstream_agent.survey import survey
from midstream_agent.target_jobs import TargetJobs
from midstream_agent.warm import warm
from midstream_agent.witness import AddressWitness


class AgentService(NoticesMixin, rpc.AgentServicer):
    """What the operator may ask. Errors end the call with their code in the details: `code: message`."""

    def __init__(self, node: Node, jobs: SourceJobs, targets: TargetJobs) -> None:
        self._node = node
        self._jobs = jobs
        self._targets = targets
        self._witness = AddressWitness(node.settings.imds, node.nic.mac.hex(":"))

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:
        await self._admit(context)
        net = self._node.net
        return pb.DescribeReply(
            node=self._node.settings.node,
            version=__version__,
            protocol=peer.PROTOCOL,
            boot_id=self._node.boot_id,
            node_addresses=self._node.settings.node_addresses,
            floating_addresses=sorted(await net.run(net.routed_addresses)),
        )

    async def AttachAddress(self, request: pb.AttachAddressRequest, context: Any) -> pb.AttachAddressReply:
        await self._admit(context)
        try:
            await self._attach(request)
        except (MidstreamError, OSError) as e:
            await _refuse(context, e)
        return pb.AttachAddressReply()

    async def _attach(self, request: pb.AttachAddressRequest) -> None:
        node = self._node
        node.check_epoch(f"address:{request.address}", request.epoch)
        at = await node.attach_pod(request.pod.uid)
        try:
            taken = (await node.net.run(node.net.routed_addresses)).get(request.address)
            if taken is not None and taken != at.link.index:
                raise Final(
                    "address_taken", f"{request.address} leads to another pod of this node: detach it there first"
                )
            node.address_comes_back([request.address])
            await node.plumb(at, request.address, route=True)
            if request.announce:
                node.nic.announce([request.address])
        finally:
            at.close()

    async def DetachAddress(self, request: pb.DetachAddressRequest, context: Any) -> pb.DetachAddressReply:
        await self._admit(context)
        try:
            self._node.check_epoch(f"address:{request.address}", request.epoch)
            at = await self._node.attach_pod(request.pod.uid)
            try:
                await self._node.unplumb(at, request.address)
            finally:
                at.close()
        except (MidstreamError, OSError) as e:
            await _refuse(context, e)
        return pb.DetachAddressReply()

    async def Migrate(self, request: pb.MigrateRequest, context: Any) -> Any:
        await self._admit(context)
        try:
            record = self._jobs.start(request)
        except MidstreamError as e:
            await _refuse(context, e)
            return
        async for event in record.follow():
            yield event

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        await self._admit(context)
        records = self._jobs.records
        if request.job_id and request.job_id not in records:
            await _refuse(context, Final("unknown_job", f"this agent knows no job {request.job_id}"))
        wanted = [request.job_id] if request.job_id else list(records)
        return pb.StatusReply(jobs=[records[job_id].report for job_id in wanted])

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortReply:
        await self._admit(context)
        try:
            accepted, message = self._jobs.abort(request.job_id)
        except MidstreamError as e:
            await _refuse(context, e)
        return pb.AbortReply(accepted=accepted, message=message)

    async def DeclareGone(self, request: pb.DeclareGoneRequest, context: Any) -> pb.DeclareGoneReply:
        await self._admit(context)
        reply = pb.DeclareGoneReply()
        said = (request.job_id, request.node, request.evidence, request.epoch)
        try:
            if request.job_id in self._jobs.records:
                self._jobs.declare_gone(*said)
            else:
                reply = await takeover.take_over(self._targets, *said)
        except (MidstreamError, OSError) as e:
            await _refuse(context, e)
        return reply

    async def Doctor(self, request: pb.DoctorRequest, context: Any) -> pb.DoctorReply:
        await self._admit(context)
        return pb.DoctorReply(findings=await doctor.examine(self._node, request.peers))

    async def Survey(self, request: pb.SurveyRequest, context: Any) -> pb.SurveyReply:
        await self._admit(context)
        try:
            return await survey(self._node, request.pod.uid)
        except (MidstreamError, OSError) as e:
            await _refuse(context, e)
        return pb.SurveyReply()

    async def Warm(self, request: pb.WarmRequest, context: Any) -> pb.WarmReply:
        await self._admit(context)
        try:
            self._node.check_epoch(f"pod:{request.pod.uid}", request.epoch)
            return await warm(self._node, request)
        except (MidstreamError, OSError) as e:
            await _refuse(context, e)
        return pb.WarmReply()

    async def Metadata(self, request: pb.MetadataRequest, context: Any) -> pb.MetadataReply:
        await self._admit(context)
        return await self._witness.ask()

    async def _admit(self, context: Any) -> None:
        names = tls.names_of(context)
        if tls.OPERATOR not in names:
            text = (
                f"not_operator: the caller's certificate is for {sorted(names)}; only {tls.OPERATOR} commands an agent"
            )
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, text)


async def _refuse(context: Any, e: Exception) -> None:
    code = e.code if isinstance(e, MidstreamError) else "os_error"
    status = grpc.StatusCode.UNAVAILABLE if isinstance(e, Retryable) else grpc.StatusCode.FAILED_PRECONDITION
    await context.abort(status, str(e) if isinstance(e, MidstreamError) else f"{code}: {e}")


async def serve(node: Node) -> tuple[aio.Server, SourceJobs, TargetJobs]:
    """Take up unfinished jobs, then listen. A peer may only speak to an agent that knows its journal."""
    jobs, targets = SourceJobs(node), TargetJobs(node)
    tunnel_check.forget_all(node)
    await targets.recover()
    server = aio.server(options=peer.channel_options(node.settings))
    rpc.add_AgentServicer_to_server(AgentService(node, jobs, targets), server)
    service = peer.PeerService(node.settings, node.boot_id, targets.session)
    rpc.add_PeerServicer_to_server(service, server)
    if server.add_secure_port(node.settings.listen, tls.server_credentials(node.settings.tls)) == 0:
        raise Final("listen", f"cannot listen on {node.settings.listen}: is another agent running?")
    await server.start()
    await jobs.recover()
    node.metrics.watch(node.hold, jobs.active)
    if node.settings.metrics_listen:
        node.metrics.serve(node.settings.metrics_listen)
    return server, jobs, targets
