"""The training text: Jane Austen's six novels, as Debian's package r-cran-janeaustenr ships them.

The novels are in the public domain; the package (which only wraps them for R) is under the MIT licence. The
package is fetched with `apt-get download` and unpacked beside the build, nothing is installed. R's lazy-load
database is a row of compressed XDR serialisations, one a novel, each a vector of strings: the dozen lines
below read just that."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"
_DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_CHARSXP, _STRSXP = 9, 16


def fetch(folder: Path) -> Path:
    """Path of the package's database under `folder`, downloaded with apt when it is not there yet."""
    database = folder / "x" / _DATABASE
    if not database.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        package = next(folder.glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg", "-x", str(package), str(folder / "x")], check=True)
    return database


def novels(database: Path) -> list[list[str]]:
    """Lines of each novel."""
    raw, at, found = database.read_bytes(), 0, []
    while at < len(raw):
        inflater = zlib.decompressobj()
        data = inflater.decompress(raw[at + 4 :])
        at = len(raw) - len(inflater.unused_data)
        found.append(_strings(data))
    return found


def _strings(data: bytes) -> list[str]:
    """Elements of an R version 3 serialised character vector (XDR)."""
    if data[:2] != b"X\n":
        raise ValueError("not an XDR serialisation")
    version, native = struct.unpack_from(">I8xI", data, 2)
    at = 2 + 12 + (4 + native if version == 3 else 0)
    flags, count = struct.unpack_from(">II", data, at)
    if flags & 0xFF != _STRSXP:
        raise ValueError("not a character vector")
    at, lines = at + 8, []
    for _ in range(count):
        kind, length = struct.unpack_from(">Ii", data, at)
        if kind & 0xFF != _CHARSXP:
            raise ValueError("not a string")
        at += 8
        lines.append(data[at : at + max(length, 0)].decode("utf-8"))
        at += max(length, 0)
    return lines


def paragraphs(lines: list[str]) -> list[str]:
    """Unwrapped paragraphs; the underscores that mark italics are dropped."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).replace("_", ""))
    return [" ".join(block.split()) for block in blocks if block.strip()]


def chapters(lines: list[str]) -> list[list[str]]:
    """Paragraphs of each chapter, without its heading and what stands before the first one."""
    found: list[list[str]] = []
    for paragraph in paragraphs(lines):
        if re.match(r"(CHAPTER|Chapter|VOLUME|Volume)\b", paragraph):
            found.append([])
        elif found:
            found[-1].append(paragraph)
    return [chapter for chapter in found if sum(map(len, chapter)) > 1000]
