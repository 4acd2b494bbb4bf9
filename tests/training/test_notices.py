"""What is said before a run: rules of thumb, fallbacks, versions, and never an error."""

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base import Base
from adapters.quantize import Scheme
from tests.training.bases import bases_in
from training.notices import notices
from training.recipe import Recipe
from training.versions import misfits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Base:
    return bases_in(tmp_path_factory.mktemp("bases"), base_cache)("none")


def said(base: Base, **changes: Any) -> str:
    recipe = Recipe(data=Path("x"), out=Path("sql"), **changes)
    scheme = Scheme(recipe.base_quantization, recipe.quantizes_scales)
    return "\n".join(notices(recipe, replace(base, scheme=scheme)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate is 0.001; from 1e-05 to 0.0003 is usual for method qlora"),
        (
            {"method": "lora_plus", "learning_rate": 2e-4},
            "from 5e-06 to 0.00015 is usual for method lora_plus",
        ),
        ({"alpha": 200}, "alpha is 200; twice the rank, 32, is usual"),
        ({"rank": 128}, "above 64 method rslora"),
        ({"optimizer": "paged_adamw"}, "a CPU has nothing to page"),
        ({"method": "full"}, "afterwards serve it as a base of its own: quickchange serve --base sql"),
        (
            {"method": "dora"},
            "no server applies what method dora makes (use_dora = True: DoRA is not applied",
        ),
        ({"method": "prefix"}, "afterwards load the folder with PEFT; it cannot be merged"),
        ({"method": "lora_8bit"}, "merge the adapter into it with `quickchange merge --quantization int8`"),
        ({"double_quantization": False}, "`quickchange merge --quantization nf4 --no-double-quantization`"),
    ],
)
def test_one_line_each(base: Base, changes: dict[str, Any], message: str) -> None:
    lines = said(base, **changes)
    assert message in lines
    assert len(lines.splitlines()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "lora"},
        {"method": "rslora", "rank": 256, "alpha": 16},
        {"alpha": 16},
        {"optimizer": "adamw_8bit"},
        {"learning_rate": 3e-4},
    ],
)
def test_what_is_usual_goes_without_a_word(base: Base, changes: dict[str, Any]) -> None:
    assert said(base, **changes) == ""


def test_on_cuda_paging_is_nothing_to_speak_of(base: Base) -> None:
    assert said(replace(base, device=torch.device("cuda")), optimizer="paged_adamw_8bit") == ""


def test_versions_outside_the_stated_ranges_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert misfits() == []
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "peft" else real(name))
    (line,) = misfits()
    assert line.startswith("peft 0.1 is installed, quickchange >=0.21.2 was made for")
    assert line.endswith("pip install 'peft>=0.21.2'")
