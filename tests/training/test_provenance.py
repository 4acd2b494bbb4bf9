"""What travels with a result: the manifest's account of the training, and the model card."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.base import Base
from adapters.bundle import MAX_BUNDLE_BYTES, Bundle, read_bundle
from adapters.origin import MAX_RECIPE_BYTES, Origin
from quickchange.upload import UploadPlan
from tests.training.bases import BaseOf, bases_in, write_rows
from training.methods import METHODS
from training.provenance import told_settings
from training.recipe import WITHOUT_EFFECT, Recipe
from training.train import TrainingResult, train
from training.versions import PACKAGES


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> BaseOf:
    return bases_in(tmp_path_factory.mktemp("bases"), base_cache)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def run(base: Base, data: Path, folder: str = "out", **changes: Any) -> TrainingResult:
    settings = {"max_steps": 4, "batch_size": 8, "products": "float32"} | changes
    recipe = Recipe(base=str(base.folder), data=data, out=data.with_name(folder), **settings)
    return train(recipe, base, progress=False)


def bundle_of(result: TrainingResult) -> Bundle:
    bundle = read_bundle(result.out)
    assert bundle is not None
    return bundle


def origin_of(result: TrainingResult) -> Origin:
    origin = bundle_of(result).training
    assert origin is not None
    return origin


def card_of(result: TrainingResult) -> tuple[dict[str, Any], str]:
    """Its front matter and what is below."""
    _, head, text = (result.out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_an_adapter_tells_how_it_came_about(base_of: BaseOf, data: Path) -> None:
    base = base_of()
    held_out = write_rows(data.with_name("held-out.jsonl"))
    result = run(base, data, eval_data=held_out, evals_per_epoch=2, seed=3)
    origin, fit = origin_of(result), result.fit
    assert len(origin.eval_data_sha256 or "") == 64
    assert set(origin.versions) == set(PACKAGES)
    assert origin.metrics["final_loss"] == round(fit.final_loss, 6)
    assert (origin.metrics["steps"], origin.metrics["tokens"]) == (fit.steps, fit.tokens)
    assert origin.metrics["trained_parameters"] == fit.trained_parameters
    assert origin.metrics["held_out_loss"] == round(fit.evals[-1].loss, 6)
    assert origin.metrics["held_out_lowest_loss"] == round(min(e.loss for e in fit.evals), 6)
    assert origin.metrics["held_out_perplexity"] == round(math.exp(fit.evals[-1].loss), 6)
    assert (origin.recipe["rank"], origin.recipe["seed"], origin.recipe["base"]) == (16, 3, base.name)
    assert (origin.recipe["alpha"], origin.recipe["learning_rate"]) == (32.0, 2e-4)
    assert (origin.recipe["data"], origin.recipe["eval_data"]) == ("rows.jsonl", "held-out.jsonl")


def test_held_out_metrics_are_those_of_the_weights_that_were_kept(base_of: BaseOf, data: Path) -> None:
    result = run(
        base_of(), data, max_steps=12, eval_fraction=0.2, evals_per_epoch=5, early_stopping=3,
        learning_rate=0.05,
    )  # fmt: skip
    metrics, losses = origin_of(result).metrics, {e.step: e.loss for e in result.fit.evals}
    assert result.fit.best_step is not None
    assert metrics["held_out_step"] == result.fit.best_step
    assert metrics["held_out_loss"] == round(losses[result.fit.best_step], 6)


def test_without_held_out_rows_nothing_is_said_of_them(base_of: BaseOf, data: Path) -> None:
    origin = origin_of(run(base_of(), data))
    assert origin.eval_data_sha256 is None
    assert not any(name.startswith("held_out") for name in origin.metrics)


@pytest.mark.parametrize("method", ["qlora", "full", "bitfit", "prefix", "qdora"])
def test_nothing_of_this_machine_leaves_it(method: str, base_of: BaseOf, data: Path) -> None:
    base = base_of(METHODS[method].quantizations[0], "qwen2" if method == "bitfit" else "llama")
    result = run(base, data, method=method, eval_fraction=0.2)
    for path in result.out.iterdir():
        if path.suffix in (".md", ".json"):
            text = path.read_text()
            assert str(data.parent) not in text, path.name
            assert str(base.folder.parent) not in text, path.name


def test_equal_runs_tell_the_same_wherever_they_lie(base_of: BaseOf, data: Path) -> None:
    first, again = run(base_of(), data, "first"), run(base_of(), data, "again", checkpoint_every_s=0.001)
    assert bundle_of(first) == bundle_of(again)
    assert first.facts == again.facts


def test_settings_that_travel_are_those_that_matter(base_of: BaseOf, data: Path) -> None:
    recipe = Recipe(data=data, out=data.with_name("o"), publish="10.0.0.1:1", name="secret", license="mit")
    told = told_settings(recipe, base_of())
    assert not told.keys() & set(WITHOUT_EFFECT)
    assert "10.0.0.1" not in json.dumps(told)
    assert Recipe.from_mapping(told | {"out": "o"}, source="bundle").rank == recipe.rank


def test_a_recipe_too_large_to_travel_stays_behind_and_the_adapter_is_there(
    base_of: BaseOf, data: Path
) -> None:
    result = run(base_of(), data, target_modules=("q_proj",) * (MAX_RECIPE_BYTES // len("q_proj")))
    assert origin_of(result).recipe == {}
    assert origin_of(result).metrics["steps"] == 4


def test_what_is_sent_is_the_adapter_alone_and_small(base_of: BaseOf, data: Path) -> None:
    result = run(base_of(), data, canary_probes=16)
    sent = {file.path.name for file in UploadPlan.of(result.out).files}
    assert sent == {"adapter_config.json", "adapter_model.safetensors", "quickchange.json"}
    assert (result.out / "quickchange.json").stat().st_size < MAX_BUNDLE_BYTES


# The card


def test_the_card_of_an_adapter(base_of: BaseOf, data: Path) -> None:
    base = base_of()
    result = run(base, data, eval_fraction=0.2, license="apache-2.0")
    head, text = card_of(result)
    assert head == {
        "base_model": base.name, "library_name": "peft", "pipeline_tag": "text-generation",
        "license": "apache-2.0", "tags": ["quickchange", "qlora", "adapter"],
    }  # fmt: skip
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "How to use it", "Data", "Recipe", "Metrics", "Evaluation", "Versions", "Limits"
    ]  # fmt: skip
    assert f"quickchange serve --base {base.name}" in text
    assert "PeftModel.from_pretrained(base, 'out')" in text
    assert f"`{base.name}` stands for the folder of the base" in text
    assert "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True" in text
    sha256 = bundle_of(result).data_sha256
    assert f"| learned | `rows.jsonl` | `{sha256}` |" in text
    side = result.data.train
    assert (
        f"| learned | {side.rows} | {side.examples} | {side.tokens} | {side.learned_tokens} | 0 | 0 |" in text
    )
    assert f"| trained parameters | {result.fit.trained_parameters:,} |" in text
    assert "held-out perplexity" in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert Recipe.from_mapping(yaml.safe_load(recipe) | {"out": "x"}, source="card").eval_fraction == 0.2


@pytest.mark.parametrize(
    ("method", "says", "measured_by"),
    [
        ("full", "AutoModelForCausalLM.from_pretrained('out')", "--base ./out --quantization none"),
        ("bitfit", "strict=False", "--quantization none --adapter ./out --engine reference"),
        ("prefix", "it cannot be merged", "--quantization nf4 --adapter ./out --engine reference"),
        ("lora", "--quantization none --store", "--quantization none --adapter ./out"),
        ("lora_8bit", "load_in_8bit=True", "--quantization int8 --adapter ./out --engine reference"),
    ],
)
def test_the_card_says_how_to_use_what_a_method_makes(
    method: str, says: str, measured_by: str, base_of: BaseOf, data: Path
) -> None:
    base = base_of(METHODS[method].quantizations[0], "qwen2" if method == "bitfit" else "llama")
    head, text = card_of(run(base, data, method=method, max_steps=2))
    assert says in text
    assert f"{measured_by}\n" in text.split("## Evaluation")[1]
    assert head["license"] == "unknown"
    assert head["library_name"] == ("transformers" if method == "full" else "peft")
    assert "Nothing was held out" in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_base_that_nothing_else_loads_has_no_command_to_measure_on(base_of: BaseOf, data: Path) -> None:
    _, text = card_of(run(base_of(double=False), data, double_quantization=False, max_steps=2))
    assert "merge it, `quickchange merge --quantization nf4 --no-double-quantization`" in text
    assert "quickchange evaluate" not in text


def test_the_packaged_base_is_called_as_commands_and_hubs_call_it(base_of: BaseOf, data: Path) -> None:
    packaged = replace(base_of(), name="SmolLM2-135M-Instruct")
    result = run(packaged, data, max_steps=2)
    head, text = card_of(result)
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "quickchange serve --base smollm2 " in text
    assert origin_of(result).recipe["base"] == "smollm2"


def test_names_cannot_break_the_card(base_of: BaseOf, data: Path) -> None:
    odd = data.rename(data.with_name("a|b `c`\n---.jsonl"))
    head, text = card_of(run(base_of(), odd, "o`ut|x"))
    assert head["library_name"] == "peft"
    assert "| learned | `a&#124;b 'c' ---.jsonl` |" in text
    assert "# o'ut|x" in text
