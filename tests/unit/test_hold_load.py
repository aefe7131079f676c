"""Where the loader looks for bcc and headers, and what it says when they are not there."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from midstream_agent import hold_load
from midstream_runtime.contract.errors import Final

ARCH = hold_load._debian_arch()


@pytest.fixture
def no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any; returns its /usr/src."""
    for name, folder in (("USR_SRC", "src"), ("LIB_MODULES", "modules")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(hold_load, name, tmp_path / folder)
    monkeypatch.setattr(hold_load, "KHEADERS", tmp_path / "kheaders.tar.xz")
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    return tmp_path / "src"


def debian(usr_src: Path, version: str) -> Path:
    common = usr_src / f"linux-headers-{version}-common"
    (common / "include/uapi").mkdir(parents=True)
    (usr_src / f"linux-headers-{version}-{ARCH}" / "include/generated").mkdir(parents=True)
    return common


def test_missing_headers_are_named_with_the_package_to_install(no_headers: Path) -> None:
    with pytest.raises(Final, match=rf"(?s)no_kernel_headers.*apt install linux-headers-{ARCH}.*BCC_KERNEL_SOURCE"):
        hold_load.find_headers()


def test_newest_debian_headers_win(no_headers: Path) -> None:
    for version in ("6.1.0-9", "6.1.0-56", "5.10.0-99"):
        common = debian(no_headers, version)
        assert common.is_dir()
    found = hold_load.find_headers()
    assert found.source == no_headers / "linux-headers-6.1.0-56-common"
    assert found.build == no_headers / f"linux-headers-6.1.0-56-{ARCH}"


def test_half_installed_headers_are_not_taken(no_headers: Path) -> None:
    (no_headers / "linux-headers-6.1.0-56-common/include/uapi").mkdir(parents=True)
    with pytest.raises(Final, match="no_kernel_headers"):
        hold_load.find_headers()


def test_own_headers_of_the_kernel_are_left_to_bcc(no_headers: Path) -> None:
    (hold_load.LIB_MODULES / platform.release() / "build/include").mkdir(parents=True)
    assert hold_load.find_headers() == hold_load.Headers(None)


def test_environment_wins_and_is_checked(no_headers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    debian(no_headers, "6.1.0-56")
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path / "nowhere"))
    with pytest.raises(Final, match=r"BCC_KERNEL_SOURCE is .*nowhere"):
        hold_load.find_headers()
    (tmp_path / "tree/include").mkdir(parents=True)
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path / "tree"))
    assert hold_load.find_headers() == hold_load.Headers(tmp_path / "tree")


def test_missing_bcc_is_named_with_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hold_load, "DEBIAN_BCC", tmp_path / "bcc")
    with pytest.raises(Final, match=r"no_bcc: .*apt install python3-bpfcc"):
        hold_load.import_bcc()


def test_only_the_one_package_of_debian_becomes_importable(tmp_path: Path) -> None:
    """In a process of its own, since an import cannot be taken back, and without site-packages (-S), which may hold
    a bcc: that one would rightly win."""
    for name in ("bcc", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("from . import part\n" if name == "bcc" else "")
    (tmp_path / "bcc/part.py").write_text("import sys\n")
    code = (
        "import importlib.util, sys; from pathlib import Path; from midstream_agent import hold_load\n"
        f"hold_load.DEBIAN_BCC = Path({str(tmp_path / 'bcc')!r}); hold_load.import_bcc()\n"
        "print('bcc.part' in sys.modules, importlib.util.find_spec('other'))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.split() == ["True", "None"]


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": f"{root / 'agent'}{os.pathsep}{root / 'runtime'}"}
