"""Whole runs on a tiny model: adapters that the server's own checks pass, and the report beside them."""

import json
from pathlib import Path

import pytest
import torch

import training.foresight
from adapters.base import Base, load_base
from adapters.bundle import read_bundle
from adapters.files import CARD_FILE
from adapters.validate import validate_adapter
from tests.training.bases import ROWS
from tests.training.runs import run
from training.errors import ShortOfMemoryError
from training.outcome import artefacts_folder
from training.recipe import Recipe


def test_the_loss_falls_and_the_adapter_passes_the_servers_checks(base: Base, data: Path) -> None:
    result = run(base, data, epochs=8.0, eval_fraction=0.2)
    losses = [point.loss for point in result.fit.losses]
    assert losses[-1] < 0.3 * losses[0]
    assert result.fit.final_loss < 0.3 * losses[0]
    assert result.fit.evals[-1].loss < 0.5 * result.fit.evals[0].loss
    found = validate_adapter(result.out, base.layout, max_rank=4, beside=(CARD_FILE,))
    assert found == result.facts
    assert result.facts.delta_norm > 0
    assert result.facts.target_modules == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    )  # fmt: skip
    assert len(result.facts.matched_modules) == len(base.layout.modules) - 1  # all but the head


def test_the_folder_is_exactly_an_adapter_and_says_where_it_is_from(base: Base, data: Path) -> None:
    result = run(base, data, seed=5, max_steps=2)
    names = {path.name for path in result.out.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "quickchange.json", "README.md"}
    bundle = read_bundle(result.out)
    assert bundle is not None
    assert (bundle.base_fingerprint, bundle.seed) == (base.fingerprint, 5)
    assert bundle.chat_template == base.chat_template
    assert bundle.eos_token_ids == tuple(sorted(base.eos_token_ids))
    config = json.loads((result.out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name  # and no path of this machine


def test_report_and_curve_lie_beside_it(base: Base, data: Path) -> None:
    result = run(base, data, max_steps=3, eval_fraction=0.2)
    assert result.artefacts == artefacts_folder(result.out)
    report = json.loads((result.artefacts / "training.json").read_text())
    assert report["fit"]["steps"] == 3
    assert len(report["fit"]["losses"]) == 3
    assert report["base"]["fingerprint"] == base.fingerprint
    assert report["data"]["held_out"]["rows"] == 10
    assert report["data"]["train"]["lengths"]
    assert Recipe.from_mapping(report["recipe"], source="report").rank == 4
    assert (result.artefacts / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_prediction_and_measurement_of_memory_stand_side_by_side(base: Base, data: Path) -> None:
    result = run(base, data, max_steps=2)
    memory = json.loads((result.artefacts / "training.json").read_text())["memory"]
    assert memory["predicted_peak"] == sum(memory["parts"].values())
    assert memory["measured_peak"] == result.fit.peak_memory_bytes > 0
    assert memory["predicted_added"] < memory["predicted_peak"]
    assert memory["error"] == memory["predicted_added"] / max(memory["measured_added"], 1) - 1


def test_a_run_that_would_not_fit_is_refused_with_what_would(
    base: Base, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = run(base, data, "fits", max_steps=1).memory.predicted_added
    monkeypatch.setattr(training.foresight, "memory_free_on", lambda _: needed - 1)
    with pytest.raises(ShortOfMemoryError, match=r"it fits with .*(batch_size|gradient_checkpointing)"):
        run(base, data, max_steps=1)
    assert not data.with_name("out").exists()
    assert run(base, data, max_steps=1, exceed_memory=True).memory.predicted_added == needed


def test_a_base_serves_several_runs_and_comes_back_unchanged(base: Base, data: Path) -> None:
    names = [name for name, _ in base.model.named_modules()]
    probe = torch.arange(3, 19)[None]
    before = base.model(probe).logits
    first, again = run(base, data, "first", max_steps=3), run(base, data, "again", max_steps=3)
    other = run(base, data, "other", max_steps=3, seed=1)
    assert first.facts.digest == again.facts.digest
    assert other.facts.digest != first.facts.digest
    assert [name for name, _ in base.model.named_modules()] == names
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert torch.equal(base.model(probe).logits, before)


def test_a_single_step_learns_something(base: Base, data: Path) -> None:
    """A warm-up begins at a rate of nought; it must not be all that there is."""
    assert run(base, data, max_steps=1, warmup_ratio=0.1).facts.delta_norm > 0


def test_the_warm_up_rises_and_the_cosine_falls(base: Base, data: Path) -> None:
    rates = [point.learning_rate for point in run(base, data, max_steps=10, warmup_ratio=0.3).fit.losses]
    assert rates[0] == 0.0
    assert max(rates) == rates[3] == pytest.approx(5e-3)
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_tokens_are_counted_without_padding(base: Base, data: Path) -> None:
    result = run(base, data, epochs=2.0)
    assert result.fit.tokens == 2 * result.data.train.tokens
    assert result.fit.steps == 2 * len(ROWS) // 8


@pytest.mark.parametrize("method", ["rslora", "lora"])
def test_other_methods(method: str, folder: Path, base_cache: Path, data: Path) -> None:
    quantization = "none" if method == "lora" else "nf4"
    own = load_base(
        str(folder), purpose="train", quantization=quantization, device="cpu", cache_dir=base_cache,
        progress=False,
    )  # fmt: skip
    result = run(own, data, method=method, max_steps=2)
    assert result.facts.method == ("rslora" if method == "rslora" else "lora")
    assert result.facts.base_fingerprint == own.fingerprint
