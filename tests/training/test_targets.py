"""Which modules presets and names mean, in every architecture that is served."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from adapters.layout import BaseLayout, ModuleShape
from tests.models import FAMILIES, Architecture
from training.errors import RecipeError
from training.recipe import Recipe
from training.targets import adapted_modules, adapter_bytes, check_rank, feedforward_names, target_modules

OTHERS = ("falcon", "bloom", "opt", "phi", "gptj", "mpt", "gpt_bigcode", "codegen", "starcoder2")
"""Names of their own for the same things; not all of them can be served."""


def layout_for(model_type: str) -> BaseLayout:
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, num_hidden_layers=2)
        model = AutoModelForCausalLM.from_config(config)
    modules = {
        name: ModuleShape(*reversed(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    modules |= {
        name: ModuleShape(*module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    }
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), None)
    return BaseLayout(modules, head, "sha256:" + "0" * 64)


def recipe(**changes: Any) -> Recipe:
    return Recipe(data=Path("x"), out=Path("y"), **changes)


def modules_of(layout: BaseLayout, **changes: Any) -> set[str]:
    return set(adapted_modules(target_modules(recipe(**changes), layout), layout))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_presets_are_the_projections_that_the_architecture_has(architecture: Architecture) -> None:
    family = FAMILIES[architecture]
    layout, names = layout_for(family.model_type), family.projections

    def ending(*wanted: str) -> set[str]:
        return {
            module
            for module in layout.modules
            for end in wanted
            if module.endswith(f".{end}") and module != layout.head
        }

    mlp = ending(names.gate, names.up, names.down)
    output = "attn.c_proj" if architecture == "gpt2" else names.output
    assert modules_of(layout, target_modules="qv") == ending(names.query, names.value)
    attention = ending(names.query, names.key, names.value, output)
    assert modules_of(layout, target_modules="attention") == attention
    assert modules_of(layout, target_modules="mlp") == mlp
    assert modules_of(layout, target_modules="all-linear") == mlp | attention
    assert modules_of(layout) == set(layout.modules) - {layout.head}
    scaled = target_modules(recipe(method="ia3"), layout)
    assert set(adapted_modules(scaled, layout)) == ending(names.key, names.value, names.down)
    assert set(adapted_modules(feedforward_names(scaled, layout), layout)) == ending(names.down)


@pytest.mark.parametrize("model_type", OTHERS)
def test_presets_part_any_block_into_attention_and_mlp(model_type: str) -> None:
    layout = layout_for(model_type)
    attention, mlp = (modules_of(layout, target_modules=preset) for preset in ("attention", "mlp"))
    assert attention
    assert mlp
    assert attention | mlp == {name for name in layout.modules if ".0." in name or ".1." in name}
    assert not attention & mlp
    assert modules_of(layout, target_modules="qv") < attention


def test_names_are_as_short_as_they_can_be() -> None:
    layout = layout_for("gpt2")
    assert target_modules(recipe(target_modules="mlp"), layout) == ["c_fc", "mlp.c_proj"]
    assert target_modules(recipe(), layout) == ["c_attn", "c_fc", "c_proj"]


def test_names_that_are_given_stay_as_they_are() -> None:
    layout = layout_for("llama")
    given = ("v_proj", "model.layers.0.self_attn.q_proj")
    assert target_modules(recipe(target_modules=given), layout) == list(given)
    assert len(modules_of(layout, target_modules=given)) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q_porj", r"'q_porj', which is no linear module of this base; the nearest are q_proj"),
        (
            "query_key_value",
            r"there are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        ),
        ("proj", r"the nearest are"),
    ],
)
def test_a_name_that_is_not_there_lists_those_that_are(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        target_modules(recipe(target_modules=("q_proj", name)), layout_for("llama"))


def test_a_preset_of_which_there_is_nothing() -> None:
    layout = BaseLayout({"layers.0.a": ModuleShape(4, 4)}, None, "sha256:" + "0" * 64)
    with pytest.raises(RecipeError, match=r"target_modules is qv, but none .*; there are a"):
        target_modules(recipe(target_modules="qv"), layout)


def test_a_rank_above_the_narrowest_module() -> None:
    layout = BaseLayout({"l.0.a": ModuleShape(64, 8), "l.0.b": ModuleShape(64, 64)}, None, "x")
    check_rank(recipe(rank=8), layout)
    check_rank(recipe(rank=9, target_modules=("b",)), layout)
    check_rank(recipe(method="ia3", target_modules=("a",)), layout)
    with pytest.raises(
        RecipeError, match=r"rank is 9, but l\.0\.a is 64→8: .* above 8; lower rank, or leave"
    ):
        check_rank(recipe(rank=9), layout)


def test_bytes_of_an_adapter_are_those_of_its_factors() -> None:
    layout = BaseLayout({"l.0.a": ModuleShape(64, 8), "l.0.b": ModuleShape(64, 64)}, None, "x")
    assert adapter_bytes(recipe(rank=2), layout) == 4 * 2 * (64 + 8 + 64 + 64)
    assert adapter_bytes(recipe(rank=2, method="pissa", target_modules=("a",)), layout) == 4 * 4 * 72
