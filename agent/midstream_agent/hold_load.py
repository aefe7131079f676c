"""The loader: compiles bpf/ with bcc, pins programs and maps, exits.

It runs in a process of its own (an init container in the cluster), because bcc brings LLVM into the process
(147 MB) and the agent should stay small. What it needs and where it looks for it:

    bcc       in its own interpreter, else the one package from Debian's dist-packages: nothing else of
              that folder becomes importable, so Debian's other packages cannot shadow pinned ones
    headers   of any kernel: only UAPI headers are used. $BCC_KERNEL_SOURCE, else those of the running
              kernel, else any Debian linux-headers-*-common under /usr/src with its flavour beside it
    sources   bpf/ of the checkout, or the copy in the wheel

Maps that are pinned already are kept, with the flows that are held in them, if their layout is the one
these programs are compiled for; else the loader refuses by name. New programs are pinned over the old ones;
`attach` then exchanges them on the interfaces.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import importlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from midstream_runtime.contract.errors import Final

from midstream_agent.bpf import MapSpec, map_spec, obj_get, obj_pin
from midstream_agent.hold_layout import ADDR_CTL, ADDR_KEY, CONF, COPIES, CTL, KEY, MAPS, NOTE, PROGRAMS

DEBIAN_BCC = Path("/usr/lib/python3/dist-packages/bcc")
USR_SRC = Path("/usr/src")
LIB_MODULES = Path("/lib/modules")
KHEADERS = Path("/sys/kernel/kheaders.tar.xz")
BPF_FS_MAGIC = 0xCAFE4A11
ARCH = {"x86_64": "x86", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def load(bpffs: Path, folder: Path | None = None, without_hold: bool = False) -> None:
    """Compile and pin. Safe to repeat, also while flows are held."""
    bcc = import_bcc()
    headers = find_headers()
    folder = folder or sources()
    prepare_folder(bpffs)
    maps = {spec.name: open_map(bpffs, spec) for spec in MAPS}
    for name, fd in compile_programs(bcc, headers, folder, maps, without_hold).items():
        obj_pin(fd, bpffs / name)


def unload(bpffs: Path) -> None:
    """Remove the pins. Programs that are attached stay until `detach`."""
    for name in (*PROGRAMS, *(spec.name for spec in MAPS)):
        (bpffs / name).unlink(missing_ok=True)
    if bpffs.is_dir():
        try:
            bpffs.rmdir()
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise


# -- bcc -----------------------------------------------------------------------------------------------


def import_bcc() -> ModuleType:
    if importlib.util.find_spec("bcc") is None:
        if not (DEBIAN_BCC / "__init__.py").is_file():
            raise Final("no_bcc", "bcc is not installed for this Python: apt install python3-bpfcc")
        sys.meta_path.append(_OnlyBcc())
    try:
        return importlib.import_module("bcc")
    except (ImportError, OSError) as e:
        raise Final(
            "no_bcc", f"bcc is there but cannot be imported ({e}): apt install python3-bpfcc libbpfcc"
        ) from e


class _OnlyBcc(importlib.machinery.PathFinder):
    """Finds the package bcc in Debian's folder, and nothing else there."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "bcc":
            return None  # its submodules are found by its own __path__
        return super().find_spec(fullname, [str(DEBIAN_BCC.parent)], target)


# -- kernel headers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Headers:
    """`source` goes into BCC_KERNEL_SOURCE (None: bcc finds them itself); `build` holds generated ones."""

    source: Path | None
    build: Path | None = None

    def cflags(self) -> list[str]:
        if self.build is None:
            return []
        arch = self.build / "arch" / ARCH / "include" / "generated"
        folders = (self.build / "include", self.build / "include/generated/uapi", arch, arch / "uapi")
        return [f"-I{folder}" for folder in folders]


def find_headers() -> Headers:
    if os.environ.get("BCC_KERNEL_SOURCE"):
        return _headers_from_environment(Path(os.environ["BCC_KERNEL_SOURCE"]))
    release = platform.release()
    own = LIB_MODULES / release
    if (own / "build/include").is_dir() or KHEADERS.exists():
        return Headers(None)
    found = sorted(_debian_headers(), key=lambda h: _version(h.source))
    if not found:
        raise Final(
            "no_kernel_headers",
            f"no kernel headers: neither {own}/build (this kernel's own) nor any linux-headers-*-common with "
            f"its flavour under {USR_SRC}. Any version will do: apt install linux-headers-{_debian_arch()} "
            "or set BCC_KERNEL_SOURCE",
        )
    return found[-1]


def _headers_from_environment(source: Path) -> Headers:
    if not (source / "include").is_dir():
        raise Final("no_kernel_headers", f"BCC_KERNEL_SOURCE is {source}, which has no include folder")
    return next((h for h in _debian_headers() if h.source == source), Headers(source))


def _debian_headers() -> Iterator[Headers]:
    """Debian splits them: -common has the sources, the flavour's folder what was generated."""
    for common in USR_SRC.glob("linux-headers-*-common"):
        build = common.with_name(common.name.removesuffix("common") + _debian_arch())
        if (common / "include/uapi").is_dir() and (build / "include/generated").is_dir():
            yield Headers(common, build)


def _debian_arch() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _version(path: Path | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", path.name)] if path else []


# -- bpffs ---------------------------------------------------------------------------------------------


def prepare_folder(bpffs: Path) -> None:
    """Make the folder; mounts a bpffs where none is, on the well-known place or on the folder itself."""
    root = Path("/sys/fs/bpf")
    if not bpffs.exists() and bpffs.is_relative_to(root) and not _is_bpffs(root):
        _mount_bpffs(root)
    bpffs.mkdir(parents=True, exist_ok=True)
    if not _is_bpffs(bpffs):
        _mount_bpffs(bpffs)


def _is_bpffs(path: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 32)()  # struct statfs: f_type comes first
    if libc.statfs(os.fsencode(path), buffer) != 0:
        return False
    return buffer[0] == BPF_FS_MAGIC


def _mount_bpffs(path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        code = ctypes.get_errno()
        raise Final(
            "no_bpffs",
            f"cannot mount a bpffs on {path}: {os.strerror(code)} (the loader needs CAP_SYS_ADMIN)",
        )


# -- maps and programs ---------------------------------------------------------------------------------


def open_map(bpffs: Path, spec: MapSpec) -> int:
    """The pinned map if it has this layout, a new one if there is none."""
    path = bpffs / spec.name
    try:
        fd = obj_get(path)
    except FileNotFoundError:
        fd = _create(spec)
        obj_pin(fd, path)
        return fd
    there = map_spec(fd)
    if there != spec:
        raise Final(
            "hold_layout",
            f"{path} was made by another version ({there}, this one needs {spec}): finish or abort the "
            f"migrations of this node, then `python -m midstream_agent.hold unload --bpffs {bpffs}`",
        )
    return fd


def _create(spec: MapSpec) -> int:
    try:
        return spec.create()
    except PermissionError as e:
        raise Final(
            "no_capability", "creating a BPF map is not permitted: the loader needs CAP_BPF and CAP_NET_ADMIN"
        ) from e


def sources() -> Path:
    here = Path(__file__).resolve().parent
    for folder in (here / "_bpf", here.parents[1] / "bpf"):
        if (folder / "midstream.c").is_file():
            return folder
    raise Final("no_bpf_sources", f"midstream.c is neither in {here / '_bpf'} nor in the checkout's bpf/")


def compile_programs(
    bcc: ModuleType, headers: Headers, folder: Path, maps: dict[str, int], without_hold: bool
) -> dict[str, int]:
    """name -> descriptor of a loaded program."""
    if headers.source is not None:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.source)
    flags = [f"-I{folder}", *headers.cflags(), *_defines(maps)]
    if without_hold:
        flags.append("-DMS_WITHOUT_HOLD")
    try:
        module = bcc.BPF(src_file=str(folder / "midstream.c").encode(), cflags=flags)
        return {name: int(module.load_func(name.encode(), bcc.BPF.SCHED_CLS).fd) for name in PROGRAMS}
    except Exception as e:  # bcc raises bare Exception; what clang or the verifier said is on stderr
        raise Final(
            "bpf_build_failed",
            f"bcc cannot build the programs ({e}); headers: {headers.source or 'those of this kernel'}. What "
            "the compiler or the verifier said is above; kernels before 5.12 lack the atomics of notes",
        ) from e


def _defines(maps: dict[str, int]) -> list[str]:
    sizes = {
        "KEY": KEY, "CTL": CTL, "NOTE": NOTE, "ADDR_KEY": ADDR_KEY, "ADDR_CTL": ADDR_CTL, "COPIES": COPIES,
        "CONF": CONF,
    }  # fmt: skip
    descriptors = [f"-DMS_FD_{name.removeprefix('ms_').upper()}={fd}" for name, fd in maps.items()]
    return descriptors + [f"-DMS_SIZE_{name}={layout.size}" for name, layout in sizes.items()]
