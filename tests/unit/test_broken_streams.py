"""A stream that cannot be made live is counted and named in the job's report."""

from __future__ import annotations

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.source import count_broken


def test_lost_streams_are_counted_and_each_reason_is_said_once() -> None:
    report, said = pb.JobReport(), list[tuple[str, str, str]]()
    count_broken(report, "COMMIT", ["no room", "no room", "gone"], lambda *event: said.append(event))
    assert report.streams.lost == 3
    assert said == [("COMMIT", "stream lost", "gone"), ("COMMIT", "stream lost", "no room")]
    count_broken(report, "COMMIT", [], lambda *event: said.append(event))
    assert (report.streams.lost, len(said)) == (3, 2)
