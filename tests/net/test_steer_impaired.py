"""The tunnel loses packets and brings them in another order: streams cross it all the same, byte for byte.

The move takes three seconds, all of which streams spend in the tunnel: downloads, uploads, from all places.
"""

from __future__ import annotations

import impair
import pytest
from midstream_testbed.namespace import Namespace
from remains import Remains
from world import V4, V6, World

CLIENTS_A_PLACE = 3
MOVE_S = 3.0


def out_of_order(where: Namespace) -> int:
    """Segments that came before one they follow (TcpExt TCPOFOQueue), of a namespace's connections."""
    names, values = (line.split() for line in where.proc_net("netstat").splitlines() if line.startswith("TcpExt:"))
    return int(values[names.index("TCPOFOQueue")])


@pytest.mark.parametrize(("lost_in", "late_in"), [(100, 0), (0, 10), (100, 10)], ids=["lossy", "reordering", "both"])
def test_streams_cross_a_bad_tunnel(steer_world: World, lost_in: int, late_in: int) -> None:
    world = steer_world
    world.vpc.fabric.move_seconds = MOVE_S
    before = out_of_order(world.outside)
    with impair.between(world, lost_in=lost_in, late_in=late_in) as impaired:
        groups = [
            world.clients(place, CLIENTS_A_PLACE, 7 * i, address=address, kind="both", size=1_500_000, seconds=4.0)
            for i, place in enumerate(world.places().values())
            for address in (V4, V6)
        ]
        world.wait_streams(V4, 4 * CLIENTS_A_PLACE)
        report = world.hop()
        results = [g.finish() for g in groups]
    world.vpc.fabric.move_seconds = 0
    assert (report["phase"], report["switchover"]) == ("PHASE_SUCCEEDED", "Steer"), report["output"]
    assert [e for r in results for e in r["errors"]] == []
    assert sum(r["ok"] for r in results) == len(groups) * CLIENTS_A_PLACE
    assert bool(impaired.lost) == bool(lost_in)
    assert bool(impaired.late) == bool(late_in)
    assert out_of_order(world.outside) > before
    print(f"\nlost {impaired.lost}, late {impaired.late}, out of order {out_of_order(world.outside) - before}")
    Remains.settled(world)


def test_the_proof_is_patient_with_a_tunnel_that_loses_a_third(steer_world: World) -> None:
    """A tunnel that works badly is still better than waiting; what does not work at all is told from it."""
    with impair.between(steer_world, lost_in=3) as impaired:
        report = steer_world.hop()
    assert (report["phase"], report["switchover"]) == ("PHASE_SUCCEEDED", "Steer"), report["output"]
    assert impaired.lost > 0
