"""An adapter of a fine-tuned model: the nearest of its rank, and what is lost is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.errors import BaseModelError
from adapters.validate import validate_adapter
from quickchange.cli import main
from tests.adapters.bases import distance, logits, save_gpt2
from tests.adapters.builders import layout_of
from tests.models import build_tiny_model
from training.extract import extract_adapter, factored

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("extract") / "tiny")


@pytest.fixture
def tune(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A fine-tuned model: every linear layer changed by a matrix of this rank, or as `edit` says."""

    def tune(rank: int, edit: Callable[[Any], None] = lambda _: None) -> Path:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(rank)
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "lm_head":
                    outs, ins = module.weight.shape
                    module.weight += 0.02 * torch.randn(outs, rank) @ torch.randn(rank, ins)
            edit(model)
        model.save_pretrained(tmp_path / "tuned")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tuned")
        return tmp_path / "tuned"

    return tune


def extract(folder: Path, tuned: Path, base_cache: Path, rank: int, **options: Any) -> Any:
    out = tuned.with_name(f"out-{rank}")
    return extract_adapter(
        str(folder), tuned, out, rank=rank, cache_dir=base_cache, progress=False, **options
    )


def test_a_change_of_low_rank_comes_back_whole(
    folder: Path, tune: Callable[..., Path], base_cache: Path
) -> None:
    tuned = tune(3)
    report = extract(folder, tuned, base_cache, 3)
    assert report.error < 1e-5
    assert report.left_out == {}
    assert report.modules == 14
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    facts = validate_adapter(report.folder, layout_of(plain, report.base_fingerprint), max_rank=3)
    assert facts.digest == report.digest
    ours = logits(PeftModel.from_pretrained(plain, str(report.folder)).eval())
    theirs = logits(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32))
    assert distance(ours, theirs) < 1e-4


def test_more_rank_loses_less(folder: Path, tune: Callable[..., Path], base_cache: Path) -> None:
    tuned = tune(16)
    errors = [extract(folder, tuned, base_cache, rank).error for rank in (1, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] < 1e-5


def test_the_error_is_that_of_the_best_there_is() -> None:
    torch.manual_seed(0)
    delta_OD = torch.randn(40, 24)
    a_RD, b_OR = factored(delta_OD, 5)
    singular = torch.linalg.svdvals(delta_OD)
    assert float((delta_OD - b_OR @ a_RD).norm()) == pytest.approx(float(singular[5:].norm()), rel=1e-4)


def test_large_layers_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.extract._EXACT_SIZE", 10)
    torch.manual_seed(0)
    delta_OD = torch.randn(200, 8) @ torch.randn(8, 150) + 0.01 * torch.randn(200, 150)
    a_RD, b_OR = factored(delta_OD, 8)
    best = float(torch.linalg.svdvals(delta_OD)[8:].norm())
    assert float((delta_OD - b_OR @ a_RD).norm()) < 1.01 * best


def test_a_rank_above_a_layer_s_own_is_cut(folder: Path, tune: Callable[..., Path], base_cache: Path) -> None:
    report = extract(folder, tune(2), base_cache, 512)
    assert report.error < 1e-5


def test_what_no_adapter_holds_is_reported(folder: Path, tune: Callable[..., Path], base_cache: Path) -> None:
    def norms(model: Any) -> None:
        model.model.norm.weight *= 1.5

    report = extract(folder, tune(2, norms), base_cache, 2)
    assert report.left_out == {"model.norm.weight": pytest.approx(0.5)}


def test_a_quantised_base_loses_what_is_of_full_rank(
    folder: Path, tune: Callable[..., Path], base_cache: Path
) -> None:
    tuned = tune(2)
    on_nf4 = extract(folder, tuned, base_cache, 2, quantization="nf4")
    assert on_nf4.error > 0.1
    plain = extract_adapter(
        str(folder), tuned, tuned.with_name("plain"), rank=2, cache_dir=base_cache, progress=False
    )
    assert on_nf4.base_fingerprint != plain.base_fingerprint


def test_layers_that_are_stored_the_other_way_round(tmp_path: Path, base_cache: Path) -> None:
    folder = save_gpt2(tmp_path / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        weight = model.transformer.h[0].mlp.c_fc.weight  # [D, O]
        weight += 0.05 * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
    model.save_pretrained(tmp_path / "tuned")
    report = extract(folder, tmp_path / "tuned", base_cache, 1)
    assert (report.modules, report.error < 1e-4) == (1, True)


@pytest.mark.parametrize("command_line", [False, True])
def test_a_model_that_changes_nothing(
    folder: Path, tmp_path: Path, base_cache: Path, command_line: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if not command_line:
        with pytest.raises(BaseModelError, match="changes no linear layer"):
            extract(folder, folder, base_cache, 2)
        return
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(base_cache))
    command = ["extract", "--base", str(folder), "--model", str(folder), "--out", str(tmp_path / "o")]
    assert main(command) == 1
    assert "nothing to extract" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_another_architecture_is_refused(folder: Path, tmp_path: Path, base_cache: Path) -> None:
    other = build_tiny_model(tmp_path / "other", "qwen2")
    with pytest.raises(BaseModelError, match="give the base it was made from"):
        extract(folder, other, base_cache, 2)


def test_the_command_says_what_is_lost(
    folder: Path, tune: Callable[..., Path], tmp_path: Path, base_cache: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(base_cache))

    def norms(model: Any) -> None:
        model.model.norm.weight *= 1.5

    command = ["extract", "--base", str(folder), "--model", str(tune(4, norms)), "--out", str(tmp_path / "o")]
    assert main([*command, "--rank", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "rank 2, 14 layers" in said[0]
    assert "of it is lost, at worst" in said[0]
    assert said[1] == (
        "left out: 1 weights that no adapter of linear layers holds, at worst 50.00% of model.norm.weight"
    )
