"""Answers whose drafts are verified in one pass: those of counting out, whatever the draft, in few passes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from adapters.base import Base
from tests.models import Architecture
from tests.training.bases import BaseOf, bases_in, digest
from training.canary import Draft, bare_logits, record_canary
from training.continuing import answers_logits, greedy_answers, greedy_answers_logprobs, logprobs
from training.peft_configs import lora_config
from training.products import bfloat16_everywhere, products_in
from training.recipe import Recipe

PROMPTS = [(40, 41, 42, 43, 44), (7,), tuple(range(60, 72))]
LENGTH = 8


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> BaseOf:
    return bases_in(tmp_path_factory.mktemp("bases"), base_cache)


def counted_out(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Alone, token by token, without a cache."""
    ids = list(prompt)
    for _ in range(LENGTH):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def spoilt(answer: tuple[int, ...], *columns: int) -> tuple[int, ...]:
    """The answer with another token in these columns."""
    return tuple(token ^ 1 if column in columns else token for column, token in enumerate(answer))


DRAFTS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "none": lambda _: (),
    "right": lambda answer: answer,
    "longer": lambda answer: (*answer, 1, 2, 3),
    "begun": lambda answer: answer[:3],
    "wrong at first": lambda answer: spoilt(answer, 0),
    "wrong at last": lambda answer: spoilt(answer, LENGTH - 1),
    "wrong here and there": lambda answer: spoilt(answer, 2, 5),
    "all wrong": lambda answer: spoilt(answer, *range(LENGTH)),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma2", "gpt_neox", "gpt2"])
def test_an_answer_is_the_greedy_one_whatever_its_draft(base_of: BaseOf, architecture: Architecture) -> None:
    """Windows of six tokens among them: a wrong draft may not have pushed anything out of one."""
    base = base_of("none", architecture)
    expected = [counted_out(base.model, prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    with torch.no_grad():
        reference = logprobs(answers_logits(base.model, base, PROMPTS, expected))
        for draft in DRAFTS.values():
            drafts = [draft(answer) for answer in expected]
            answers, logprobs_PNV = greedy_answers_logprobs(base.model, base, PROMPTS, drafts, LENGTH)
            assert answers == expected
            assert torch.equal(logprobs_PNV, reference)
            assert [tuple(row) for row in logprobs_PNV.argmax(dim=-1).tolist()] == expected


def test_one_draft_may_be_right_where_another_is_wrong(base_of: BaseOf) -> None:
    base = base_of("none")
    expected = [counted_out(base.model, prompt) for prompt in PROMPTS]
    drafts = [expected[0], spoilt(expected[1], 1), ()]
    with torch.no_grad():
        assert greedy_answers(base.model, base, PROMPTS, drafts, LENGTH) == expected


@pytest.mark.parametrize(
    ("draft", "passes"), [("right", 1), ("longer", 1), ("wrong at last", 1), ("all wrong", LENGTH)]
)
def test_passes_are_as_many_as_columns_that_were_wrong(base_of: BaseOf, draft: str, passes: int) -> None:
    """A wrong last token is set right by the pass that finds it."""
    base = base_of("none")
    drafts = [DRAFTS[draft](counted_out(base.model, prompt)) for prompt in PROMPTS]
    with torch.no_grad(), counted(base.model) as widths:
        greedy_answers(base.model, base, PROMPTS, drafts, LENGTH)
    assert 1 <= len(widths) <= passes
    assert widths[0] == max(map(len, PROMPTS)) + LENGTH - 1
    assert all(width < LENGTH for width in widths[1:])  # prompts are computed once


def test_what_keeps_a_state_goes_on_without_a_cache(base_of: BaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("none")
    expected = [counted_out(base.model, prompt) for prompt in PROMPTS]
    monkeypatch.setattr("transformers.DynamicCache.is_croppable", False)
    with torch.no_grad():
        assert greedy_answers(base.model, base, PROMPTS, [()] * 3, LENGTH) == expected


def test_an_answer_goes_on_past_its_end(base_of: BaseOf) -> None:
    base = base_of("none")
    expected = [counted_out(base.model, prompt) for prompt in PROMPTS]
    ending = replace(base, eos_token_ids=frozenset(answer[2] for answer in expected))
    drafts = [answer[:3] for answer in expected]
    with torch.no_grad():
        assert greedy_answers(base.model, ending, PROMPTS, drafts, LENGTH) == expected


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_canary_is_the_same_with_any_draft_and_leaves_the_base_alone(
    base_of: BaseOf, quantization: str, tmp_path: Path
) -> None:
    base = base_of(quantization)
    model = adapted(base, tmp_path)
    try:
        before = digest(base)
        without = record_canary(model, base, PROMPTS)
        assert without is not None
        answers = [tuple(step.token_id for step in probe.steps) for probe in without.probes]
        with products_in(base, torch.float32) if quantization == "nf4" else torch.no_grad():
            assert [answer[:LENGTH] for answer in answers] == [counted_out(model, p) for p in PROMPTS]
        for drafts in (answers, [spoilt(answer, 4) for answer in answers]):
            assert record_canary(model, base, PROMPTS, Draft(drafts)) == without
        assert digest(base) == before
    finally:
        model.unload()


def test_a_canary_of_right_drafts_takes_three_passes_or_two(base_of: BaseOf, tmp_path: Path) -> None:
    """With the adapter, as bfloat16 has it, and without the adapter unless that is known."""
    base = base_of("nf4")
    model = adapted(base, tmp_path)
    try:
        canary = record_canary(model, base, PROMPTS)
        assert canary is not None
        answers = [tuple(step.token_id for step in probe.steps) for probe in canary.probes]
        with counted(base.model) as widths:
            assert record_canary(model, base, PROMPTS, Draft(answers)) == canary
        assert len(widths) == 3
        with torch.no_grad(), products_in(base, torch.float32):
            bare_PNV = bare_logits(model, base, PROMPTS, answers)
        with counted(base.model) as widths:
            assert record_canary(model, base, PROMPTS, Draft(answers, bare_PNV)) == canary
        assert len(widths) == 2
        other = [spoilt(answer, 3) for answer in answers]  # then what was said of it says nothing
        assert record_canary(model, base, PROMPTS, Draft(other, bare_PNV)) == canary
    finally:
        model.unload()


def test_products_multiplied_in_float32_are_those_of_bfloat16(base_of: BaseOf) -> None:
    base = base_of("nf4")
    ids = torch.arange(40, 72)[None]

    def logits() -> Tensor:
        result: Tensor = base.model(input_ids=ids, use_cache=False).logits.float()
        return result

    with torch.no_grad(), products_in(base, torch.float32):
        exact = logits()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = logits()
        with bfloat16_everywhere(base):
            rounded = logits()
        assert torch.equal(logits(), exact)
    noise = (expected - exact).abs()
    assert noise.max() > 0
    assert (rounded - expected).abs().mean() < 0.5 * noise.mean()


class counted:  # noqa: N801  reads as what it does: `with counted(model) as widths`
    """Within the block, how many columns each forward pass had."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> list[int]:
        widths: list[int] = []
        self._hook = self._model.register_forward_pre_hook(
            lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        return widths

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def adapted(base: Base, folder: Path) -> Any:
    """With an adapter that changes what the base says."""
    recipe = Recipe(data=folder / "none.jsonl", out=folder / "out", rank=4)
    model = get_peft_model(base.model, lora_config(recipe, base.layout))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.eval()
