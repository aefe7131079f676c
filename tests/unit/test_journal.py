"""The journal: what survives a crash of the agent, and how."""

from __future__ import annotations

from pathlib import Path

from midstream_agent.journal import Journal, journals


def test_decisions_and_their_bytes_survive_a_reload(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "source", "job-1", {"pod": "p"})
    journal.intent("HOLD", "do")
    journal.decide("COMMIT", keys=b"\x00\xff", addresses=["10.0.0.1"])
    again = Journal.load(journal.path)
    assert again.facts["pod"] == "p"
    assert again.began("HOLD") and not again.began("EXPORT")
    decided = again.decided("COMMIT")
    assert decided is not None and decided["keys"] == b"\x00\xff" and decided["addresses"] == ["10.0.0.1"]
    assert again.decided("RELEASED") is None


def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "source", "job-1", {})
    journal.decide("SENT")
    with open(journal.path, "ab") as f:
        f.write(b'{"kind": "decision", "decision": "COM')
    again = Journal.load(journal.path)
    assert again.decided("SENT") is not None and again.decided("COM") is None
    again.decide("ABORT")
    assert Journal.load(journal.path).decided("ABORT") is not None


def test_removing_a_journal_takes_its_blobs_along(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "target", "job-1", {})
    journal.blob_path("checkpoints").write_bytes(b"x")
    other = Journal.create(tmp_path, "target", "job-10", {})
    journal.remove()
    assert list(journals(tmp_path, "target")) == [other.path]
    assert not journal.blob_path("checkpoints").exists()
