"""What an answer of vLLM is asked to go on with, for each kind of parameters; no server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from midstream_runtime.engine.protocol import EngineState, SamplingParams, TokenEvent
from midstream_runtime.engine.vllm.answer import Answer, Diverged

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(max_tokens=20, temperature=0)


def chunk(ids: list[int], text: str, reason: str | None = None, logprobs: list[float] | None = None) -> dict[str, Any]:
    detail = {"token_logprobs": logprobs} if logprobs else None
    return {"choices": [{"token_ids": ids, "text": text, "finish_reason": reason, "logprobs": detail}]}


def begun(params: SamplingParams, *chunks: dict[str, Any]) -> Answer:
    answer = Answer.new(PROMPT, params)
    assert answer.begin() == PROMPT
    for one in chunks:
        answer.take(one)
    return answer


def elsewhere(answer: Answer) -> Answer:
    """As it arrives at another node."""
    return Answer.restore(EngineState.from_json(json.loads(json.dumps(answer.state().to_json()))))


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_a_greedy_answer_goes_on_from_all_its_ids() -> None:
    there = elsewhere(begun(GREEDY, chunk([10], "a"), chunk([11], "b")))
    assert there.begin() == [*PROMPT, 10, 11]
    body = there.body("m", there.kv_ids)
    assert (body["max_tokens"], body["prompt"]) == (18, [*PROMPT, 10, 11])
    assert text(there.take(chunk([12], "c"))) == "c"


def test_half_a_character_is_generated_again() -> None:
    there = elsewhere(begun(GREEDY, chunk([10], "a"), chunk([200], ""), chunk([201], "")))
    assert there.begin() == [*PROMPT, 10]
    assert there.take(chunk([200], "")) == there.take(chunk([201], "")) == []
    events = there.take(chunk([202], "ü"))
    assert [(e.token_id, e.text) for e in events] == [(202, "ü")]
    assert there.ids == [10, 200, 201, 202]


def test_text_that_came_with_several_ids_is_compared_and_skipped() -> None:
    there = elsewhere(begun(GREEDY, chunk([10], "a"), chunk([11, 12], "bc")))
    assert there.begin() == [*PROMPT, 10]
    assert text(there.take(chunk([11], "b"))) == ""
    assert text(there.take(chunk([12, 13], "cd"))) == "d"


def test_several_ids_whose_text_is_known_to_be_whole_are_not_generated_again() -> None:
    there = elsewhere(begun(GREEDY, chunk([10, 11], "ab")))
    there.settle()
    assert there.begin() == [*PROMPT, 10, 11]
    assert text(there.take(chunk([12], "c"))) == "c"


@pytest.mark.parametrize(
    ("params", "mode"),
    [
        (GREEDY, "ids"),
        (SamplingParams(temperature=1.0), "ids"),
        (SamplingParams(temperature=1.0, seed=4), "replay"),
        (SamplingParams(temperature=0, seed=4), "ids"),
        (SamplingParams(temperature=0, repetition_penalty=1.2), "ids"),
        (SamplingParams(temperature=0, presence_penalty=0.5), "replay"),
        (SamplingParams(temperature=0.7, frequency_penalty=0.5), "replay"),
        (SamplingParams(temperature=0, seed=4, unset=("temperature",)), "replay"),
    ],
)
def test_the_way_an_answer_goes_on_follows_from_its_parameters(params: SamplingParams, mode: str) -> None:
    assert Answer.new(PROMPT, params).mode == mode


def test_what_may_be_replayed_has_a_seed_though_none_was_given() -> None:
    answer = Answer.new(PROMPT, SamplingParams(temperature=0.7, presence_penalty=1))
    assert answer.seed is not None
    assert elsewhere(answer).body("m", PROMPT)["seed"] == answer.seed
    assert "seed" not in Answer.new(PROMPT, SamplingParams(temperature=0.7)).body("m", PROMPT)


def test_a_replay_begins_at_the_prompt_and_shows_only_what_is_new() -> None:
    there = elsewhere(begun(SamplingParams(temperature=1.0, seed=4), chunk([10], "a"), chunk([11, 12], "bc")))
    assert there.begin() == PROMPT
    assert there.body("m", PROMPT)["max_tokens"] == 256
    assert text(there.take(chunk([10, 11], "ab"))) == ""
    assert [(e.token_id, e.text) for e in there.take(chunk([12, 13], "cd"))] == [(13, "d")]
    again = elsewhere(there)
    assert (again.begin(), again.skip) == (PROMPT, "abcd")


def test_a_replay_that_diverges_goes_on_from_its_ids() -> None:
    there = elsewhere(begun(SamplingParams(temperature=1.0, seed=4), chunk([10], "a"), chunk([11], "b")))
    there.begin()
    with pytest.raises(Diverged):
        there.take(chunk([99], "z"))
    there.fall_back()
    assert there.begin() == [*PROMPT, 10, 11]
    assert text(there.take(chunk([12], "c"))) == "c"
    assert "seed" not in there.body("m", PROMPT)


def test_a_stop_string_is_found_across_a_move_and_its_beginning_is_held_back() -> None:
    here = Answer.new(PROMPT, SamplingParams(temperature=0, stop=("END",)))
    here.begin()
    assert text(here.take(chunk([10], "so E"))) == "so "
    there = elsewhere(here)
    assert there.begin() == [*PROMPT, 10]
    events = there.take(chunk([11], "ND and more"))
    assert (text(events), events[-1].finish_reason) == ("", "stop")
    assert there.finished


def test_text_held_for_a_stop_string_comes_when_the_answer_ends() -> None:
    here = begun(SamplingParams(temperature=0, stop=("END",)), chunk([10], "so E"))
    events = elsewhere(here).take(chunk([11], "N", "length"))
    assert (text(events), events[-1].finish_reason) == ("EN", "length")
    assert events[-1].usage is not None and events[-1].usage.completion_tokens == 2


def test_each_id_brings_its_logprob_once() -> None:
    here = Answer.new(PROMPT, SamplingParams(temperature=0, logprobs=True))
    here.begin()
    events = here.take(chunk([10], "a", logprobs=[-1.0])) + here.take(chunk([200], "", logprobs=[-2.0]))
    there = elsewhere(here)
    there.begin()
    events += there.take(chunk([200], "", logprobs=[-2.0])) + there.take(chunk([201], "ü", logprobs=[-3.0]))
    assert [(e.token_id, e.logprob) for e in events] == [(10, -1.0), (200, -2.0), (201, -3.0)]


def test_what_the_client_left_out_is_left_to_the_server() -> None:
    unset = ("temperature", "top_p", "top_k")
    body = Answer.new(PROMPT, SamplingParams(unset=unset)).body("m", PROMPT)
    assert not body.keys() & set(unset)


def test_an_answer_whose_tokens_are_all_there_ends_without_the_server() -> None:
    here = begun(SamplingParams(temperature=0, max_tokens=1), chunk([10], "a"))
    there = elsewhere(here)
    there.begin()
    assert there.body("m", there.kv_ids)["max_tokens"] == 0
    (event,) = there.give_up("length")
    assert (event.token_id, event.finish_reason) == (-1, "length")
