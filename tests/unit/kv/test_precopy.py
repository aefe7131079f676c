"""Pre-copy between two pods whose answers go on meanwhile: what is sent, what is not, and that no token changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from kv_ends import SETTINGS
from kv_pods import KV, LOOPBACK, Pod, moving, text_of, two_pods
from midstream_agent.kv import Geometry
from midstream_agent.precopy import Progress, Round, fits, tail_bound_s, tail_choice
from midstream_runtime.contract.errors import Final

Engines = tuple[str, str]
_numbers = count(1)
SYSTEM = "You are a patient teacher. " * 12
TOKENS = 400


def new_prompt() -> str:
    """One that the engines, which serve all tests, have not cached."""
    return f"{next(_numbers)}. It is a truth universally acknowledged, that a single man in possession of a fortune"


def run(engines: Engines, folder: Path, test: Callable[[Pod, Pod], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(200), two_pods(engines, folder) as (a, b):
            await test(a, b)

    asyncio.run(main())


@pytest.mark.parametrize("settings", [replace(KV, tls=False), KV], ids=["plain", "tls"])
def test_full_blocks_go_before_the_pause_and_the_answer_is_the_same(
    engines: Engines, tmp_path: Path, settings: object
) -> None:
    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 100)
        before = await b.totals()
        async with moving(tmp_path, a, b, settings) as move:  # type: ignore[arg-type]
            await move.rounds()
            rounds = move.copy.progress.rounds
            assert len(rounds) >= 2 and rounds[0].named_bytes > rounds[1].named_bytes, "decoding went on meanwhile"
            early = sum(r.sent_bytes for r in rounds) // a.view.geometry.slot_bytes
            assert early >= 100 // 16 - 2
            await move.switch()
            assert len(move.ids) - early <= 3, "the tail is short"
            assert all(move.ids) and -1 not in move.slots
        assert await text_of(client) == wanted
        after = await b.totals()
        assert after["prefill_tokens"] == before.get("prefill_tokens", 0), "nothing was computed again"
        assert after["kv_blocks_shared"] - before.get("kv_blocks_shared", 0) == early

    run(engines, tmp_path, body)


def test_one_damaged_byte_behind_the_check_changes_the_answer(engines: Engines, tmp_path: Path) -> None:
    """The control of all others: the target does use what came, also from the rounds."""

    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 60)
        async with moving(tmp_path, a, b) as move:
            await move.rounds()
            await move.switch(flip="after it came")
        assert await text_of(client) != wanted

    run(engines, tmp_path, body)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "believed"])
def test_a_block_that_is_damaged_on_its_way_is_found_by_its_checksum(
    engines: Engines, tmp_path: Path, verify: bool
) -> None:
    """Without the check the answer is another one: it is the check that keeps it the same."""

    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 60)
        async with moving(tmp_path, a, b) as move:
            move.target.receiver._verify = verify
            await move.switch(flip="before it is sent")
            assert move.report.reason == ("kv_checksum" if verify else "")
            assert (move.slots[1] == -1) == verify
        assert (await text_of(client) == wanted) == verify

    run(engines, tmp_path, body)


def test_a_beginning_that_streams_share_is_sent_once(engines: Engines, tmp_path: Path) -> None:
    """32 streams with one system prompt: its blocks go once, and are in the target's pool once."""

    async def body(a: Pod, b: Pod) -> None:
        prompts = [f"{SYSTEM}Question {n}:" for n in range(32)]
        wanted = await asyncio.gather(*[text_of(await a.ask(prompt, 200)) for prompt in prompts])
        clients = [await a.ask(prompt, 200) for prompt in prompts]
        await a.wait_for(32, len(await a.engine.tokenize(prompts[0])) + 8)
        shared_blocks = len(await a.engine.tokenize(SYSTEM)) // 16
        assert shared_blocks > 5
        async with moving(tmp_path, a, b, spare=64) as move:
            await move.rounds()
            first = move.copy.progress.rounds[0]
            size = a.view.geometry.slot_bytes
            assert first.shared_bytes >= 31 * (shared_blocks - 1) * size
            assert first.sent_bytes == first.named_bytes - first.shared_bytes
            await move.switch()
            used = [slot for slot in move.slots if slot >= 0]
            assert len(used) == len(move.ids)
            assert len(set(used)) <= len(used) - 31 * (shared_blocks - 1)
        assert await asyncio.gather(*map(text_of, clients)) == wanted

    run(engines, tmp_path, body)


def test_what_the_target_has_from_an_earlier_answer_is_not_sent(engines: Engines, tmp_path: Path) -> None:
    async def body(a: Pod, b: Pod) -> None:
        prompt = f"{SYSTEM}What has been here before?"
        await text_of(await b.ask(prompt, 4))
        wanted = await text_of(await a.ask(prompt, 300))
        client = await a.ask(prompt, 300)
        blocks = len(await a.engine.tokenize(prompt)) // 16
        await a.wait_for(1, blocks * 16 + 20)
        async with moving(tmp_path, a, b) as move:
            await move.rounds()
            assert move.target.shared_blocks >= blocks - 1
            assert move.copy.progress.rounds[0].shared_bytes >= (blocks - 1) * a.view.geometry.slot_bytes
            await move.switch()
        assert await text_of(client) == wanted

    run(engines, tmp_path, body)


def test_a_stream_that_shares_the_whole_tail_with_another_is_moved_with_it(engines: Engines, tmp_path: Path) -> None:
    """Equal questions, no round before the pause: blocks of one hash go once also then."""

    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, 200))
        clients = [await a.ask(prompt, 200) for _ in range(4)]
        await a.wait_for(4, 80)
        async with moving(tmp_path, a, b, spare=64) as move:
            await move.switch()
            assert all(move.ids) and -1 not in move.slots
            assert len(set(move.ids)) < len(move.ids)
        assert {await text_of(client) for client in clients} == {wanted}

    run(engines, tmp_path, body)


def test_a_full_pool_at_the_target_means_replay_and_is_said(engines: Engines, tmp_path: Path) -> None:
    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 100)
        free = int((await b.engine.stats())["free_slots"])
        blocker = await b.engine.reserve(free - 3)
        async with moving(tmp_path, a, b) as move:
            await move.rounds()
            await b.engine.free(blocker[:200])  # for the answer itself
            await move.switch()
            assert move.target.full
            assert move.copy.recomputed.get("pool_full", 0) == move.report.blocks_recomputed > 0
            assert move.report.reason == "pool_full"
            assert -1 in move.slots
        assert await text_of(client) == wanted
        await b.engine.free(blocker)

    run(engines, tmp_path, body)


def test_kv_is_dropped_before_a_deadline_is_missed(engines: Engines, tmp_path: Path) -> None:
    """The link takes a block in 40 ms; what is left of the time is less than the copy needs."""

    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 60)
        slow = replace(KV, piece_bytes=1 << 10, bytes_per_s=25 * a.view.geometry.slot_bytes, tail_ms=0)
        async with moving(tmp_path, a, b, slow) as move:
            move.report.bytes_total = 1000 * a.view.geometry.slot_bytes
            await move.rounds(deadline_unix_ms=int((time.time() + slow.switch_s + 10) * 1000))
            assert move.copy.trouble is not None and move.copy.trouble.code == "kv_deadline"
            await move.switch()
            assert move.report.reason == "kv_deadline"
            assert -1 in move.slots and set(move.slots) != {-1}, "what had come is used"
        assert await text_of(client) == wanted

    run(engines, tmp_path, body)


def test_clients_do_not_wait_for_a_tail_that_does_not_come(engines: Engines, tmp_path: Path) -> None:
    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 100)
        slow = replace(KV, piece_bytes=1 << 10, bytes_per_s=1 << 10, tail_s=0.2)
        async with moving(tmp_path, a, b, slow) as move:
            await move.switch()
            assert move.report.reason == "kv_slow" and set(move.slots) == {-1}
        assert await text_of(client) == wanted

    run(engines, tmp_path, body)


def test_of_a_tail_that_takes_too_long_what_came_in_time_is_used(engines: Engines, tmp_path: Path) -> None:
    """The link takes 20 blocks a second, and clients wait for a fifth of a second."""

    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 100)
        limit = 20 * a.view.geometry.slot_bytes
        slow = replace(KV, streams=1, piece_bytes=1 << 10, bytes_per_s=limit, tail_s=0.2)
        async with moving(tmp_path, a, b, slow) as move:
            await move.switch()
            came = [slot for slot in move.slots if slot != -1]
            assert 0 < len(came) < len(move.slots) and move.slots[: len(came)] == came
            assert (move.report.reason, move.report.blocks_recomputed) == ("kv_slow", len(move.slots) - len(came))
        assert await text_of(client) == wanted

    run(engines, tmp_path, body)


def test_a_block_that_is_not_what_the_ids_say_is_computed_again(engines: Engines, tmp_path: Path) -> None:
    """The target's engine checks the names of shared blocks against the tokens: a wrong slot is not believed."""

    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 100)
        before = await b.totals()
        async with moving(tmp_path, a, b) as move:
            await move.rounds()
            landed = [move.target.receiver.landed(n) for n in sorted(move.target.receiver.landed_ids())]
            slots = [block.slot for block in landed if block is not None and block.name]
            paused = len(slots)
            assert paused >= 3
            await move.rounds()
            slots[0], slots[1] = slots[1], slots[0]
            names = len((await a.agent.ask("pause", {"job": "j", "addresses": [LOOPBACK]})).header["kv"])
            await move.switch(slots=slots + [-1] * (names - len(slots)))
        assert await text_of(client) == wanted
        after = await b.totals()
        assert after["kv_hash_mismatch"] == before.get("kv_hash_mismatch", 0) + 1
        assert after["prefill_tokens"] > before.get("prefill_tokens", 0)

    run(engines, tmp_path, body)


def test_streams_that_break_for_good_mean_replay_and_are_named(engines: Engines, tmp_path: Path) -> None:
    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        wanted = await text_of(await a.ask(prompt, TOKENS))
        client = await a.ask(prompt, TOKENS)
        await a.wait_for(1, 100)
        async with moving(tmp_path, a, b, replace(KV, tries=1, tail_ms=0)) as move:
            await move.copy.round([LOOPBACK])
            move.server.forget(move.target.receiver)
            move.source._sender.interrupt()
            await a.wait_for(1, 140)
            await move.rounds()
            assert move.copy.trouble is not None and move.copy.trouble.code == "kv_broken"
            await move.switch()
            assert move.copy.recomputed.get("kv_broken", 0) == move.report.blocks_recomputed > 0
            assert move.report.reason == "kv_broken"
            assert -1 in move.slots and set(move.slots) != {-1}, "what had landed is used"
        assert await text_of(client) == wanted

    run(engines, tmp_path, body)


def test_an_agent_that_goes_away_in_mid_copy_leaves_both_pools_as_they_were(engines: Engines, tmp_path: Path) -> None:
    async def body(a: Pod, b: Pod) -> None:
        prompt = new_prompt()
        client = await a.ask(prompt, 120)
        await a.wait_for(1, 60)
        async with moving(tmp_path, a, b) as move:
            await move.rounds()
            move.source._handoff._sock.shutdown(2)  # nobody says kv_end
            move.target._handoff._sock.shutdown(2)
        await text_of(client)

    run(engines, tmp_path, body)  # two_pods waits until every slot is free


def test_a_pod_whose_slots_are_outside_its_pool_is_refused(tmp_path: Path) -> None:
    from kv_ends import ends, fill

    async def main() -> None:
        async with ends(tmp_path) as e:
            (block,) = fill(e.source, 1)
            with pytest.raises(Final, match="kv_slot"):
                await e.sender.send([replace(block, slot=1 << 20)])

    asyncio.run(main())


# -- decisions ------------------------------------------------------------------------------------------------------


def a_round(sent: int, took_s: float = 1.0, since_s: float = 1.0, named: int | None = None) -> Round:
    return Round(sent if named is None else named, 0, sent, 0, took_s, since_s)


def test_rounds_end_when_little_is_left_or_nothing_is_won() -> None:
    settings = replace(SETTINGS, tail_ms=5, shrink=0.8, rounds_max=10)
    for sizes, more in (
        ([], True),
        ([1000_000], True),
        ([1000_000, 100_000], True),
        ([1000_000, 100_000, 1_000], False),  # 1 ms at the measured rate
        ([1000_000, 900_000], False),  # decoding is nearly as fast as the network
        ([1000_000, 2000_000], False),
        ([0], False),
    ):
        assert Progress(settings, [a_round(n) for n in sizes]).another() == more, sizes
    assert not Progress(replace(settings, rounds_max=2), [a_round(10**6), a_round(10**5)]).another()


def test_progress_knows_whether_it_converges() -> None:
    slow = Progress(SETTINGS, [a_round(8 * 10**6, 1.0), a_round(2 * 10**6, 0.25, 1.0)])
    assert slow.bytes_per_s == 8e6 and slow.new_bytes_per_s == 2e6 and slow.converging
    fast = Progress(SETTINGS, [a_round(8 * 10**6, 1.0), a_round(9 * 10**6, 1.2, 1.0)])
    assert not fast.converging
    assert Progress(SETTINGS).converging, "nothing is known yet"


@pytest.mark.parametrize(
    ("total", "rate", "new", "left_s", "answer"),
    [
        (17 << 30, 3_125_000_000, 125_000_000, 100, True),  # 32 x 4k tokens of Llama-3-8B at 25 Gb/s
        (17 << 30, 625_000_000, 125_000_000, 30, False),  # at 5 Gb/s it takes 37 s, decoding included
        (17 << 30, 625_000_000, 0, 30, True),
        (1 << 30, 10**9, 10**9, 1000, False),  # never converges
        (1, 0, 0, 100, False),
        (1, 10**9, 0, 0, False),
    ],
)
def test_a_copy_fits_before_the_deadline_or_not(
    total: int, rate: float, new: float, left_s: float, answer: bool
) -> None:
    assert fits(total, rate, new, left_s) == answer


@pytest.mark.parametrize(
    ("size", "rate", "tokens", "prefill", "choice"),
    [
        (2 << 20, 10**9, 16, 5000.0, "move"),  # 2 ms against 3
        (64 << 20, 10**9, 16, 5000.0, "recompute"),  # 67 ms against 3
        (2 << 20, 10**9, 16, 0.0, "move"),
        (2 << 20, 0.0, 16, 5000.0, "recompute"),
        (0, 10**9, 0, 5000.0, "move"),
    ],
)
def test_the_tail_goes_the_sooner_way(size: int, rate: float, tokens: int, prefill: float, choice: str) -> None:
    assert tail_choice(size, rate, tokens, prefill) == choice


def test_the_lower_limit_of_job_and_agent_counts() -> None:
    from midstream_agent.contract import agent_pb2 as pb
    from midstream_agent.kv_source import settings_for

    for agent, job, counts in ((0, 0, 0), (5, 0, 5), (0, 7, 7), (5, 7, 5), (9, 7, 7)):
        request = pb.MigrateRequest(kv_bytes_per_s=job)
        assert settings_for(replace(KV, bytes_per_s=agent), request).bytes_per_s == counts
    knows = replace(KV, prefill_tokens_per_s=5000.0)
    assert settings_for(knows, pb.MigrateRequest()).prefill_tokens_per_s == 5000
    assert settings_for(knows, pb.MigrateRequest(kv_mode=pb.KV_MODE_COPY)).prefill_tokens_per_s == 0


def test_other_fingerprints_are_seen_before_anything_is_sent() -> None:
    from midstream_agent.precopy import why_not

    base = {"fingerprint": "f", "slots": 8, "slot_bytes": 4096, "data_offset": 4096, "block_tokens": 16}
    ours = Geometry.parse(base)
    assert why_not(ours, "f") == ""
    assert why_not(ours, "g") == "kv_fingerprint"
    assert why_not(ours, "") == "no_pool"
    assert why_not(None, "f") == "no_pool"
    assert why_not(ours, "f", 2) == "kv_old_pod"


@pytest.mark.parametrize(
    ("tokens", "prefill", "bound_s"), [(1000, 0.0, 2.0), (1000, 5000.0, 0.2), (100_000, 5000.0, 2.0)]
)
def test_clients_wait_for_a_tail_as_long_as_computing_it_would_take(
    tokens: int, prefill: float, bound_s: float
) -> None:
    assert tail_bound_s(tokens, prefill, 2.0) == bound_s
