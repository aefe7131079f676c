"""The session between two agents: one a job, opened by the source before anything is frozen.

A job's further batches are jobs of their own, which may use one session in turn: each begins with a hello.

Strictly one request, one reply. A broken session is not a decision: the source opens another one and says
again what it had to say; requests are idempotent at the target by job and by what its journal holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from grpc import aio
from midstream_runtime.contract.errors import Final, MidstreamError, Retryable, error_from

from midstream_agent import failpoints, tls
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_agent.settings import Settings

PROTOCOL, MIN_PROTOCOL = 2, 2  # 2: KV in streams of its own, before the pause
EOF = aio.EOF  # type: ignore[attr-defined]  # grpc-stubs do not know it
log = logging.getLogger(__name__)
_BROKEN = (TimeoutError, aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError)


def channel_options(settings: Settings) -> list[tuple[str, Any]]:
    size = settings.limits.message_bytes
    return [
        ("grpc.max_send_message_length", size),
        ("grpc.max_receive_message_length", size),
        ("grpc.keepalive_time_ms", 5000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),  # a server's patience with pings
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),
    ]


class PeerSession:
    """The source's end. Not safe for concurrent requests; the saga is sequential."""

    def __init__(self, settings: Settings, node: str, endpoint: str, job_id: str, epoch: int, boot_id: str) -> None:
        self._settings = settings
        self.node = node
        self.endpoint = endpoint
        self._hello = pb.PeerHello(
            protocol=PROTOCOL,
            min_protocol=MIN_PROTOCOL,
            node=settings.node,
            boot_id=boot_id,
            job_id=job_id,
            epoch=epoch,
        )
        self._channel: aio.Channel | None = None
        self._call: Any = None
        self._next_id = 0
        self._asked: list[str] = []
        self.boot_id = ""
        self.was_boot_id = ""  # of the first session: another one later proves that the node is gone

    async def open(self) -> None:
        """Connect and greet; Final when the node is another one or speaks another protocol."""
        await self.close()
        options = [*channel_options(self._settings), ("grpc.ssl_target_name_override", self.node)]
        self._channel = aio.secure_channel(self.endpoint, tls.channel_credentials(self._settings.tls), options)
        self._call = rpc.PeerStub(self._channel).Session()  # type: ignore[call-arg]  # the stubs lack the writing form
        await self.post(pb.PeerRequest(hello=self._hello))
        reply = await self.answer(self._settings.timeouts.peer_connect_s)
        hello = reply.hello
        if hello.protocol < MIN_PROTOCOL or hello.min_protocol > PROTOCOL:
            raise Final(
                "peer_protocol",
                f"agent on {self.node} speaks protocol {hello.min_protocol}..{hello.protocol}, this one "
                f"{MIN_PROTOCOL}..{PROTOCOL}: upgrade the older one first",
            )
        if hello.node != self.node:
            raise Final(
                "peer_wrong_node", f"{self.endpoint} is node {hello.node}, not {self.node}: check the inventory"
            )
        self.boot_id = hello.boot_id
        self.was_boot_id = self.was_boot_id or hello.boot_id

    async def rename(self, job_id: str) -> None:
        """Use this session for another job; opens it again if it is broken."""
        self._hello.job_id = job_id
        if self._call is None:
            return await self.open()
        await self._drain(None)
        await self.post(pb.PeerRequest(hello=self._hello))
        await self.answer(self._settings.timeouts.peer_connect_s)

    @property
    def rebooted(self) -> bool:
        return bool(self.was_boot_id) and self.boot_id != self.was_boot_id

    async def ask(self, request: pb.PeerRequest, timeout_s: float | None = None) -> pb.PeerReply:
        """Send one request and return its reply; what the peer refuses is raised as it said it."""
        if self._call is None:
            await self.open()
        await self._drain(timeout_s)
        await self.post(request)
        return await self.answer(timeout_s)

    async def _drain(self, timeout_s: float | None) -> None:
        """Answers that nobody fetched, since something failed between asking and fetching."""
        while self._asked:
            what = self._asked[0]
            try:
                await self.answer(timeout_s)
            except Final as e:
                log.info("%s of %s was refused, and is not wanted any more: %s", what, self.node, e)

    async def post(self, request: pb.PeerRequest) -> None:
        """Send a request whose answer is fetched later: answers come in the order of the requests, and the peer
        begins no request before the one before it has ended. Saves a round trip while clients wait."""
        if self._call is None:
            raise Retryable("peer_unreachable", f"the session with {self.node} broke before it was asked")
        self._next_id += 1
        request.id = self._next_id
        self._asked.append(str(request.WhichOneof("body")))
        try:
            async with asyncio.timeout(self._settings.timeouts.peer_reply_s):
                await self._call.write(request)
        except _BROKEN as e:
            await self._give_up(e)

    async def answer(self, timeout_s: float | None = None) -> pb.PeerReply:
        """The reply to the oldest request that was posted."""
        if self._call is None or not self._asked:
            raise Retryable("peer_unreachable", f"the session with {self.node} broke before it answered")
        what = self._asked.pop(0)
        try:
            async with asyncio.timeout(timeout_s or self._settings.timeouts.peer_reply_s):
                reply = await self._call.read()
        except _BROKEN as e:
            await self._give_up(e, what)
        if reply is EOF:
            status = await self._call.code(), await self._call.details()
            await self.close()
            raise Retryable("peer_unreachable", f"agent on {self.node} ended the session: {status[0]} {status[1]}")
        if reply.WhichOneof("body") == "error":
            error = reply.error
            raise error_from({"code": error.code, "message": error.message, "retryable": error.retryable})
        return reply  # type: ignore[no-any-return]

    async def _give_up(self, e: Exception, what: str = "a request") -> NoReturn:
        await self.close()
        if isinstance(e, TimeoutError):
            raise Retryable("peer_timeout", f"agent on {self.node} did not answer {what} in time") from e
        raise Retryable("peer_unreachable", f"agent on {self.node} ({self.endpoint}): {_details(e)}") from e

    async def close(self) -> None:
        self._asked = []
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None

    async def insist(
        self, request: pb.PeerRequest, gone: Callable[[], bool], retrying: Callable[[str], None]
    ) -> pb.PeerReply | None:
        """Ask again until an answer comes; None once the peer's node is proven gone. `retrying` hears why.

        Silence is no proof. Only an answer, another boot id, or the operator's word ends this loop.
        """
        pause_s = self._settings.timeouts.retry_s
        while True:
            if gone():
                return None
            try:
                if self._call is None:
                    await self.open()
                if self.rebooted:
                    return None
                return await self.ask(request)
            except Retryable as e:
                retrying(str(e))
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, self._settings.timeouts.retry_max_s)


class PeerService(rpc.PeerServicer):
    """The target's end: each session is served by a `handler` made for its hello."""

    def __init__(
        self, settings: Settings, boot_id: str, handlers: Callable[[pb.PeerHello], Awaitable[Handler]]
    ) -> None:
        self._settings = settings
        self._boot_id = boot_id
        self._handlers = handlers

    async def Session(self, requests: Any, context: Any) -> Any:
        handler: Handler | None = None
        try:
            async for request in requests:
                reply = pb.PeerReply(id=request.id)
                try:
                    if request.WhichOneof("body") == "hello":
                        _check_caller(context, request.hello)
                        if handler is not None:
                            handler.session_ended()
                            handler = None
                        handler = await self._greet(request.hello, reply)
                    elif handler is None:
                        raise Final("peer_protocol", "a session begins with hello")
                    else:
                        await handler.handle(request, reply)
                except MidstreamError as e:
                    reply = _error_reply(request.id, e)
                await failpoints.point(f"target.reply.{request.WhichOneof('body')}")
                yield reply
        finally:
            if handler is not None:
                handler.session_ended()

    async def _greet(self, hello: pb.PeerHello, reply: pb.PeerReply) -> Handler:
        if hello.protocol < MIN_PROTOCOL or hello.min_protocol > PROTOCOL:
            raise Final(
                "peer_protocol",
                f"agent on {hello.node} speaks protocol {hello.min_protocol}..{hello.protocol}, this one "
                f"{MIN_PROTOCOL}..{PROTOCOL}: upgrade the older one first",
            )
        handler = await self._handlers(hello)
        reply.hello.CopyFrom(
            pb.PeerHelloReply(
                protocol=PROTOCOL, min_protocol=MIN_PROTOCOL, node=self._settings.node, boot_id=self._boot_id
            )
        )
        return handler


class Handler:
    """What serves one session; target.TargetSession is the real one."""

    async def handle(self, request: pb.PeerRequest, reply: pb.PeerReply) -> None:
        raise NotImplementedError

    def session_ended(self) -> None:
        """Whoever called has gone, and this task is being cancelled: work that must be done needs one of its own."""
        raise NotImplementedError


def _check_caller(context: Any, hello: pb.PeerHello) -> None:
    names = tls.names_of(context)
    if hello.node not in names:
        raise Final("peer_identity", f"the caller's certificate is for {sorted(names)}, it says it is {hello.node}")


def _error_reply(request_id: int, e: MidstreamError) -> pb.PeerReply:
    body = pb.PeerError(code=e.code, message=e.message, retryable=isinstance(e, Retryable))
    return pb.PeerReply(id=request_id, error=body)


def _details(e: Exception) -> str:
    return e.details() or str(e.code()) if isinstance(e, aio.AioRpcError) else repr(e)
