"""What is installed from a wheel is complete, and shadows nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("operator", "agent", "runtime", "bpf"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    argv = [*pip, "--no-build-isolation", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_bpf_sources_model_and_contracts_are_in_the_wheel(installed: Path) -> None:
    names = {str(p.relative_to(installed)) for p in installed.rglob("*")}
    bpf = {f"midstream_agent/_bpf/{p.name}" for p in (ROOT / "bpf").glob("*.[ch]")}
    tiny = {
        f"midstream_runtime/engine/builtin/tiny/{p.name}"
        for p in (ROOT / "runtime/midstream_runtime/engine/builtin/tiny").iterdir()
    }
    assert names >= bpf | tiny | {"midstream_agent/contract/agent.proto", "midstream_cli/main.py", "bin/midstream"}
    assert not any(n.split("/")[0] in ("operator", "agent", "runtime", "tests", "midstream_testbed") for n in names)


def test_what_is_installed_runs_alone(installed: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    code = (
        "import operator; operator.add; from midstream_agent.hold_load import sources; from pathlib import Path; "
        "assert (sources() / 'midstream.c').is_file(); import midstream_runtime.serve, midstream_cli.main; "
        f"assert Path(midstream_runtime.serve.__file__).is_relative_to({str(installed)!r})"
    )
    for argv in (["-c", code], ["-m", "midstream_cli.main", "--help"], ["-m", "midstream_runtime.serve", "--help"]):
        done = subprocess.run(
            [sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
