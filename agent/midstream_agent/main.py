"""`python -m midstream_agent`: the agent of one node.

Holds outlive this process: they are pinned in the kernel. SIGTERM therefore ends it at once and in order; what it
was doing is in the journal and is taken up by the next process of this boot.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import sys
from pathlib import Path

import uvloop
from midstream_runtime.contract import open_files
from midstream_runtime.contract.errors import MidstreamError

from midstream_agent.contract import logs
from midstream_agent.node import Node
from midstream_agent.server import serve
from midstream_agent.settings import ImdsSettings, Kv, Limits, Nic, Settings, Timeouts, TlsFiles


def parse(argv: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(prog="midstream-agent", description="Midstream's node agent")
    add = parser.add_argument
    add("--node", required=True, help="this node's name; the certificate's DNS SAN must be the same")
    add("--listen", required=True, help="host:port of the gRPC server")
    add("--metrics-listen", default="", help="host:port of Prometheus' endpoint, plain HTTP")
    add("--log-format", choices=("text", "json"), default="text")
    add("--node-address", action="append", default=[], help="this node's own address, one a family")
    add("--tls-ca", required=True, type=Path)
    add("--tls-cert", required=True, type=Path)
    add("--tls-key", required=True, type=Path)
    add("--bpffs", type=Path, default=Settings.__dataclass_fields__["bpffs"].default)
    add("--state-dir", type=Path, default=Settings.__dataclass_fields__["state_dir"].default)
    add("--cgroup-root", type=Path, default=Settings.__dataclass_fields__["cgroup_root"].default)
    add("--nic", default="eth1", help="interface that carries floating IPs")
    add("--nic-gateway-v4", default="")
    add("--nic-gateway-v6", default="")
    add("--mtu", type=int, default=9001)
    add("--imds-host", default="", help="EC2's instance metadata, 169.254.169.254; without it no notice is heard here")
    add("--imds-port", type=int, default=80)
    add("--boot-id", default="", help="override the kernel's boot id (tests)")
    add("--moved-linger-s", type=float, default=Timeouts().moved_linger_s)
    add("--accept-settle-ms", type=int, default=Timeouts().accept_settle_ms)
    add("--address-confirm-s", type=float, default=Timeouts().address_confirm_s)
    add("--peer-reply-s", type=float, default=Timeouts().peer_reply_s)
    add("--no-tunnel", action="store_true", help="never steer: clients wait until the network has moved an address")
    add("--tunnel-port", type=int, default=Settings.__dataclass_fields__["tunnel_port"].default, help="UDP, for Steer")
    add("--batch-streams", type=int, default=Limits().batch_streams, help="streams that are held and moved together")
    add("--parallel-batches", type=int, default=Limits().parallel_batches)
    add("--kv-port", type=int, default=Kv().port, help="TCP, for KV from other agents")
    add("--kv-streams", type=int, default=Kv().streams, help="TCP streams of a job; 0: as many as suit the NIC")
    add("--kv-bytes-per-s", type=int, default=Kv().bytes_per_s, help="of a job; 0: what the network gives")
    add("--kv-plain", action="store_true", help="KV without TLS: only where the network between nodes is trusted")
    args = parser.parse_args(argv)
    return Settings(
        node=args.node,
        listen=args.listen,
        tls=TlsFiles(args.tls_ca, args.tls_cert, args.tls_key),
        json_logs=args.log_format == "json",
        metrics_listen=args.metrics_listen,
        node_addresses=tuple(args.node_address),
        bpffs=args.bpffs,
        state_dir=args.state_dir,
        cgroup_root=args.cgroup_root,
        nic=Nic(args.nic, args.nic_gateway_v4, args.nic_gateway_v6, args.mtu),
        boot_id=args.boot_id,
        tunnel=not args.no_tunnel,
        tunnel_port=args.tunnel_port,
        limits=Limits(batch_streams=args.batch_streams, parallel_batches=args.parallel_batches),
        kv=Kv(
            port=args.kv_port, streams=args.kv_streams, bytes_per_s=args.kv_bytes_per_s, tls=not args.kv_plain
        ),
        imds=ImdsSettings(args.imds_host, args.imds_port),
        timeouts=Timeouts(
            moved_linger_s=args.moved_linger_s,
            accept_settle_ms=args.accept_settle_ms,
            address_confirm_s=args.address_confirm_s,
            peer_reply_s=args.peer_reply_s,
        ),
    )


async def run(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    node = await Node.start(settings)
    server, _, _ = await serve(node)
    logging.getLogger(__name__).info("agent of %s listens on %s", settings.node, settings.listen)
    gc.collect()
    gc.freeze()  # what is loaded now lives for ever: no collection during a hold walks through it
    print(f"ready {settings.node}", flush=True)
    await stop.wait()
    await server.stop(settings.timeouts.stop_s)
    await node.stop()


def main(argv: list[str] | None = None) -> int:
    settings = parse(argv)
    if settings.json_logs:
        logs.setup()
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    open_files.allow_all()
    try:
        uvloop.run(run(settings))
    except MidstreamError as e:
        print(f"midstream-agent: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
