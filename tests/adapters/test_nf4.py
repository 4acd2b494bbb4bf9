"""The serving form of NF4 layers: right for every shape and row count, good for nothing but serving."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from adapters import nf4
from adapters.bnb import Linear4bit, functional
from tests.adapters.bases import distance

SHAPES = ((64, 32), (64, 64), (576, 192), (192, 576), (896, 96))  # D, O
ROWS = (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 100)
BF16_PRODUCTS = 0.01  # relative error of bfloat16 activations, scales and results

needs_kernel = pytest.mark.skipif(not nf4.fused_kernel_works(), reason="no AVX512-BF16 on this processor")


def linear4bit(ins: int, outs: int, *, bias: bool = False, double: bool = True) -> Linear4bit:
    torch.manual_seed(ins * outs)
    plain = nn.Linear(ins, outs, bias=bias)
    layer = Linear4bit(
        ins, outs, bias=bias, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double
    )
    layer.load_state_dict(plain.state_dict())
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


def rows(count: int, ins: int) -> Tensor:
    return torch.randn((count, ins), generator=torch.Generator().manual_seed(count))


@needs_kernel
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("ins", "outs"), SHAPES)
def test_packed_layer_computes_what_bitsandbytes_computes(ins: int, outs: int, double: bool) -> None:
    layer = linear4bit(ins, outs, bias=True, double=double)
    served = nf4.serving_linear(layer, torch.float32, fused=True)
    assert isinstance(served, nf4.PackedNF4Linear)
    for count in ROWS:
        x = rows(count, ins)
        found, expected = served(x), layer(x)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert count == 0 or distance(found, expected) < BF16_PRODUCTS


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("ins", "outs"), [*SHAPES, (64, 40), (96, 64), (100, 7)])
def test_plain_layer_is_exact_in_float32(ins: int, outs: int, double: bool) -> None:
    layer = linear4bit(ins, outs, bias=True, double=double)
    served = nf4.serving_linear(layer, torch.float32, fused=False)
    assert isinstance(served, nf4.PlainNF4Linear)
    for count in ROWS[1:]:
        torch.testing.assert_close(served(rows(count, ins)), layer(rows(count, ins)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ins", "outs"), [(64, 40), (96, 64)])
def test_shapes_that_the_kernel_refuses_are_served_plainly(ins: int, outs: int) -> None:
    served = nf4.serving_linear(linear4bit(ins, outs), torch.float32, fused=True)
    assert isinstance(served, nf4.PlainNF4Linear)


@needs_kernel
@pytest.mark.parametrize(("ins", "outs"), SHAPES)
def test_each_row_has_the_same_bits_in_every_batch(ins: int, outs: int) -> None:
    served = nf4.serving_linear(linear4bit(ins, outs), torch.float32, fused=True)
    x = rows(200, ins)
    whole = served(x)
    for count in ROWS[1:]:
        assert torch.equal(served(x[:count]), whole[:count])
    assert torch.equal(served(x[37:38]), whole[37:38])


@needs_kernel
def test_any_strides_leading_dimensions_and_types() -> None:
    served = nf4.serving_linear(linear4bit(64, 32), torch.float32, fused=True)
    x = rows(12, 64)
    expected = served(x)
    assert torch.equal(served(x.view(2, 6, 64)), expected.view(2, 6, 32))
    assert torch.equal(served(x.view(1, 12, 64)), expected[None])
    assert torch.equal(served(x[0]), expected[0])
    assert torch.equal(served(x.T.contiguous().T), expected)
    assert torch.equal(served(x[::2]), expected[::2])
    assert torch.equal(served(x.bfloat16()), expected.bfloat16())
    assert served(x.bfloat16()).dtype == torch.bfloat16


@needs_kernel
def test_packing_is_bitsandbytes_own() -> None:
    layer = linear4bit(192, 96)
    ours = nf4.pack_codes(layer.weight.data, 96, 192)
    theirs, _ = functional._convert_weight_packed_for_cpu(
        layer.weight.data.clone(), copy.copy(layer.weight.quant_state)
    )
    assert torch.equal(ours, theirs)


def test_first_forward_from_many_threads_at_once() -> None:
    served = [nf4.serving_linear(linear4bit(576, 192), torch.float32, fused=True) for _ in range(20)]
    x = rows(8, 576)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: served[index % 20](x), range(80)))
    expected = nf4.serving_linear(linear4bit(576, 192), torch.float32, fused=True)(x)
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("fused", [True, False])
def test_whatever_would_read_or_change_the_weights_is_refused(fused: bool) -> None:
    served = nf4.serving_linear(linear4bit(64, 32), torch.float32, fused=fused)
    before = served(rows(4, 64))
    for forbidden in (
        served.state_dict,
        lambda: served.load_state_dict({}),
        lambda: served.to(torch.bfloat16),
        served.half,
        lambda: copy.deepcopy(served),
        lambda: pickle.dumps(served),
        lambda: served(rows(4, 64).requires_grad_()),
    ):
        with pytest.raises(RuntimeError, match=r"purpose='train'.*dequantized_model"):
            forbidden()
    assert not hasattr(served, "weight")
    assert list(served.parameters()) == list(served.buffers()) == []
    assert torch.equal(served(rows(4, 64)), before)


def test_the_layer_it_was_made_of_may_change_or_go() -> None:
    layer = linear4bit(64, 32, bias=True)
    served = [nf4.serving_linear(layer, torch.float32, fused=fused) for fused in (True, False)]
    before = [form(rows(4, 64)) for form in served]
    layer.weight.data.zero_()
    layer.weight.quant_state.absmax.zero_()
    layer.bias.data.zero_()
    assert all(torch.equal(form(rows(4, 64)), y) for form, y in zip(served, before, strict=True))


@needs_kernel
def test_a_layer_that_bitsandbytes_repacked_is_refused() -> None:
    layer = linear4bit(64, 32)
    layer.support_avx512bf16_for_cpu = True
    layer.eval()(rows(1, 64))
    with pytest.raises(ValueError, match="load the base again"):
        nf4.serving_linear(layer, torch.float32, fused=True)
    with pytest.raises(ValueError, match="load the base again"):
        nf4.dequantized_weight(layer)


def test_dequantized_weight_is_the_weight_of_the_product() -> None:
    layer = linear4bit(64, 40)
    expected = layer(torch.eye(64)).T
    torch.testing.assert_close(nf4.dequantized_weight(layer), expected, rtol=1e-6, atol=1e-7)


def test_weight_bytes_are_a_little_more_than_half_a_byte_per_weight() -> None:
    for fused in (True, False):
        served = nf4.serving_linear(linear4bit(576, 192), torch.float32, fused=fused)
        assert 0.5 < served.weight_bytes / (576 * 192) < 0.57


def test_without_the_kernel_everything_is_served_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "fused_kernel_works", lambda: False)
    served = nf4.serving_linear(linear4bit(64, 32), torch.float32, fused=True)
    assert isinstance(served, nf4.PlainNF4Linear)


@needs_kernel
def test_a_kernel_that_disagrees_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scramble = nf4.pack_codes
    monkeypatch.setattr(nf4, "pack_codes", lambda *shape: scramble(*shape).flip(0))
    assert nf4.fused_kernel_works.__wrapped__() is False
    assert "packs NF4 differently" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("ins", "outs"), SHAPES)
def test_cuda_layer_computes_what_bitsandbytes_computes(ins: int, outs: int) -> None:
    layer = linear4bit(ins, outs, bias=True).to("cuda")
    served = nf4.serving_linear(layer, torch.bfloat16, fused=True)
    assert isinstance(served, nf4.CudaNF4Linear)
    exact = nf4.serving_linear(linear4bit(ins, outs, bias=True), torch.float32, fused=False)
    for count in (1, 16, 33, 2000):
        x = rows(count, ins)
        assert distance(served(x.to("cuda", torch.bfloat16)).cpu(), exact(x)) < BF16_PRODUCTS
