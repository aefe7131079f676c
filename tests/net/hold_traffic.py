"""Holds that come and go, for test_unwitting.py: `hold_traffic.py BPFFS`.

Five times a second FLOWS flows of an address that nobody uses are frozen, held and let go, as by a migration. A line
on stdin starts it, another one ends it; each is answered by the number of rounds so far.
"""

from __future__ import annotations

import os
import select
import sys

from midstream_agent.hold import FLOW_FROZEN, FLOW_HELD, Hold
from midstream_agent.hold_layout import CTL
from midstream_agent.tcp import mapped

ADDRESS, FLOWS, PERIOD_S = "10.77.0.141", 256, 0.2


def keys() -> bytes:
    remote = mapped("198.18.1.1")
    return b"".join(mapped(ADDRESS) + remote + (8000).to_bytes(2, "big") + i.to_bytes(2, "big") for i in range(FLOWS))


def ordered(timeout_s: float) -> bool:
    """Has a line come?"""
    if not select.select([0], [], [], timeout_s)[0]:
        return False
    if not os.read(0, 1):
        sys.exit(0)
    return True


def main(bpffs: str) -> None:
    flows, rounds = keys(), 0
    with Hold.open(bpffs) as hold:
        while ordered(3600):
            print(rounds, flush=True)
            while True:
                hold.create_notes(flows, FLOWS)
                for state in (FLOW_FROZEN, FLOW_HELD):
                    hold.set_flows(flows, CTL.pack(state, *[0] * 7) * FLOWS, FLOWS)
                ended = ordered(PERIOD_S)
                assert hold.delete_flows(flows, FLOWS) == FLOWS
                hold.delete_notes(flows, FLOWS)
                rounds += 1
                if ended:
                    break
            print(rounds, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
