"""`python -m midstream_operator.crds FOLDER`: apply the CRDs of a folder, as the chart's hook does before each upgrade.

Server-side apply, so that fields which only somebody else has set stay.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from midstream_operator.errors import Final, OperatorError
from midstream_operator.kube import Kube, KubeError, as_error, connect
from midstream_operator.model import Json

PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
APPLY = "application/apply-patch+yaml"
MANAGER = ("fieldManager", "midstream-crds")


def read(folder: Path) -> list[Json]:
    found = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yaml"))]
    if not found:
        raise Final("no_crds", f"{folder} has no CRDs: the image is not whole")
    return found


async def apply(kube: Kube, crds: list[Json]) -> None:
    for crd in crds:
        name = crd["metadata"]["name"]
        try:
            # Helm's own crds/ may have made them: they are ours from here on.
            query = [MANAGER, ("force", "true")]
            await kube.request("PATCH", f"{PATH}/{name}", crd, query=query, content_type=APPLY)
        except KubeError as e:
            raise as_error(e, "crd_not_applied") from e
        print(f"applied {name}")


async def run(crds: list[Json]) -> None:
    kube = await connect()
    try:
        await apply(kube, crds)
    finally:
        await kube.close()


def main(argv: Sequence[str] | None = None) -> int:
    folder = Path((argv or sys.argv[1:])[0])
    try:
        asyncio.run(run(read(folder)))
    except OperatorError as e:
        print(f"midstream-crds: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
