"""One adapter of several: what sums is the sum, and what cannot be combined is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.base import dequantized_model
from adapters.errors import AdapterError
from quickchange.cli import main
from quickchange.commands.combine import _COMBINATIONS
from tests.adapters.builders import make_adapter
from training.combine import Combination, combine_adapters

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> tuple[Path, Path]:
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    place = tmp_path_factory.mktemp("adapters")
    return make_adapter(plain, place / "a", r=4, seed=1), make_adapter(plain, place / "b", r=4, seed=2)


@pytest.fixture
def combine(folder: Path, tmp_path: Path, base_cache: Path) -> Callable[..., Any]:
    def combine(*adapters: tuple[Path, float], **options: Any) -> Any:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        return combine_adapters(str(folder), adapters, out, cache_dir=base_cache, progress=False, **options)

    return combine


def delta(adapter: Path) -> Tensor:
    """Of one layer, with its scaling."""
    config = LoraConfig.from_pretrained(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    a_RD, b_OR = (tensors[f"base_model.model.{LAYER}.lora_{factor}.weight"] for factor in "AB")
    return b_OR @ a_RD * config.lora_alpha / config.r


def test_cat_is_the_weighted_sum(pair: tuple[Path, Path], combine: Callable[..., Any]) -> None:
    a, b = pair
    report = combine((a, 0.7), (b, -0.3))
    assert report.rank == 8
    torch.testing.assert_close(delta(report.folder), 0.7 * delta(a) - 0.3 * delta(b), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in report.folder.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "quickchange.json")
    ]


def test_svd_is_the_nearest_of_its_rank(pair: tuple[Path, Path], combine: Callable[..., Any]) -> None:
    a, b = pair
    wanted = delta(a) + delta(b)
    report = combine((a, 1.0), (b, 1.0), combination="svd", rank=5)
    best = float(torch.linalg.svdvals(wanted)[5:].norm())
    assert float((delta(report.folder) - wanted).norm()) == pytest.approx(best, rel=1e-3)
    assert report.rank == 5


@pytest.mark.parametrize("combination", get_args(Combination))
def test_every_combination_makes_an_adapter_that_works(
    combination: str, folder: Path, pair: tuple[Path, Path], combine: Callable[..., Any]
) -> None:
    options = {"density": 0.5} if combination.startswith(("ties", "dare")) else {}
    one = combine((pair[0], 1.0), (pair[1], 1.0), combination=combination, **options)
    again = combine((pair[0], 1.0), (pair[1], 1.0), combination=combination, **options)
    assert one.digest == again.digest
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(one.folder))
    assert float(delta(one.folder).norm()) > 0


def test_the_command_knows_every_combination() -> None:
    assert get_args(Combination) == _COMBINATIONS


def test_what_cannot_be_combined(
    folder: Path, pair: tuple[Path, Path], combine: Callable[..., Any], tmp_path: Path, base_cache: Path
) -> None:
    a, _ = pair
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    wide = make_adapter(plain, tmp_path / "wide", r=6)
    dora = make_adapter(plain, tmp_path / "dora", use_dora=True)
    broken = tmp_path / "broken"
    shutil.copytree(a, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    for adapters, options, message in (
        ([(a, 1.0)], {}, "nothing to combine"),
        ([(a, 1.0), (wide, 1.0)], {"combination": "linear"}, "cannot be combined by linear"),
        ([(a, 1.0), (dora, 1.0)], {}, "LoRA adapters alone"),
        ([(a, 1.0), (broken, 1.0)], {}, "adapter_model.safetensors"),
        ([(a, 1.0), (a, 1.0)], {"combination": "ties"}, "density is what ties and dare keep"),
        ([(a, 1.0), (a, 1.0)], {"density": 0.5}, "density is what ties and dare keep"),
        ([(a, 1.0), (a, 1.0)], {"combination": "ties", "density": 2.0}, "density is 2.0"),
    ):
        with pytest.raises(AdapterError, match=message):
            combine(*adapters, **options)


def test_the_command(
    folder: Path, pair: tuple[Path, Path], tmp_path: Path, base_cache: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(base_cache))
    command = ["combine", "--base", str(folder), "--adapter", f"{pair[0]}=0.5", "--adapter", str(pair[1])]
    assert main([*command, "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'o'}: cat of 2 adapters, rank 8\n"
    assert main([*command, "--out", str(tmp_path / "p"), "--rank", "3"]) == 2
    assert "--rank is for svd" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "o")]) == 1
    assert "exists already" in capsys.readouterr().err
