"""The pod's end of the handoff, asked by the agent's own client over a real unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from midstream_agent.handoff import HandoffClient
from midstream_runtime.contract import handoff as wire
from midstream_runtime.contract.errors import Final, MidstreamError
from midstream_runtime.handoff import App, Connection, Handoff, Movable

LOOPBACK = "127.0.0.1"


class Tape:
    """Remembers what it was told."""

    def __init__(self, connection: Connection, data: bytes = b"") -> None:
        self.connection, self.data = connection, data

    def received(self, data: bytes) -> None:
        self.data += data
        self.connection.write(data.upper())

    def eof(self) -> None:
        self.connection.close()

    def drained(self) -> None: ...

    def lost(self, error: OSError | None) -> None: ...

    def movable(self) -> Movable:
        return Movable(b"stay" not in self.data, "WantsToStay" if b"stay" in self.data else "")

    def save(self) -> bytes:
        return self.data


class TapeApp(App):
    kind = "tape"

    def connected(self, connection: Connection) -> Tape:
        return Tape(connection)

    def restored(self, connection: Connection, state: bytes) -> Tape:
        return Tape(connection, state)


class Pod:
    def __init__(self, handoff: Handoff) -> None:
        self.handoff, self.port = handoff, 0
        self.clients: list[socket.socket] = []

    def agent(self) -> HandoffClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.handoff.path)
        return HandoffClient(sock, timeout_s=5)

    async def client(self, greeting: bytes = b"hi") -> socket.socket:
        sock = socket.create_connection((LOOPBACK, self.port))
        self.clients.append(sock)
        sock.setblocking(False)
        sock.send(greeting)
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == greeting.upper()
        return sock


@asynccontextmanager
async def pod(folder: Path) -> AsyncIterator[Pod]:
    handoff = Handoff(TapeApp(), str(folder / "pod.sock"))
    handoff.listen(LOOPBACK, 0, 1500)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(handoff.serve())
        await asyncio.sleep(0)
        made = Pod(handoff)
        async with made.agent() as agent:
            hello = await agent.ask("hello", {"version": 1, "min_version": 1, "node": "n"})
        made.port = hello.header["listeners"][0]["port"]
        yield made
        task.cancel()
        for sock in made.clients:
            sock.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(main())


def on(job: str = "j", **more: object) -> dict[str, object]:
    return {"job": job, "addresses": [LOOPBACK], **more}


def test_pause_hands_out_sockets_and_state_and_resume_goes_on(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p, p.agent() as agent:
            client = await p.client()
            client.send(b"mo")
            answer = await agent.ask("pause", on())
            assert len(answer.fds) == len(answer.header["streams"]) == 1
            assert os.fstat(answer.fds[0]).st_ino
            answer.close()
            client.send(b"re")
            await agent.ask("resume", {"job": "j"})
            got = b""
            while len(got) < 4:
                got += await asyncio.get_running_loop().sock_recv(client, 100)
            assert got == b"MORE"

    run(body)


def test_an_address_is_leaving_from_release_until_the_pod_has_lost_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p, p.agent() as agent:
            await p.client()
            paused = await agent.ask("pause", on())
            paused.close()
            assert p.handoff.leaving() == set()
            await agent.ask("release", {"job": "j"})
            p.handoff._left.add("192.0.2.1")  # on no interface (RFC 5737)
            assert p.handoff.leaving() == {LOOPBACK}
            with socket.create_server((LOOPBACK, 0)) as other:
                blank = await agent.ask("blank", {"job": "k", "families": [4]})
                (fd,) = blank.take_fds(1)
                with socket.socket(fileno=fd) as restored, contextlib.suppress(BlockingIOError):
                    restored.connect(other.getsockname())
                await agent.ask("stage", {"job": "k", "count": 1, "slots": []}, paused.payload)
                await agent.ask("activate", {"job": "k"})
                assert p.handoff.leaving() == set()  # streams of it have come back
                for connection in list(p.handoff.connections.values()):
                    connection.drop()

    run(body)


def test_pause_and_fds_asked_again_give_the_same_streams(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p:
            kept = await p.client()
            async with p.agent() as first:
                once = await first.ask("pause", on())
            late = await p.client(b"late")
            async with p.agent() as second:
                again = await second.ask("pause", on())
                fetched = await second.ask("fds", {"job": "j"})
                assert once.header["streams"] == again.header["streams"] == fetched.header["streams"]
                assert once.payload == again.payload == fetched.payload
                inodes = [[os.fstat(f).st_ino for f in a.fds] for a in (once, again, fetched)]
                assert inodes[0] == inodes[1] == inodes[2]
                for a in (once, again, fetched):
                    a.close()
                await second.ask("resume", {"job": "j"})
            kept.close()
            late.close()

    run(body)


def test_streams_that_cannot_move_are_named_and_left_alone_when_excluded(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p, p.agent() as agent:
            going, staying = await p.client(b"go"), await p.client(b"stay")
            listed = (await agent.ask("streams", {"addresses": [LOOPBACK]})).header["streams"]
            reasons = {s["reason"]: s["id"] for s in listed}
            assert sorted(reasons) == ["", "WantsToStay"]
            answer = await agent.ask("pause", on(exclude=[reasons["WantsToStay"]]))
            assert [s["id"] for s in answer.header["streams"]] == [reasons[""]]
            answer.close()
            staying.send(b"still served")
            assert await asyncio.get_running_loop().sock_recv(staying, 100) == b"STILL SERVED"
            await agent.ask("release", {"job": "j"})
            assert len(p.handoff.connections) == 1
            going.close()
            staying.close()

    run(body)


def test_streams_on_other_addresses_are_not_touched(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p, p.agent() as agent:
            client = await p.client()
            answer = await agent.ask("pause", {"job": "j", "addresses": ["10.0.0.1"]})
            assert answer.header["streams"] == [] and answer.fds == []
            client.send(b"on")
            assert await asyncio.get_running_loop().sock_recv(client, 100) == b"ON"
            client.close()

    run(body)


def test_more_sockets_than_a_message_takes_come_in_several(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p, p.agent() as agent:
            families = [4, 6] * 300
            answer = await agent.ask("blank", {"job": "j", "families": families})
            fds = answer.take_fds(600)
            domains = []
            for fd in fds:
                with socket.socket(fileno=fd) as sock:
                    domains.append(4 if sock.family == socket.AF_INET else 6)
            assert domains == families

    run(body)


def test_blanks_end_with_the_agents_connection(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p:
            before = len(os.listdir("/proc/self/fd"))
            async with p.agent() as agent:
                (await agent.ask("blank", {"job": "j", "families": [4] * 20})).close()
                assert len(os.listdir("/proc/self/fd")) >= before + 20
            async with p.agent() as agent:
                while (await agent.ask("status")).header["jobs"]:
                    await asyncio.sleep(0.005)
            assert len(os.listdir("/proc/self/fd")) <= before

    run(body)


def test_requests_about_a_job_that_nobody_knows_are_answered(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p, p.agent() as agent:
            for kind in ("resume", "release", "activate", "discard"):
                await agent.ask(kind, {"job": "never"})
            with pytest.raises(Final, match="unknown_job"):
                await agent.ask("fds", {"job": "never"})

    run(body)


@pytest.mark.parametrize(
    ("kind", "fields", "code"),
    [
        ("dance", {}, "handoff_protocol"),
        ("pause", {}, "handoff_protocol"),
        ("blank", {"job": "j", "families": [5]}, "handoff_protocol"),
        ("blank", {"job": "j", "families": "6"}, "handoff_protocol"),
        ("reserve", {"job": "j", "slots": 3}, "no_pool"),
        ("stage", {"job": "j", "slots": [], "count": 2}, "stage_count"),
    ],
)
def test_bad_requests_are_refused_by_name_and_the_next_one_is_served(
    tmp_path: Path, kind: str, fields: dict[str, object], code: str
) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p, p.agent() as agent:
            with pytest.raises(MidstreamError) as refused:
                await agent.ask(kind, fields)
            assert refused.value.code == code
            await agent.ask("status")

    run(body)


def test_a_frame_that_announces_gigabytes_ends_the_connection_and_only_that(tmp_path: Path) -> None:
    async def body() -> None:
        async with pod(tmp_path) as p:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(p.handoff.path)
            sock.setblocking(False)
            sock.send(struct.pack("<II", 1 << 30, 1 << 31))
            assert await asyncio.get_running_loop().sock_recv(sock, 10) == b""
            sock.close()
            async with p.agent() as agent:
                await agent.ask("status")

    run(body)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), st.binary(), st.binary())
def test_frames_survive_whatever_they_carry(header: dict[str, object], payload: bytes, rest: bytes) -> None:
    data = wire.encode(header, payload)
    for cut in {0, 1, len(data) // 2, len(data) - 1}:
        assert wire.missing(bytearray(data[:cut])) > 0
    buffer = bytearray(data + rest)
    assert wire.missing(buffer) == 0
    assert wire.decode(buffer) == (header, payload, len(data))


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_refused_or_waited_for(data: bytes) -> None:
    buffer = bytearray(data)
    try:
        if wire.missing(buffer) == 0:
            header, _, used = wire.decode(buffer)
            assert isinstance(header, dict) and used <= len(data)
    except Final as e:
        assert e.code in ("handoff_size", "handoff_protocol")
