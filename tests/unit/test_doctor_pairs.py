"""Which pairs of nodes a doctor tries."""

from __future__ import annotations

import itertools

import pytest
from midstream_agent.contract.nodes import TRIED, next_to


@pytest.mark.parametrize("count", range(1, 8))
def test_up_to_seven_nodes_try_every_pair_once(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    tried = [frozenset((a, b)) for a in nodes for b in next_to(a, nodes)]
    assert sorted(map(sorted, tried)) == sorted(map(sorted, itertools.combinations(nodes, 2)))


def test_of_many_nodes_each_tries_a_few() -> None:
    nodes = [f"n{i:03}" for i in range(100)]
    assert all(len(next_to(n, nodes)) == TRIED for n in nodes)
