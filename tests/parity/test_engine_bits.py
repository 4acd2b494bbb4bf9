"""Native code on NF4: a request's tokens and log-probabilities are the same bits however it was served.

Alone, among others, thrown out and computed again, with its prompt from the prefix cache; greedy and drawn.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.base import load_base
from server.request import SamplingParams
from tests.adapters.builders import make_adapter, tiny_model
from tests.kernels.conditions import needs_native
from tests.parity.harness import Answer, Ask, Harness

pytestmark = needs_native

GREEDY = SamplingParams(max_new_tokens=24, logprobs=3, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.9, top_p=0.95, seed=11)
PENALISED = replace(DRAWN, top_k=40, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1)
PROMPT = tuple(range(30, 69))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bits")


@pytest.fixture(scope="module")
def adapters(folder: Path) -> dict[str, Path]:
    model = tiny_model(folder / "base", "qwen3")
    return {
        name: make_adapter(model, folder / name, seed=seed, r=rank, target_modules="all-linear")
        for seed, (name, rank) in enumerate((("a", 3), ("b", 8), ("c", 17)))
    }


@pytest.fixture
def harness(folder: Path, base_cache: Path, adapters: dict[str, Path], tmp_path: Path) -> Iterator[Harness]:
    """Room for about eight of the requests below, so that those among thirty-one others are thrown out."""
    base = load_base(
        str(folder / "base"), device="cpu", kernels="native", cache_dir=base_cache, progress=False
    )
    kv_bytes = 34 * 8 * 2 * 2 * 2 * 16 * 2  # blocks, tokens, layers, keys and values, heads, width, bytes
    harness = Harness(
        base, tmp_path / "store", adapters, kv_bytes=kv_bytes, block_tokens=8, prefill_chunk_tokens=7
    )
    assert harness.core.scheduler.blocks.block_count == 34
    yield harness
    harness.close()


def bits(answer: Answer) -> object:
    return answer.token_ids, answer.logprobs, answer.text


def others(count: int, seed: int) -> list[Ask]:
    dice = random.Random(seed)
    return [
        Ask(
            tuple(dice.randrange(256) for _ in range(dice.randrange(1, 30))),
            dice.choice(["", "a", "b", "c"]),
            arrival=dice.randrange(30),
            sampling=replace(DRAWN, seed=None, max_new_tokens=dice.randrange(4, 30)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalised"])
@pytest.mark.parametrize("adapter", ["", "b"], ids=["base", "adapter"])
def test_the_same_bits_however_it_was_served(
    harness: Harness, adapter: str, sampling: SamplingParams
) -> None:
    mine = Ask(PROMPT, adapter, sampling=sampling)
    alone = harness.run([mine])[0]
    assert alone.finished.cached_tokens == 0
    cached = harness.run([mine])[0]
    assert cached.finished.cached_tokens == 32
    last = replace(mine, arrival=2, priority=-1)  # the first to be thrown out
    among = [harness.run([*others(31, seed), last])[-1] for seed in range(3)]
    assert [bits(answer) for answer in (cached, *among)] == [bits(alone)] * 4
    assert any(answer.preemptions for answer in among), "it was never thrown out; make the cache smaller"


@pytest.mark.parametrize("adapter", ["", "b"], ids=["base", "adapter"])
def test_an_answer_that_is_given_is_judged_as_it_was_when_it_was_chosen(
    harness: Harness, adapter: str
) -> None:
    """In chunks of seven, beside others and thrown out by them, and though the prefix cache has all of it."""
    chosen = harness.run([Ask(PROMPT, adapter, sampling=GREEDY)])[0]
    mine = Ask(PROMPT, adapter, sampling=GREEDY, given=chosen.token_ids)
    alone = harness.run([mine])[0]
    assert alone.finished.cached_tokens == 32
    last = replace(mine, arrival=2, priority=-1)
    among = [harness.run([*others(31, seed), last])[-1] for seed in range(3)]
    assert [bits(answer) for answer in (alone, *among)] == [bits(chosen)] * 4
    assert any(answer.preemptions for answer in among), "it was never thrown out; make the cache smaller"


def test_of_another_answer_it_says_how_likely_that_is(harness: Harness) -> None:
    chosen = harness.run([Ask(PROMPT, "a", sampling=GREEDY)])[0]
    second = chosen.logprobs[5].alternatives[1]
    given = (*chosen.token_ids[:5], second[0], *chosen.token_ids[6:])
    judged = harness.run([Ask(PROMPT, "a", sampling=GREEDY, given=given)])[0]
    assert judged.token_ids == given
    assert [*judged.logprobs[:5]] == [*chosen.logprobs[:5]]
    assert (judged.logprobs[5].token_id, judged.logprobs[5].logprob) == second
    assert judged.logprobs[5].alternatives == chosen.logprobs[5].alternatives
    assert judged.logprobs[6] != chosen.logprobs[6]


def test_answers_of_one_request_are_its_own_draws_and_share_the_prompt(harness: Harness) -> None:
    mine = Ask(PROMPT, "a", sampling=DRAWN)
    several = harness.run_many(mine, n=4)
    assert bits(several[0]) == bits(harness.run([mine])[0])
    assert len({answer.token_ids for answer in several}) == 4
    assert [answer.finished.cached_tokens for answer in several] == [0, 32, 32, 32]
    assert [bits(answer) for answer in several] == [bits(answer) for answer in harness.run_many(mine, n=4)]


def test_a_scale_of_zero_is_the_base_and_scales_differ(harness: Harness) -> None:
    mine = Ask(PROMPT, "a", sampling=GREEDY)
    plain = harness.run([mine, replace(mine, adapter="")])
    scaled = harness.run([replace(mine, adapter_scale=scale) for scale in (1.0, 0.0, 0.5, -1.0)])
    assert bits(scaled[0]) == bits(plain[0])
    assert bits(scaled[1]) == bits(plain[1])
    assert len({bits(answer) for answer in scaled}) == 4
