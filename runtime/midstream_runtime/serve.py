"""`midstream-serve`: the serving pod's process, a gateway with its engine beside it.

The built-in engine is started as a process of its own, or --engine names the socket of one that runs already (in
another container of the pod). When the engine dies, answers under way end with an error, and it is started again.

`--engine vllm` is a stock vLLM server in another container, at --engine-url, with the KV pool of its Midstream
connector at --engine-pool. It is started by whoever runs the pod; answers under way wait for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import uvloop

from midstream_runtime import prestop
from midstream_runtime.contract import open_files
from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.engine.client import EngineClient, GatewayEngine
from midstream_runtime.engine.protocol import EngineInfo
from midstream_runtime.engine.vllm.client import VllmEngine
from midstream_runtime.gateway.app import Gateway, Settings
from midstream_runtime.gateway.metrics import Metrics
from midstream_runtime.handoff import Handoff

log = logging.getLogger("midstream.serve")

ENGINE_START_S = 120.0
VLLM_START_S = 1800.0
"""Weights are read and kernels compiled: large models take many minutes."""
RETRY_S = 0.5
VLLM = "vllm"
SWEEP_S = 5.0


@dataclass(frozen=True, slots=True)
class Options:
    listen: tuple[str, int]
    path_mtu: int
    handoff: str | None
    engine: str | None
    engine_url: str
    engine_pool: str | None
    engine_argv: Sequence[str]
    grace_s: float
    prestop_port: int
    gateway: Settings


class Keeper(Protocol):
    async def connect(self) -> tuple[GatewayEngine, EngineInfo]:
        """A new connection; Retryable when no engine came up in time, Final when none will."""

    async def stop(self) -> None: ...


class VllmKeeper:
    """Waits for a stock vLLM server that somebody else runs."""

    def __init__(self, options: Options) -> None:
        self._options = options

    async def connect(self) -> tuple[GatewayEngine, EngineInfo]:
        try:
            async with asyncio.timeout(VLLM_START_S):
                while True:
                    try:
                        engine = await VllmEngine.connect(self._options.engine_url, self._options.engine_pool)
                        return engine, await engine.info()
                    except Retryable:
                        await asyncio.sleep(RETRY_S)
        except TimeoutError as error:
            url = self._options.engine_url
            raise Retryable("engine_unreachable", f"no vLLM server at {url} after {VLLM_START_S:g} s") from error

    async def stop(self) -> None:
        """It is not ours."""


class EngineKeeper:
    """Keeps one engine connected: starts the process where it is ours, connects, and begins again when it is lost."""

    def __init__(self, options: Options, folder: str) -> None:
        self._options = options
        self._path = options.engine or os.path.join(folder, "engine.sock")
        self._process: asyncio.subprocess.Process | None = None

    async def connect(self) -> tuple[GatewayEngine, EngineInfo]:
        """A new connection; Retryable when no engine came up in time, Final when it ended by itself."""
        if self._options.engine is None and (self._process is None or self._process.returncode is not None):
            try:
                self._process = await asyncio.create_subprocess_exec(*self._options.engine_argv, "--socket", self._path)
            except OSError as error:
                why = f"{self._options.engine_argv[0]} cannot be started ({error.strerror}): see --engine-python"
                raise Final("engine_failed", why) from error
        try:
            async with asyncio.timeout(ENGINE_START_S):
                while True:
                    try:
                        client = await EngineClient.connect(self._path)
                        return client, await client.info()
                    except Retryable:
                        self._check_alive()
                        await asyncio.sleep(0.02)
        except TimeoutError as error:
            raise Retryable("engine_unreachable", f"no engine at {self._path} after {ENGINE_START_S:g} s") from error

    def _check_alive(self) -> None:
        if self._process is not None and self._process.returncode is not None:
            raise Final("engine_failed", f"the engine ended with status {self._process.returncode}: see its output")

    async def stop(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), 5)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def run(options: Options) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with tempfile.TemporaryDirectory(prefix="midstream-") as folder:
        keeper: Keeper = VllmKeeper(options) if options.engine == VLLM else EngineKeeper(options, folder)
        try:
            client, info = await keeper.connect()
            gateway = Gateway(info, options.gateway, Metrics())
            gateway.attach(client)
            handoff = Handoff(gateway, options.handoff)
            handoff.listen(*options.listen, path_mtu_bytes=options.path_mtu)
            async with asyncio.TaskGroup() as tasks:
                work = [
                    tasks.create_task(handoff.serve(), name="handoff"),
                    tasks.create_task(_keep_engine(gateway, keeper, client), name="engine"),
                    tasks.create_task(_sweep(gateway), name="sweep"),
                ]
                if options.prestop_port:
                    hook = await prestop.serve(options.prestop_port, lambda: bool(gateway.answers or handoff.leaving()))
                    work.append(tasks.create_task(hook.serve_forever(), name="prestop"))
                print(f"ready {info.model} on {options.listen[0]}:{options.listen[1]}", flush=True)
                await stop.wait()
                handoff.stop_listening()
                await _drain(gateway, options.grace_s)
                for task in work:
                    task.cancel()
        finally:
            await keeper.stop()


async def _keep_engine(gateway: Gateway, keeper: Keeper, client: GatewayEngine) -> None:
    while True:
        await client.lost()
        log.error("the engine is gone; answers under way have failed, starting it again")
        while True:
            try:
                client, info = await keeper.connect()
                break
            except MidstreamError as error:
                log.error("%s", error)
                await asyncio.sleep(RETRY_S)
        if info.fingerprint != gateway.info.fingerprint:
            raise Final("engine_model", f"the engine came back with another model ({info.model}): start the pod again")
        gateway.info = info
        gateway.attach(client)


async def _sweep(gateway: Gateway) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        gateway.close_idle()


async def _drain(gateway: Gateway, grace_s: float) -> None:
    """Let answers under way end."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            while gateway.busy:  # noqa: ASYNC110 - it changes in callbacks of many kinds
                await asyncio.sleep(0.05)


def parse(argv: Sequence[str] | None = None) -> Options:
    plain = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="midstream-serve", description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("--listen", default="[::]:8000", help="address and port for clients (%(default)s)")
    add("--path-mtu", type=int, default=1500, help="MTU between clients and this pod, bytes (%(default)s)")
    add("--handoff", help="unix socket for the node's agent ($MIDSTREAM_HANDOFF, /run/midstream/handoff.sock)")
    add("--engine", help="unix socket of an engine that runs already, or 'vllm'; else the built-in one is started")
    add("--engine-url", default="http://127.0.0.1:8001", help="of the vLLM server (%(default)s)")
    add("--engine-pool", default="/run/midstream/pool.sock", help="of vLLM's connector, '' without (%(default)s)")
    add("--engine-python", default=sys.executable, help="Python with torch, for the built-in engine (%(default)s)")
    add("--engine-chat", default="ids", choices=("ids", "native"),
        help="native: chats go through vLLM's own endpoint, since it has a reasoning parser (%(default)s)")
    ours = {"--model": "tiny", "--pool-slots": "8192", "--block-tokens": "16", "--pace-ms": "0", "--device": "cpu"}
    for name, default in ours.items():
        add(name, default=default, help="of the built-in engine (%(default)s)")
    add("--max-body-bytes", type=int, default=8 << 20, help="largest request body (%(default)s)")
    add("--idle-s", type=float, default=75.0, help="close connections on which nothing is asked (%(default)s)")
    add("--grace-s", type=float, default=25.0, help="time for answers under way after SIGTERM (%(default)s)")
    add("--prestop-port", type=int, default=0, help="answers the kubelet's preStop hook; 0: none (%(default)s)")
    args = parser.parse_args(argv)
    host, _, port = args.listen.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        parser.error(f"--listen {args.listen!r}: write ADDRESS:PORT, an IPv6 address in brackets")
    if not 576 <= args.path_mtu <= 65535:
        parser.error(f"--path-mtu {args.path_mtu}: an MTU is between 576 and 65535 bytes")
    return Options(
        listen=(host.strip("[]") or "::", int(port)),
        path_mtu=args.path_mtu,
        handoff=args.handoff,
        engine=args.engine,
        engine_url=args.engine_url,
        engine_pool=args.engine_pool or None,
        engine_argv=[
            args.engine_python, "-m", "midstream_runtime.engine.builtin", "--model", args.model,
            "--pool-slots", args.pool_slots, "--block-tokens", args.block_tokens, "--pace-ms", args.pace_ms,
            "--device", args.device,
        ],
        grace_s=args.grace_s,
        prestop_port=args.prestop_port,
        gateway=Settings(
            args.max_body_bytes, args.idle_s, zero_kv=os.environ.get("MIDSTREAM_TEST_ZERO_KV") == "1",
            native_chat=args.engine_chat == "native",
        ),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = parse(argv)
    open_files.allow_all()
    # The engine may run in another Python: it must find this very package.
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        uvloop.run(run(options))
    except (MidstreamError, ExceptionGroup) as error:
        cause = error
        while isinstance(cause, ExceptionGroup):  # the first task that failed ended the others
            cause = cause.exceptions[0]
        if not isinstance(cause, MidstreamError):
            raise
        print(f"midstream-serve: {cause}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
