"""One case of the byte-exact tests: clients of every place, and a pod whose streams hop while they send and read."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from world import World

HOPS = 5
CLIENTS_A_PLACE = 16
BUCKETS = ("0", "1-1k", "1k-16k", "16k-256k", "256k-4M", ">4M")


@dataclass
class Tally:
    """Over all cases of the session."""

    migrated: int = 0
    with_bytes: int = 0
    histogram: Counter[str] = field(default_factory=Counter)

    def add(self, report: dict[str, Any]) -> None:
        self.migrated += int(report["streams"].get("migrated", 0))
        queues = report.get("queues", {})
        self.with_bytes += int(queues.get("withBytes", 0))
        for bucket, count in zip(BUCKETS, queues.get("histogram", []), strict=False):
            self.histogram[bucket] += int(count)

    def __str__(self) -> str:
        lines = [f"migrated connections: {self.migrated}, with bytes in a queue at the freeze: {self.with_bytes}"]
        return "\n".join(lines + [f"  {bucket:>9} bytes queued: {self.histogram[bucket]}" for bucket in BUCKETS])


tally = Tally()


def run_case(
    world: World,
    case: str,
    seed: int,
    *addresses: str,
    hops: int = HOPS,
    hop: Callable[[], dict[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Clients of every place on each address, and hops at random instants while they send and read. `hop`: how, if
    not plainly; what it raises ends the case."""
    r = random.Random(f"{case} {seed}")
    count = CLIENTS_A_PLACE // len(addresses)
    groups = [
        world.clients(
            place, count, r.randrange(1 << 30), address=address, **{"seconds": 4.0, "spread_s": 0.2, **options}
        )
        for place in world.places().values()
        for address in addresses
    ]
    for address in addresses:
        world.wait_streams(address, count if "spread_s" not in options else 1)
    for _ in range(hops):
        time.sleep(r.uniform(0, 0.35))
        report = (hop or world.hop)()
        assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
        tally.add(report)
    results = [group.finish() for group in groups]
    assert [error for result in results for error in result["errors"]] == []
    assert sum(result["ok"] for result in results) == 4 * count * len(addresses)
