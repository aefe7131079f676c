"""How often the tunnel is tried before it is called silent."""

from __future__ import annotations

import pytest
from midstream_agent.settings import Timeouts
from midstream_agent.tunnel import pauses_s

LOST = 1 / 3  # of the packets, each way
PROOFS = 2  # a small packet, a full-size one


def test_a_tunnel_that_loses_a_third_is_called_silent_less_than_once_in_a_hundred_thousand_proofs() -> None:
    tries = len(list(pauses_s(Timeouts())))
    fails = 1 - (1 - LOST) ** 2
    assert PROOFS * fails**tries < 1e-5


def test_a_silent_tunnel_is_given_up_after_its_time() -> None:
    timeouts = Timeouts()
    assert sum(pauses_s(timeouts)) == pytest.approx(timeouts.tunnel_probe_s)
    assert max(pauses_s(timeouts)) == timeouts.tunnel_probe_interval_max_ms / 1000


def test_the_first_probes_are_close_to_each_other_since_most_tunnels_answer_at_once() -> None:
    assert list(pauses_s(Timeouts()))[:3] == [0.005, 0.01, 0.02]
