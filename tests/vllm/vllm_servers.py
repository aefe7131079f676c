"""Stock vLLM servers on the CPU, as processes: the pair that all tests of a session share, and single ones."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build/venv-vllm/bin/python"
ABSENT = ROOT / "build/vllm-absent.txt"
NAME = "tiny"
BLOCK_TOKENS = 32
START_S = 300.0
"""20-30 s on two idle cores; tests run beside others."""


def why_not() -> str | None:
    """None where vLLM can run; else what scripts/setup.sh found missing."""
    if PYTHON.exists():
        return None
    return ABSENT.read_text().strip() if ABSENT.exists() else "not installed: scripts/setup.sh vllm"


def environment(**more: str) -> dict[str, str]:
    """For one core a server, and no look at any network."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "runtime"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def transfer_config(pool_socket: str, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "MidstreamConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "midstream_runtime.vllm_connector",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"pool_slots": 512, "pool_socket": pool_socket, **extra},
    }


def serve_argv(model: Path, port: int, config: dict[str, Any] | None, *options: str) -> list[str]:
    """`vllm serve`'s module: vllm-cpu's own `vllm` command looks for a distribution of that name and fails."""
    argv = [
        str(PYTHON), "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--block-size", str(BLOCK_TOKENS),
        "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager",
    ]  # fmt: skip
    if config is not None:
        argv += ["--kv-transfer-config", json.dumps(config)]
    return [*argv, *options]


def make_model(folder: Path) -> Path:
    """The tiny random Llama; see tiny_llama.py."""
    argv = [str(PYTHON), str(Path(__file__).with_name("tiny_llama.py")), str(folder)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no model could be made:\n{done.stderr[-3000:]}")
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@dataclass
class VllmServer:
    """One server. `start` returns at once, `wait` when it answers."""

    model: Path
    port: int
    folder: Path
    connector: bool = True
    options: Sequence[str] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pool(self) -> str | None:
        return str(self.folder / f"pool-{self.port}.sock") if self.connector else None

    @property
    def log(self) -> str:
        path = self.folder / f"vllm-{self.port}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        config = transfer_config(self.pool, **self.extra) if self.pool else None
        argv = serve_argv(self.model, self.port, config, *self.options)
        scratch = self.folder / "tmp"  # vLLM leaves sockets and lock files there, more so when it is killed
        scratch.mkdir(exist_ok=True)
        env = environment(TMPDIR=str(scratch))
        with (self.folder / f"vllm-{self.port}.log").open("wb") as log:
            self.process = subprocess.Popen(
                argv, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM ended with {self.process.returncode}:\n{self.log[-4000:]}")
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"vLLM did not come up:\n{self.log[-4000:]}")

    def kill(self) -> None:
        """All its processes at once, as a container ends."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return bytes(response.read())

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())

    def metric(self, name: str) -> float:
        """Sum over all labels; KeyError when vLLM has no such metric."""
        found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics").decode(), re.M)
        if not found:
            raise KeyError(name)
        return sum(float(value) for value in found)
