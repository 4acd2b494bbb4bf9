"""The base in memory: equal to what it is made of, quantised once, safe from what evaluation does to NF4."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters import base as base_module
from adapters import quantize
from adapters.base import Base, dequantized_base, dequantized_model, load_base
from adapters.bnb import Linear4bit
from adapters.errors import BaseModelError, UnsupportedBaseError
from adapters.native import NativeLinear, NativeRMSNorm
from adapters.nf4 import PackedNF4Linear, PlainNF4Linear, fused_kernel_works
from adapters.serving import ServingLinear
from kernels.library import NativeLibrary, NativeStatus, status
from kernels.structs import Bfloat16
from tests.adapters.bases import (
    PROMPT,
    distance,
    logits,
    plain_bitsandbytes,
    save_gpt2,
    save_tied_llama,
)
from tests.kernels.conditions import KERNELS, PRECISIONS, needs_native
from tests.models import (
    ARCHITECTURES,
    FAMILIES,
    MAX_CONTEXT,
    PADDED_VOCABULARY,
    Architecture,
    build_tiny_model,
)

BF16_PRODUCTS = 0.03  # relative error of a model's logits when each product is rounded to bfloat16
NF4_ERROR = 0.05  # NF4 against the original weights is farther away than that

needs_kernel = pytest.mark.skipif(not fused_kernel_works(), reason="no AVX512-BF16 on this processor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def load(base_cache: Path) -> Any:
    def load(source: Path, **options: Any) -> Base:
        return load_base(str(source), device="cpu", cache_dir=base_cache, progress=False, **options)

    return load


@pytest.fixture
def dequantized(folder: Path, base_cache: Path) -> Any:
    return dequantized_model(str(folder), cache_dir=base_cache, progress=False)


# What it computes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_mode_is_the_plain_model(architecture: Architecture, tmp_path: Path, load: Any) -> None:
    folder = build_tiny_model(tmp_path, architecture)
    base = load(folder, quantization="none", dtype="float32", kernels="torch")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(base.model), logits(plain))
    assert not any(isinstance(module, ServingLinear | Linear4bit) for module in base.model.modules())


@needs_native
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_exact_mode_adds_up_in_another_order_and_no_more(
    architecture: Architecture, tmp_path: Path, load: Any
) -> None:
    folder = build_tiny_model(tmp_path, architecture)
    base = load(folder, quantization="none", dtype="float32", kernels="native")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert distance(logits(base.model), logits(plain)) < 1e-6
    modules = list(base.model.modules())
    assert sum(isinstance(module, NativeLinear) for module in modules) == len(base.layout.modules)
    norms = [module for module in plain.modules() if type(module).__name__.endswith("RMSNorm")]
    assert sum(isinstance(module, NativeRMSNorm) for module in modules) == len(norms)
    assert norms or FAMILIES[architecture].model_type in ("gpt2", "gpt_neox")  # which have LayerNorms
    assert base.storage_dtype == torch.float32


@pytest.mark.parametrize("repacks", [False, pytest.param(True, marks=needs_kernel)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_serving_computes_what_bitsandbytes_computes(
    architecture: Architecture, repacks: bool, tmp_path: Path, load: Any
) -> None:
    folder = build_tiny_model(tmp_path, architecture)
    oracle = logits(plain_bitsandbytes(folder, repacks=repacks))
    for kernels in KERNELS:
        assert distance(logits(load(folder, kernels=kernels).model), oracle) < BF16_PRODUCTS
    assert distance(logits(AutoModelForCausalLM.from_pretrained(folder)), oracle) > NF4_ERROR


def test_float32_nf4_is_exact(folder: Path, dequantized: Any, load: Any) -> None:
    expected = logits(dequantized)
    served = load(folder, dtype="float32", kernels="torch")
    trained = load(folder, dtype="float32", purpose="train")
    assert any(isinstance(module, PlainNF4Linear) for module in served.model.modules())
    for kernels in KERNELS:
        found = logits(load(folder, dtype="float32", kernels=kernels).model)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(trained.model), expected, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_serving_uses_the_packed_kernel_and_training_never_does(folder: Path, load: Any) -> None:
    served, trained = load(folder, kernels="torch"), load(folder, purpose="train")
    assert len([m for m in served.model.modules() if isinstance(m, PackedNF4Linear)]) == 14
    layers = [module for module in trained.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_on_a_cpu(folder: Path, load: Any, kernels: str) -> None:
    base = load(folder, dtype="bfloat16", kernels=kernels)
    assert base.dtype == base.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert distance(logits(base.model), logits(load(folder, kernels=kernels).model)) < BF16_PRODUCTS


@needs_native
def test_native_storage_is_bfloat16_unless_everything_is_float32(folder: Path, load: Any) -> None:
    stored, exact = load(folder, matmul_precision="highest"), load(folder, dtype="float32")
    assert (stored.kernels, stored.dtype, stored.storage_dtype) == ("native", torch.float32, torch.bfloat16)
    assert exact.storage_dtype == torch.float32
    assert 0 < distance(logits(stored.model), logits(exact.model)) < 0.01  # the head's weights, rounded


@needs_native
@pytest.mark.parametrize(
    ("bfloat16", "auto"),
    [(Bfloat16.NONE, "highest"), (Bfloat16.SLOWER, "highest"), (Bfloat16.FASTER, "medium")],
)
def test_auto_is_medium_only_where_that_is_faster(
    folder: Path, load: Any, monkeypatch: pytest.MonkeyPatch, bfloat16: Bfloat16, auto: str
) -> None:
    monkeypatch.setattr(NativeLibrary, "bfloat16", bfloat16)
    assert load(folder).matmul_precision == auto
    assert load(folder, dtype="float32").matmul_precision == "highest"
    assert load(folder, matmul_precision="highest").matmul_precision == "highest"
    if bfloat16 is Bfloat16.NONE:
        with pytest.raises(UnsupportedBaseError, match="need AVX512-BF16; use 'auto' or 'highest'"):
            load(folder, matmul_precision="medium")
    else:
        assert load(folder, matmul_precision="medium").matmul_precision == "medium"


@pytest.mark.parametrize(
    ("options", "why"),
    [({"kernels": "torch"}, "no native kernels"), ({"purpose": "train"}, "no native kernels")]
    + [({"dtype": "float32"}, "dtype 'float32' computes exactly")] * status().active,
)
def test_medium_is_refused_where_it_means_nothing(
    folder: Path, load: Any, options: dict[str, str], why: str
) -> None:
    assert load(folder, **options).matmul_precision == (None if why.startswith("no") else "highest")
    with pytest.raises(UnsupportedBaseError, match=why):
        load(folder, matmul_precision="medium", **options)


@pytest.mark.skipif("medium" not in PRECISIONS, reason="no native products of medium precision")
def test_medium_is_near_highest_and_not_the_same(folder: Path, load: Any) -> None:
    medium, highest = (logits(load(folder, matmul_precision=p).model) for p in ("medium", "highest"))
    assert 0 < distance(medium, highest) < BF16_PRODUCTS


def test_without_the_native_library_torch_serves_and_the_log_says_so(
    folder: Path, load: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = NativeStatus(None, (), "the native library was not built")
    monkeypatch.setattr(base_module, "native_status", lambda: absent)
    base = load(folder)
    assert base.kernels == "torch"
    assert not any(isinstance(module, NativeLinear) for module in base.model.modules())
    assert "was not built" in caplog.text
    with pytest.raises(UnsupportedBaseError, match="was not built"):
        load(folder, kernels="native")


def test_gpt2_has_ordinary_linear_layers(tmp_path: Path, load: Any, base_cache: Path) -> None:
    folder = save_gpt2(tmp_path / "gpt2")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact = load(folder, quantization="none", dtype="float32", kernels="torch")
    quantised = load(folder, dtype="float32", kernels="torch")
    torch.testing.assert_close(logits(exact.model), logits(plain), rtol=1e-5, atol=1e-5)
    assert exact.layout.modules == quantised.layout.modules
    assert exact.layout.modules["transformer.h.0.attn.c_attn"].out_features == 192
    for quantization, served in (("none", exact), ("nf4", quantised)):
        base = dequantized_base(str(folder), quantization=quantization, cache_dir=base_cache, progress=False)
        base.model.save_pretrained(tmp_path / quantization)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / quantization)
        torch.testing.assert_close(logits(reloaded), logits(served.model), rtol=1e-4, atol=1e-4)


# What it says of itself


def test_facts(folder: Path, load: Any) -> None:
    base = load(folder)
    assert base.name == "tiny"
    assert base.folder == folder
    assert base.quantization == "nf4"
    assert base.max_context_tokens == MAX_CONTEXT
    assert base.vocab_size == PADDED_VOCABULARY
    assert base.eos_token_ids == {base.tokenizer.eos_token_id}
    assert base.chat_template == base.tokenizer.chat_template
    assert base.device == torch.device("cpu")
    assert base.dtype == torch.float32
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_layout_is_the_same_in_every_form(folder: Path, load: Any) -> None:
    served, trained = load(folder).layout, load(folder, purpose="train").layout
    exact = load(folder, quantization="none").layout
    assert served == trained
    assert served.modules == exact.modules
    assert served.fingerprint != exact.fingerprint
    assert served.head == "lm_head"
    assert len(served.modules) == 15
    shape = served.modules["model.layers.1.self_attn.k_proj"]
    assert (shape.in_features, shape.out_features) == (64, 32)


def test_weight_bytes_count_everything_once(tmp_path: Path, load: Any) -> None:
    folder = save_tied_llama(tmp_path)
    exact = load(folder, quantization="none", kernels="torch")
    stored = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()) * 4
    assert stored <= exact.weight_bytes < stored + 1000  # buffers of the rotary embedding
    linear = sum(s.in_features * s.out_features for s in exact.layout.modules.values())
    quantised = linear - exact.layout.modules["lm_head"].in_features * PADDED_VOCABULARY
    for purpose in ("serve", "train"):
        saved = exact.weight_bytes - load(folder, purpose=purpose, kernels="torch").weight_bytes
        assert 3.2 * quantised < saved < 3.5 * quantised


@needs_native
def test_head_and_embedding_in_bfloat16_take_what_one_in_float32_took(tmp_path: Path, load: Any) -> None:
    folder = save_tied_llama(tmp_path)
    packed, plain = load(folder), load(folder, kernels="torch")
    assert packed.weight_bytes == pytest.approx(plain.weight_bytes, rel=0.05)
    assert packed.weight_bytes > packed.layout.modules["lm_head"].out_features * 64 * 4


def test_several_end_tokens(folder: Path, tmp_path: Path, load: Any) -> None:
    copied = build_tiny_model(tmp_path)
    (copied / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert load(copied).eos_token_ids == {5, 9, load(folder).tokenizer.eos_token_id}


# Quantised once


def test_second_start_skips_quantisation(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="adapters.quantize")
    first = load_base(str(folder), cache_dir=tmp_path, device="cpu", progress=False)
    assert "quantised tiny to NF4" in caplog.text
    caplog.clear()
    monkeypatch.setattr(quantize, "_quantize", lambda *_, **__: pytest.fail("quantised again"))
    second = load_base(str(folder), cache_dir=tmp_path, device="cpu", progress=False)
    assert "quantisation of tiny skipped" in caplog.text
    assert torch.equal(logits(first.model), logits(second.model))
    assert first.fingerprint == second.fingerprint


def test_codes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            load_base(str(folder), cache_dir=tmp_path / str(threads), device="cpu", progress=False)
    finally:
        torch.set_num_threads(before)
    (one,), (three,) = ((tmp_path / name).glob("nf4/*/model.safetensors") for name in "13")
    assert one.read_bytes() == three.read_bytes()


def test_scales_sum_the_same_whatever_the_order() -> None:
    """The mean that double quantisation subtracts: in float32 its last bits would depend on the threads."""
    absmax = torch.rand(100_001, generator=torch.Generator().manual_seed(1)) + 0.01
    means = {absmax[torch.randperm(len(absmax))].double().mean().float().item() for _ in range(20)}
    assert len(means) == 1


def test_a_damaged_cache_is_named(tmp_path: Path, folder: Path) -> None:
    load_base(str(folder), cache_dir=tmp_path, device="cpu", progress=False)
    (weights,) = tmp_path.glob("nf4/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match="delete"):
        load_base(str(folder), cache_dir=tmp_path, device="cpu", progress=False)


# What evaluation must not do to anything else in the process


def test_after_serving_everything_else_is_still_exact(folder: Path, load: Any, base_cache: Path) -> None:
    before = dequantized_model(str(folder), cache_dir=base_cache, progress=False).state_dict()
    gradient_before = _gradient(load(folder, purpose="train").model)
    served = load(folder)
    answer = logits(served.model)
    after = dequantized_model(str(folder), cache_dir=base_cache, progress=False).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(_gradient(load(folder, purpose="train").model), gradient_before)
    assert torch.equal(logits(served.model), answer)


def test_serving_model_cannot_be_saved_trained_or_adapted(folder: Path, load: Any, tmp_path: Path) -> None:
    model = load(folder).model
    answer = logits(model)
    for forbidden in (
        lambda: model.save_pretrained(tmp_path / "out"),
        model.state_dict,
        lambda: copy.deepcopy(model),
        lambda: torch.save(model, tmp_path / "out.pt"),
        lambda: _gradient(model),
    ):
        with pytest.raises(RuntimeError, match="purpose='train'"):
            forbidden()
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(model), answer)


def test_evaluating_in_the_middle_of_training_changes_nothing(folder: Path, load: Any) -> None:
    model = load(folder, purpose="train").model
    before, weights = _gradient(model), _dequantized(model)
    model.eval()
    logits(model)
    logits(model, PROMPT[:, :1])
    model.train()
    assert torch.equal(_gradient(model), before)
    assert all(torch.equal(a, b) for a, b in zip(_dequantized(model), weights, strict=True))
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


@needs_kernel
def test_plain_bitsandbytes_does_have_the_fault_that_is_avoided(folder: Path) -> None:
    model = plain_bitsandbytes(folder, repacks=True)
    before = _dequantized(model)
    logits(model)
    assert any(distance(a, b) > 0.5 for a, b in zip(_dequantized(model), before, strict=True))


def test_dequantized_model_is_plain_and_complete(folder: Path, dequantized: Any, tmp_path: Path) -> None:
    assert {parameter.dtype for parameter in dequantized.parameters()} == {torch.float32}
    assert {type(m).__name__ for m in dequantized.modules() if "Linear" in type(m).__name__} == {"Linear"}
    dequantized.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in reloaded.config.to_dict()
    assert torch.equal(logits(reloaded), logits(dequantized))
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(original.lm_head.weight, dequantized.lm_head.weight)
    assert NF4_ERROR < distance(logits(dequantized), logits(original)) < 0.5


def test_asking_for_cuda_where_there_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedBaseError, match="'cuda' was asked for"):
        load_base(str(folder), device="cuda", progress=False)


def _gradient(model: Any) -> Tensor:
    """Of a loss with respect to the first layer's input; passes through every quantised layer."""
    x = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
    model(inputs_embeds=x, labels=PROMPT).loss.backward()
    gradient: Tensor = x.grad
    return gradient


def _dequantized(model: Any) -> list[Tensor]:
    from bitsandbytes.functional import dequantize_4bit

    return [
        dequantize_4bit(module.weight.data, module.weight.quant_state).clone()
        for module in model.modules()
        if isinstance(module, Linear4bit)
    ]
