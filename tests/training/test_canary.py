"""The canary of a run: recorded with the adapter on, in float32, and worth something."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters.base import Base, load_base
from adapters.bundle import read_bundle
from tests.models import build_tiny_model
from training.canary import ANSWER_TOKENS, MAX_PROMPT_TOKENS, probe_prompts
from training.encoding import Example
from training.errors import RecipeError
from training.recipe import Recipe
from training.train import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Base:
    folder = build_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_base(str(folder), purpose="train", device="cpu", cache_dir=base_cache, progress=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = [{"prompt": f"say {n}", "completion": f"{n * 7 % 10} ok"} for n in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        data=data, out=tmp_path / "out", rank=4, max_steps=4, learning_rate=5e-3, products="bfloat16"
    )


def test_a_run_leaves_what_its_adapter_answers(base: Base, recipe: Recipe) -> None:
    """Read back and computed again by PEFT on the folder, in one pass and in float32."""
    train(recipe, base, progress=False)
    bundle = read_bundle(recipe.out)
    assert bundle is not None
    canary = bundle.canary
    assert canary is not None
    assert (canary.base_fingerprint, canary.quantization) == (base.fingerprint, "nf4")
    assert canary.precision == "float32"
    assert [len(probe.steps) for probe in canary.probes] == [ANSWER_TOKENS] * 3
    assert canary.noise > 0
    assert canary.tells_from_base

    fresh = load_base(str(base.folder), purpose="train", dtype="float32", device="cpu", progress=False)
    model = PeftModel.from_pretrained(fresh.model, recipe.out).eval()
    for probe in canary.probes:
        answer = [step.token_id for step in probe.steps]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*probe.prompt_token_ids, *answer]])).logits[0].double()
        logprobs = torch.log_softmax(logits, dim=-1)[len(probe.prompt_token_ids) - 1 : -1]
        assert logprobs.argmax(dim=-1).tolist() == answer
        for row, step in zip(logprobs, probe.steps, strict=True):
            for token, logprob in step.top_logprobs:
                assert row[token].item() == pytest.approx(logprob, abs=2e-3)


def test_a_run_does_not_end_for_want_of_a_canary(
    base: Base, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a manifest could not hold is left out, after hours of training."""
    monkeypatch.setattr("training.canary.MAX_NOISE", 0.0)
    train(recipe, base, progress=False)
    bundle = read_bundle(recipe.out)
    assert bundle is not None
    assert bundle.canary is None


def test_a_run_may_go_without(base: Base, recipe: Recipe) -> None:
    values = recipe.to_mapping() | {"canary_probes": 0}
    train(Recipe.from_mapping(values, source="test"), base, progress=False)
    bundle = read_bundle(recipe.out)
    assert bundle is not None
    assert bundle.canary is None
    with pytest.raises(RecipeError, match="canary_probes is 17"):
        Recipe.from_mapping(values | {"canary_probes": 17}, source="test")


def test_prompts_come_from_all_over_the_data_and_leave_room_for_an_answer() -> None:
    examples = [Example(tuple(range(n + 2)), ((n, n + 2),)) for n in range(1, 301)]
    prompts = probe_prompts(examples, 3, max_context_tokens=4096)
    assert [len(prompt) for prompt in prompts] == [1, 101, MAX_PROMPT_TOKENS]
    assert [len(prompt) for prompt in probe_prompts(examples, 3, max_context_tokens=30)] == [1, 17, 17]
    assert probe_prompts(examples, 0, max_context_tokens=4096) == []
    assert probe_prompts(examples, 3, max_context_tokens=8) == []
    plain_text = [Example(tuple(range(11)), ((1, 11),)), Example((5, 6), ((1, 2),))]
    assert [len(prompt) for prompt in probe_prompts(plain_text, 9, max_context_tokens=4096)] == [5, 1]
