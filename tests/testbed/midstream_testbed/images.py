"""Our container images as a node's containerd has them: imported and unpacked once, then linked into each node.

scripts/images.sh makes the archives. Importing a gigabyte takes a node half a minute, hard links a second or two:
layers are never written to once they are unpacked, so nodes share their files. Databases are copied.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]
ARCHIVES = CHECKOUT / "build/images"
CACHE = Path(os.environ.get("MIDSTREAM_CACHE", Path.home() / ".cache/midstream")) / "images"
KEPT_STORES = 2  # of this checkout and of another one
START_PATIENCE_S, IMPORT_PATIENCE_S = 30.0, 600.0


def archives(names: Sequence[str]) -> list[Path]:
    found = [ARCHIVES / f"{name}.tar" for name in names]
    missing = [path.stem for path in found if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no image {', '.join(missing)} in {ARCHIVES}: run scripts/images.sh")
    return found


def prepared(names: Sequence[str]) -> Path:
    """A containerd root with these images, from the cache; made where there is none for their present content."""
    ids = [path.with_suffix(".id").read_text(encoding="ascii") for path in archives(names)]
    store = CACHE / f"store-{hashlib.sha256('.'.join(ids).encode()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "store.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not store.exists():
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as folder:
                root = Path(folder, "root")
                for newest in _stores()[-1:]:
                    link(newest, root)  # most layers are those of the last time
                _import(root, Path(folder), archives(names))
                root.rename(store)
            for old in _stores()[:-KEPT_STORES]:
                shutil.rmtree(old)
        os.utime(store)
    return store


def link(store: Path, root: Path) -> None:
    """Make `root` a containerd root of its own, with the store's images."""
    root.parent.mkdir(parents=True, exist_ok=True)
    linked = subprocess.run(["cp", "-al", store, root], capture_output=True, check=False)
    if linked.returncode:  # another file system, say
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", store, root], check=True)
        return
    for database in root.glob("*/*.db"):
        copy = database.with_suffix(".copy")
        shutil.copy2(database, copy)
        copy.rename(database)


def _stores() -> list[Path]:
    """By their last use, the newest last."""
    found = [path for path in CACHE.glob("store-*") if path.is_dir()]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _import(root: Path, folder: Path, files: Sequence[Path]) -> None:
    with _containerd(root, folder) as socket:
        for file in files:
            argv = ["ctr", "--address", str(socket), "--namespace", "k8s.io", "images", "import", str(file)]
            subprocess.run(argv, capture_output=True, check=True, timeout=IMPORT_PATIENCE_S)


@contextmanager
def _containerd(root: Path, folder: Path) -> Iterator[Path]:
    """One that only keeps images: its socket."""
    socket, config = folder / "containerd.sock", folder / "containerd.toml"
    config.write_text(
        'version = 2\ndisabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.grpc.v1.cri"]\n'
    )
    argv = ["containerd", f"--config={config}", f"--root={root}", f"--state={folder / 'state'}", f"--address={socket}"]
    with (folder / "containerd.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_PATIENCE_S
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"containerd did not start:\n{(folder / 'containerd.log').read_text()[-3000:]}")
            time.sleep(0.05)
        yield socket
    finally:
        process.terminate()
        process.wait(START_PATIENCE_S)
