"""Messages of the queue: what each says, what is none of our business, what is poison."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import notice_bodies as bodies
import pytest
from hypothesis import given
from hypothesis import strategies as st
from midstream_operator.notices.base import Notice, NoticeKind
from midstream_operator.notices.eventbridge import Poison, parse
from notice_bodies import NODE

AT = datetime(2026, 11, 25, 10, 0, tzinfo=UTC)
SOON, AT_ONCE = AT + timedelta(seconds=120), AT + timedelta(seconds=10)

SAID: list[tuple[str, dict[str, Any], NoticeKind, datetime | None, dict[str, str]]] = [
    ("spot", bodies.spot(), NoticeKind.SPOT_INTERRUPTION, SOON, {"action": "terminate"}),
    ("spot, stop", bodies.spot(action="stop"), NoticeKind.SPOT_INTERRUPTION, SOON, {"action": "stop"}),
    ("hibernate", bodies.spot(action="hibernate"), NoticeKind.SPOT_INTERRUPTION, AT_ONCE, {"action": "hibernate"}),
    ("reservation", bodies.reservation(), NoticeKind.CAPACITY_RESERVATION, SOON, {"action": "terminate"}),
    ("rebalance", bodies.rebalance(), NoticeKind.REBALANCE, None, {}),
    ("stopping", bodies.state("stopping"), NoticeKind.STATE_CHANGE, AT, {"state": "stopping"}),
    ("shutting down", bodies.state("shutting-down"), NoticeKind.STATE_CHANGE, AT, {"state": "shutting-down"}),
    ("terminated", bodies.state("terminated"), NoticeKind.STATE_CHANGE, AT, {"state": "terminated"}),
    *(
        (name, body, NoticeKind.LIFECYCLE, None,
         {"token": bodies.LIFECYCLE["LifecycleActionToken"], "group": "llm", "hook": "midstream"})
        for name, body in [
            ("lifecycle", bodies.lifecycle()),
            ("lifecycle, bare", bodies.bare_lifecycle()),
            ("lifecycle, bare, wrapped", bodies.wrapped(bodies.bare_lifecycle())),
            ("lifecycle, wrapped", bodies.wrapped(bodies.lifecycle())),
        ]
    ),
    ("health", bodies.health(NODE), NoticeKind.MAINTENANCE, datetime(2026, 11, 25, 12, 0, tzinfo=UTC),
     {"code": "AWS_EC2_INSTANCE_REBOOT_MAINTENANCE_SCHEDULED"}),
    ("health, ISO time", bodies.health(NODE, startTime="2026-11-25T12:00:00Z"), NoticeKind.MAINTENANCE,
     datetime(2026, 11, 25, 12, 0, tzinfo=UTC), {"code": "AWS_EC2_INSTANCE_REBOOT_MAINTENANCE_SCHEDULED"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body", "kind", "deadline", "details"), SAID, ids=[case[0] for case in SAID])
def test_what_a_message_says(
    name: str, body: dict[str, Any], kind: NoticeKind, deadline: datetime | None, details: dict[str, str]
) -> None:
    (notice,) = parse(json.dumps(body)).notices
    assert (notice.kind, notice.instance_id, notice.source) == (kind, NODE, "sqs")
    assert notice.deadline == deadline and notice.details == details
    assert notice.issued_at is not None and abs(notice.issued_at - AT) < timedelta(seconds=1)


def test_one_health_event_may_be_about_many() -> None:
    notices = parse(json.dumps(bodies.health(NODE, "i-2", "i-3"))).notices
    assert [notice.instance_id for notice in notices] == [NODE, "i-2", "i-3"]
    assert len({notice.id for notice in notices}) == 3


def test_the_same_notice_from_two_sources_has_one_id() -> None:
    (by_sqs,) = parse(json.dumps(bodies.spot())).notices
    by_imds = Notice(NoticeKind.SPOT_INTERRUPTION, "imds", node="node-a", instance_id=NODE)
    by_taint = Notice(NoticeKind.SPOT_INTERRUPTION, "node", node="node-a", instance_id=NODE)
    (rebalance,) = parse(json.dumps(bodies.rebalance())).notices
    assert by_sqs.id == by_imds.id == by_taint.id != rebalance.id


@pytest.mark.parametrize(
    "body",
    [
        bodies.TEST_NOTIFICATION,
        bodies.wrapped(bodies.TEST_NOTIFICATION),
        bodies.state("running"),
        bodies.state("pending"),
        bodies.event("EC2 Spot Instance Request Fulfillment", "aws.ec2", **{"instance-id": NODE}),
        bodies.event("Scheduled Event", "aws.events"),
        {**bodies.bare_lifecycle(), "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING"},
        bodies.health(NODE, service="RDS"),
        bodies.health(NODE, category="issue"),
        bodies.health(NODE, statusCode="closed"),
    ],
)
def test_what_is_none_of_our_business_is_ignored(body: dict[str, Any]) -> None:
    parsed = parse(json.dumps(body))
    assert parsed.notices == () and parsed.ignored


def without(body: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in body.items() if k != key}


@pytest.mark.parametrize(
    "body",
    [
        "", "not json", "[]", "null", '"text"', "{}", "[" * 100_000,
        json.dumps(without(bodies.spot(), "detail")),
        json.dumps(without(bodies.spot(), "time")),
        json.dumps({**bodies.spot(), "time": "yesterday"}),
        json.dumps({**bodies.spot(), "time": 5}),
        json.dumps({**bodies.spot(), "detail": "x"}),
        json.dumps({**bodies.spot(), "detail": {"instance-action": "terminate"}}),
        json.dumps(bodies.spot("../../etc/passwd")),
        json.dumps(bodies.spot("i-" + "0" * 100)),
        json.dumps(bodies.state("")),
        json.dumps(without(bodies.bare_lifecycle(), "LifecycleActionToken")),
        json.dumps({**bodies.bare_lifecycle(), "EC2InstanceId": None}),
        json.dumps(bodies.health(NODE, affectedEntities="all")),
        json.dumps(bodies.health(NODE, affectedEntities=["x"])),
        json.dumps({"Message": "not json"}),
    ],
    ids=repr,
)  # fmt: skip
def test_poison_is_named(body: str) -> None:
    with pytest.raises(Poison) as caught:
        parse(body)
    assert str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
GOOD = [body for _, body, *_ in SAID]


@given(st.sampled_from(GOOD), st.data())
def test_no_body_breaks_the_parser(body: dict[str, Any], data: st.DataObject) -> None:
    """A good body in which one field, of it or of its detail, is something else."""
    spoiled = json.loads(json.dumps(body))
    place = spoiled["detail"] if "detail" in spoiled and data.draw(st.booleans()) else spoiled
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    try:
        parsed = parse(json.dumps(spoiled))
    except Poison:
        return
    assert parsed.notices or parsed.ignored or spoiled.get("detail", {}).get("affectedEntities") == []
