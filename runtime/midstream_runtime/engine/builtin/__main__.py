"""`python3 -m midstream_runtime.engine.builtin --socket PATH`: the built-in engine as a process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="midstream_runtime.engine.builtin", description=__doc__)
    default_socket = os.environ.get("MIDSTREAM_ENGINE", "/run/midstream/engine.sock")
    parser.add_argument("--socket", default=default_socket, help="unix socket to listen on (%(default)s)")
    parser.add_argument(
        "--model", default="tiny", help="'tiny', or a folder with a Llama and our tokenizer.json"
    )
    parser.add_argument("--pool-slots", type=int, default=8192, help="KV slots (%(default)s)")
    parser.add_argument(
        "--block-tokens", type=int, default=16, choices=(16, 32), help="tokens a slot (%(default)s)"
    )
    parser.add_argument(
        "--kv-dtype", default="float16", choices=("float16", "bfloat16", "float32", "float64")
    )
    parser.add_argument(
        "--pace-ms", type=float, default=4.0, help="least time between two steps (%(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda, or auto: cuda where there is one (%(default)s)"
    )
    parser.add_argument("--max-running", type=int, default=512, help="requests in a step (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: all cores but one")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    threads = args.threads or max(1, (os.cpu_count() or 2) - 1)
    # Read once, when the BLAS library is loaded with torch.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)

    from midstream_runtime.engine.builtin.load import build

    folder = Path(__file__).parent / "tiny" if args.model == "tiny" else Path(args.model)
    core, info = build(
        folder,
        pool_slots=args.pool_slots,
        block_tokens=args.block_tokens,
        kv_dtype=args.kv_dtype,
        pace_ms=args.pace_ms,
        device=args.device,
        max_running=args.max_running,
        threads=threads,
    )
    from midstream_runtime.engine.builtin.server import EngineServer

    server = EngineServer(core, info, args.socket, args.pace_ms)
    signal.set_wakeup_fd(server.wakeup_fd)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    print(
        f"engine: {info.model} on {info.device}, {args.pool_slots} KV slots, {args.socket}",
        file=sys.stderr,
        flush=True,
    )
    server.run()


if __name__ == "__main__":
    main()
