"""The journal: what survives a crash of the agent, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from midstream_agent.journal import Journal, journals


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal.create(tmp_path, "source", "job-1", {"pod": "p"})) as made:
        yield made


def test_decisions_and_their_bytes_survive_a_reload(journal: Journal) -> None:
    journal.intent("HOLD", "do")
    journal.decide("COMMIT", keys=b"\x00\xff", addresses=["10.0.0.1"])
    with closing(Journal.load(journal.path)) as again:
        assert again.facts["pod"] == "p"
        assert again.began("HOLD") and not again.began("EXPORT")
        decided = again.decided("COMMIT")
        assert decided is not None and decided["keys"] == b"\x00\xff" and decided["addresses"] == ["10.0.0.1"]
        assert again.decided("RELEASED") is None


def test_a_torn_last_line_is_dropped_and_the_file_goes_on(journal: Journal) -> None:
    journal.decide("SENT")
    with open(journal.path, "ab") as f:
        f.write(b'{"kind": "decision", "decision": "COM')
    with closing(Journal.load(journal.path)) as again:
        assert again.decided("SENT") is not None and again.decided("COM") is None
        again.decide("ABORT")
    with closing(Journal.load(journal.path)) as third:
        assert third.decided("ABORT") is not None


def test_removing_a_journal_takes_its_blobs_along(journal: Journal, tmp_path: Path) -> None:
    journal.blob_path("checkpoints").write_bytes(b"x")
    with closing(Journal.create(tmp_path, "source", "job-10", {})) as other:
        journal.remove()
        assert list(journals(tmp_path, "source")) == [other.path]
    assert not journal.blob_path("checkpoints").exists()


def test_a_job_takes_no_files_of_another_with_it(tmp_path: Path) -> None:
    first, second = (Journal.create(tmp_path, "source", job, {}) for job in ("a", "a.b"))
    for journal in (first, second):
        journal.blob_path("notes").write_bytes(b"")
    first.remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source-a.b.jsonl", "source-a.b.notes"]
    second.remove()
    assert list(tmp_path.iterdir()) == []
