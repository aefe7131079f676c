"""The rules of docs/ownership.md hold in every run of the model, and each rule is needed: without it spin finds a run
that breaks what it protects.

Searches are exhaustive: all states, not a sample. Steer has two batches at once, Wait one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from ownership_model import MODEL, Checker, Found, rows_of_model, run_finder

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/ownership.md"
SAFETY, ENDS = ("-DSAFETY",), ("-DNP",)
STEER_ONLY = {"MOVE_EARLY", "MOVE_BACK", "ADDRESS_REVERSED", "FOLLOW"}
WAIT_ONLY = {"TAKE_ADDRESS", "PROVE_ADDRESS", "TAKE_ADDRESS_BACK"}
IMPOSSIBLE = {"COMMIT_UNKNOWN", "HEAR_UNKNOWN"}

TWO_OWNERS = {"!(slive[b])", "!(tlive[b])"}
ONLY_ON_COMMIT = "(decided[b]||sdead)"
STALE = "!(thawed[b])"
NEVER_BACK = "!(decided[b])"
COMMIT_FINDS_THE_JOB = "0"
NONE_FOR_EVER = "(excused[0]&&((phase[0]==LOST)||((phase[0]==MOVED)&&(tdead||!(tpod)))))"
JOB_ENDS = "(released||sdead)"
NOTHING_HELD_FOR_NOBODY = "((state[0]!=PREPARED)&&((state[0]!=RESTORED)||!(tpod)))"
WHERE_IT_LIVES = "(addr==AT_TARGET)"
ONE_STORY = "((phase[0]==MOVED)||sdead)"  # what lives at the target was not called lost

BROKEN_RULES = {
    1: ("the source thaws without the target's word", {STALE, NOTHING_HELD_FOR_NOBODY}),
    2: ("COMMIT is said before it is journalled", {ONLY_ON_COMMIT, JOB_ENDS}),
    3: ("the target takes silence for the source's death", {ONLY_ON_COMMIT, JOB_ENDS}),
    4: ("a restarted source forgets SENT", {STALE, NOTHING_HELD_FOR_NOBODY}),
    5: ("a job is aborted after COMMIT", {NEVER_BACK, NONE_FOR_EVER}),
    6: ("the source takes silence for the target's death", {ONE_STORY, NOTHING_HELD_FOR_NOBODY}),
    7: ("RESTORED is said and not journalled", {COMMIT_FINDS_THE_JOB}),
    8: ("a discard is confirmed before it is done", {STALE, NOTHING_HELD_FOR_NOBODY}),
    9: ("the target may forget before RELEASED is journalled", {COMMIT_FINDS_THE_JOB}),
    10: ("a restarted source without its pod gives up", {NONE_FOR_EVER, NOTHING_HELD_FOR_NOBODY}),
    12: ("a restarted target takes ACTIVATED for RESTORED", {"!(tlive[b])"}),
    13: ("each takes the other's silence for its death", TWO_OWNERS),
}

Build = Callable[..., Checker]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def _build(*defines: str, wait: bool, search: tuple[str, ...]) -> Checker:
        return Checker(tmp_path / "-".join(("model", *defines)), *defines, wait=wait, search=search)

    return _build


@pytest.mark.parametrize("wait", [True, False], ids=["wait", "steer"])
def test_no_run_breaks_a_rule_and_every_row_happens(build: Build, wait: bool) -> None:
    found = build(wait=wait, search=SAFETY).search()
    assert found.clean, found.output
    assert found.unreached == IMPOSSIBLE | (STEER_ONLY if wait else WAIT_ONLY)
    assert found.states > (50_000 if wait else 3_000_000)  # fewer: faults or batches were left out


@pytest.mark.parametrize("wait", [True, False], ids=["wait", "steer"])
def test_once_faults_end_every_job_ends(build: Build, wait: bool) -> None:
    found = build(wait=wait, search=ENDS).search("-l")
    assert found.clean, found.output


@pytest.mark.parametrize("mutant", BROKEN_RULES)
def test_each_rule_is_needed(build: Build, mutant: int) -> None:
    rule, expected = BROKEN_RULES[mutant]
    found = build(f"MUTANT={mutant}", wait=True, search=SAFETY).search()
    assert expected <= symbolic(found), f"{rule}: {symbolic(found)}"


def test_an_answer_that_asks_to_be_asked_again_for_ever_is_found(build: Build) -> None:
    assert build("MUTANT=11", wait=True, search=ENDS).search("-l").cycle


def test_two_batches_at_once_find_a_broken_rule_too(build: Build) -> None:
    assert build("MUTANT=1", wait=False, search=SAFETY).first_error().violated


def test_a_source_that_lets_go_before_the_address_has_followed_is_found(build: Build) -> None:
    assert WHERE_IT_LIVES in symbolic(build("MUTANT=14", "ONE", wait=False, search=SAFETY).search())


def test_the_model_documents_its_negative_controls() -> None:
    text = MODEL.read_text(encoding="ascii")
    used = {int(n) for n in re.findall(r"MUTANT [!=]= (\d+)", text)}
    listed = {int(n) for n in re.findall(r"^ \* {1,3}(\d+)  ", text, re.M)}
    assert used == listed == {*BROKEN_RULES, 11, 14}


def test_the_document_has_the_models_rows_and_no_others() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    assert len(rows) == len(set(rows))
    assert set(rows) == rows_of_model()


def test_a_shortest_run_says_what_is_true_after_each_row(tmp_path: Path) -> None:
    rows = run_finder(tmp_path / "runs").shortest_run("HEAR_ACTIVATED RELEASE FORGET")
    names = [r.name for r in rows]
    assert names[0] == "HOLD" and names[-2:] == ["RELEASE", "FORGET"]
    assert names.index("COMMIT") < names.index("ACTIVATED") < names.index("GO_LIVE")
    before, after = rows[names.index("ACTIVATED")], rows[names.index("GO_LIVE")]
    assert (before.live, after.live) == ((False, False), (False, True))
    assert after.source == (True, True, False) and after.target == (True, True, False)


def symbolic(found: Found) -> set[str]:
    """Violated assertions by the model's own words: pan writes the names of states as numbers."""
    names = {v: k for k, v in _numbers().items()}

    def named(match: re.Match[str]) -> str:
        return f"{match[1]}{names[int(match[2])]}"

    return {re.sub(r"((?:phase\[\w+\]|state\[\w+\]|addr)[!=]=)(\d+)", named, v) for v in found.violated}


def _numbers() -> dict[str, int]:
    """spin numbers the names of all `mtype` lists from the last of a list to its first, list after list."""
    found: dict[str, int] = {}
    text = re.sub(r"/\*.*?\*/", "", MODEL.read_text(encoding="ascii"), flags=re.S)
    for body in re.findall(r"^mtype = \{(.*?)\}", text, re.M | re.S):
        names = re.findall(r"\w+", body)
        found |= {name: len(found) + len(names) - i for i, name in enumerate(names)}
    return found
