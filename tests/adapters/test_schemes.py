"""Bases quantised for training: near their source, exactly what their codes stand for, each its own base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.base import Base, dequantized_base, load_base
from adapters.errors import UnsupportedBaseError
from adapters.quantize import Scheme, plain_weight, quantized_layers
from adapters.skeleton import skeleton_of
from tests.adapters.bases import distance, logits, save_model
from tests.models import build_tiny_model

SCHEMES = (
    Scheme("nf4"),
    Scheme("nf4", double=False),
    Scheme("fp4"),
    Scheme("fp4", double=False),
    Scheme("int8"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def load(base_cache: Path) -> Any:
    def load(source: Path, **options: Any) -> Base:
        return load_base(str(source), device="cpu", cache_dir=base_cache, progress=False, **options)

    return load


def load_scheme(load: Any, folder: Path, scheme: Scheme, **options: Any) -> Base:
    return load(
        folder,
        quantization=scheme.quantization,
        double_quantization=scheme.double,
        dtype="float32",
        **options,
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_quantised_base_is_near_its_source_and_exactly_what_its_codes_stand_for(
    scheme: Scheme, folder: Path, load: Any, base_cache: Path
) -> None:
    base = load_scheme(load, folder, scheme, purpose="train")
    plain = dequantized_base(
        str(folder), quantization=scheme.quantization, double_quantization=scheme.double,
        cache_dir=base_cache, progress=False,
    )  # fmt: skip
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.model.train(scheme.quantization == "int8")  # evaluated, it would round its input as well
    torch.testing.assert_close(logits(base.model), logits(plain.model), rtol=1e-4, atol=1e-4)
    for name, layer in quantized_layers(base.model).items():
        lost = distance(plain_weight(layer), source.get_submodule(name).weight)
        assert 0.001 < lost < (0.02 if scheme.quantization == "int8" else 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_weight_read_by_rows_has_the_bits_of_a_loaded_base(
    scheme: Scheme, dtype: torch.dtype, tmp_path: Path, load: Any, base_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """64 rows at a time, also of layers whose rows end within a quantisation block: 192, 96 and 200 wide."""
    sizes = {"hidden_size": 192, "intermediate_size": 200, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
    folder = save_model(tmp_path / "base", "llama", dtype=dtype, **sizes, **heads)
    base = load_scheme(load, folder, scheme, purpose="train")
    monkeypatch.setattr("adapters.tensor_rows.BLOCK_WEIGHTS", 1)
    skeleton = skeleton_of(str(folder), scheme, cache_dir=base_cache, progress=False)
    layers = quantized_layers(base.model)
    assert skeleton.coded == set(layers)
    blocks = {name: list(skeleton.blocks(f"{name}.weight", dequantized=True)) for name in layers}
    assert max(map(len, blocks.values())) == 4
    for name, layer in layers.items():
        assert torch.equal(torch.cat(blocks[name]), plain_weight(layer))


def test_int8_weights_read_the_same_before_and_after_a_product(folder: Path, load: Any) -> None:
    base = load_scheme(load, folder, Scheme("int8"), purpose="train")
    layer = base.model.model.layers[0].mlp.up_proj
    before = plain_weight(layer)
    logits(base.model)
    assert torch.equal(plain_weight(layer), before)


def test_every_scheme_is_another_base_and_only_two_are_served(folder: Path, load: Any) -> None:
    fingerprints = [load_scheme(load, folder, scheme, purpose="train").fingerprint for scheme in SCHEMES]
    assert len(set(fingerprints)) == len(SCHEMES)
    assert fingerprints[0] == load(folder).fingerprint
    for scheme in SCHEMES[1:]:
        with pytest.raises(UnsupportedBaseError, match=f"a base in {scheme.name} can be trained on and not"):
            load_scheme(load, folder, scheme)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_double_quantisation_keeps_a_block_s_scale_in_one_byte(
    quantization: Any, folder: Path, load: Any
) -> None:
    for double, kept in ((False, torch.float32), (True, torch.uint8)):
        base = load_scheme(load, folder, Scheme(quantization, double), purpose="train")
        states = [layer.weight.quant_state for layer in quantized_layers(base.model).values()]
        assert {state.absmax.dtype for state in states} == {kept}
        assert {state.quant_type for state in states} == {quantization}
