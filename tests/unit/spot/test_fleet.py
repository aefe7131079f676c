"""A thousand nodes go within one second."""

from __future__ import annotations

from fleet import Fleet, run

DOOMED, SURVIVORS = 1000, 100


def test_a_thousand_nodes_are_planned_once_and_their_addresses_batched_under_the_rate_limit() -> None:
    fleet = Fleet(DOOMED, SURVIVORS)
    source = run(fleet, foreign=500)
    assert len(fleet.jobs) == len(fleet.plans) == DOOMED, "two sources, one job"
    assert source.outcomes == {"recorded": DOOMED, "foreign": 500}
    assert not [made for made in fleet.plans.values() if made.late], "all are told that they make it"
    survivors = {fleet.instance(node) for node in list(fleet.nodes)[DOOMED:]}
    assert fleet.owners().total() == DOOMED and set(fleet.owners()) <= survivors
    assert max(fleet.owners().values()) <= 14, "a g5.xlarge's interface holds no more"
    calls = fleet.ec2.called("AssignPrivateIpAddresses")
    moved = [address for call in calls if not call.code for address in call.parameters["PrivateIpAddresses"]]
    assert sorted(moved) == sorted(fleet.addresses.values()), "each once"
    assert len(calls) <= 3 * SURVIVORS, "addresses of one interface go together, also while they wait for their turn"
    assert not [call for call in fleet.ec2.calls if call.code == "RequestLimitExceeded"]
    assert len(fleet.ec2.calls) - len(calls) <= DOOMED // 2, "one listing serves many who ask"
