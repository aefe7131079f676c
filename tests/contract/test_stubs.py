"""The committed gRPC stubs are what agent.proto generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

AGENT = Path(__file__).resolve().parents[2] / "agent"
CONTRACT = "midstream_agent/contract"


def test_the_committed_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    plugins = Path(sys.executable).parent
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", "-I", str(AGENT),
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--python_out={tmp_path}", f"--mypy_out={tmp_path}",
            f"--grpc_python_out={tmp_path}", f"--mypy_grpc_out={tmp_path}",
            f"{CONTRACT}/agent.proto",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    for name in ("agent_pb2.py", "agent_pb2.pyi", "agent_pb2_grpc.py", "agent_pb2_grpc.pyi"):
        committed, generated = (root / CONTRACT / name for root in (AGENT, tmp_path))
        assert committed.read_text() == generated.read_text(), f"{name}: run make proto"
