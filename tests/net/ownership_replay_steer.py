"""The replay of ownership_replay.py for switchover Steer: COMMIT needs no address, which follows when it likes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from midstream_testbed.namespace import Process
from ownership_model import Row
from ownership_replay import DECLARE_GONE, SOURCE, STOPS, TARGET, Replay
from world import V4

STEER_STOPS = STOPS | {
    "HEAR_RESTORED": (SOURCE, "source.SEND.do.after"),
    "MOVE_ADDRESS": (TARGET, "target.MOVE_ADDRESS.do.before"),  # announced by then
    "FOLLOW": (SOURCE, "source.FOLLOW.do.after"),
}
# No COMMIT is answered: the operator's word is.
GONE_STOPS = {
    "SOURCE_GONE": (TARGET, "target.ACTIVATE.do.journalled"),
    "GO_LIVE": (TARGET, "target.ACTIVATE.do.after"),
}


@dataclass
class SteerReplay(Replay):
    witness: Process | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stops = STEER_STOPS | (GONE_STOPS if "SOURCE_GONE" in self.names else {})

    def last_begun(self, i: int) -> str:
        return "SEND" if "SENT" in self.names[:i] else "EXPORT"

    def end(self) -> str:
        if "SOURCE_DIES" not in self.done:
            return super().end()
        self.led[TARGET].go_on()
        if self.witness is None:
            self.witness = self.tell(self.target, self.source)
        assert self.witness.wait(20) == 0, self.witness.output()
        return ""

    # -- doing a row -----------------------------------------------------------------------------------

    def _move_address(self, i: int) -> None:
        if "SOURCE_DIES" in self.done:  # with the operator's word, before the streams go live
            self.witness = self.witness or self.tell(self.target, self.source)
            return
        self.release(SOURCE, i)
        self.step(i, *self.stops["MOVE_ADDRESS"])

    def _address_moved(self, i: int) -> None:
        if "ADDRESS_REVERSED" in self.done:
            self.release(TARGET, i)  # it asks again with every probe

    def _address_reversed(self, i: int) -> None:
        self.world.vpc.fabric.reverse(V4)

    def _follow(self, i: int) -> None:
        self.release(TARGET, i)
        self.step(i, *self.stops["FOLLOW"])

    def _move_back(self, i: int) -> None:
        self.declare_gone()

    def _source_dies(self, i: int) -> None:
        """Off the network, every process killed, all sockets gone."""
        self.led[SOURCE].agent.host.delete()

    def _source_gone(self, i: int) -> None:
        self.led[TARGET].go_on(self.stops["SOURCE_GONE"][1])
        self.witness = self.tell(self.target, self.source)
        self.led[TARGET].reach(self.stops["SOURCE_GONE"][1])

    def tell(self, to: str, gone: str) -> Process:
        """The operator's word, whose answer may take as long as the run wants."""
        fleet = self.world.fleet
        argv = [sys.executable, "-c", DECLARE_GONE, str(fleet.inventory), to, self.job, gone]
        return fleet.operator.popen(argv, env=fleet.env(), name="gone", stdin=subprocess.DEVNULL)

    # -- comparing -------------------------------------------------------------------------------------

    def wanted(self, i: int, row: Row) -> dict[str, Any]:
        wanted = super().wanted(i, row)
        if "SOURCE_DIES" in self.done:
            for what in ("live at source", "source's journal"):
                wanted.pop(what, None)
        if row.name == "GO_LIVE" and "SOURCE_DIES" in self.done:
            wanted.pop("address at")  # asked for before, here
        if row.name == "FOLLOW":
            wanted["address at"] = self.target
        return wanted
