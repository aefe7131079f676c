"""Two migrations one right after the other, by the CLI's own code in one process: the second begins at once.

python two_hops.py INVENTORY POD NODE JOB REPORT POD NODE JOB REPORT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from midstream_cli import main as cli
from midstream_cli.inventory import Inventory


async def main(inventory: Inventory, argv: list[str]) -> int:
    for pod, node, job, report in (argv[:4], argv[4:]):
        args = cli.parser().parse_args(["migrate", pod, "--to", node, "--job", job, "--report", report])
        if code := await cli.migrate(inventory, args):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Inventory.load(Path(sys.argv[1])), sys.argv[2:])))
