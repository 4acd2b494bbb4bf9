"""The torch operators: right, opaque to tracing, and the same without the native library."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from kernels import ops, rowwise
from kernels.linear import dequantize_nf4, linear_reference, pack_dense, pack_nf4
from kernels.structs import Activation
from tests.kernels.conditions import needs_native

SHAPE = 33, 96  # O, D


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def nf4() -> tuple[Tensor, Tensor, Tensor]:
    """Packed words, scales, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(1)
    count = SHAPE[0] * SHAPE[1]
    codes = torch.randint(0, 256, (count // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-count // 64), generator=generator)
    return *pack_nf4(codes, absmax, SHAPE, 64), dequantize_nf4(codes, absmax, SHAPE, 64)


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "reference"])
def _computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "reference":
        monkeypatch.setattr(ops, "native", lambda: None)


pytestmark = pytest.mark.usefixtures("_computed_by")


def test_nf4_linear() -> None:
    weights, scales, weight_OD = nf4()
    x, bias = randn(2, 3, SHAPE[1]), randn(SHAPE[0])
    y = torch.ops.quickchange.linear(x, weights, scales, bias, SHAPE[0])
    torch.testing.assert_close(y, linear_reference(weight_OD, x, bias), rtol=1e-5, atol=1e-5)
    opcheck(ops.linear, (x, weights, scales, bias, SHAPE[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_linear(dtype: torch.dtype) -> None:
    weight_OD, x = randn(*SHAPE).to(dtype), randn(5, SHAPE[1])
    y = torch.ops.quickchange.linear(x, pack_dense(weight_OD), None, None, SHAPE[0])
    torch.testing.assert_close(y, linear_reference(weight_OD, x, None), rtol=1e-5, atol=1e-5)


def test_lora_delta_changes_its_output_in_place() -> None:
    x, y = randn(4, 16), randn(4, 24)
    before, a, b = y.clone(), [randn(3, 16), randn(5, 16)], [randn(3, 24), randn(5, 24)]
    torch.ops.quickchange.lora_delta(y, x, a, b, [2.0, 0.5], [0, 1, 2, 2, 4, 1], [1.0, -0.5])
    before[:1] += 0.5 * x[:1] @ a[1].T @ b[1]
    before[2:] += -0.5 * 2.0 * x[2:] @ a[0].T @ b[0]
    torch.testing.assert_close(y, before, rtol=1e-5, atol=1e-5)
    opcheck(ops.lora_delta, (y, x, a, b, [2.0, 0.5], [0, 1, 2, 2, 4, 1], [1.0, -0.5]))


def test_paged_attention() -> None:
    q, k, v = randn(5, 4, 16), randn(5, 2, 16), randn(5, 2, 16)
    caches = [torch.zeros(4, 2, 2, 16) for _ in range(2)]
    where = (torch.tensor(x) for x in ([0, 1, 2, 0, 1], [0, 0, 0, 1, 1], [[3, 0], [1, 1]]))
    arguments = (q, k, v, *caches, *where, 0.25, None, None)
    out = torch.ops.quickchange.paged_attention(*arguments)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    keys, values = (x[:3].repeat_interleave(2, dim=1).transpose(0, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:3].transpose(0, 1), keys, values, attn_mask=mask, scale=0.25
    )
    torch.testing.assert_close(out[:3], expected.transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(caches[0][3, 0], k[0])
    opcheck(ops.paged_attention_op, arguments)


def test_row_wise_operators() -> None:
    x, weight, angles = randn(3, 4, 16), randn(16), randn(3, 16)
    for operator, arguments, expected in (
        (ops.rms_norm, (x, weight, 1e-5), rowwise.rms_norm_reference(x, weight, 1e-5)),
        (
            ops.rotary,
            (x, angles.cos(), angles.sin()),
            rowwise.rotary_reference(x, angles.cos(), angles.sin()),
        ),
        (ops.gated, (x[0], "silu"), rowwise.gated_reference(x[0], Activation.SILU)),
    ):
        torch.testing.assert_close(operator(*arguments), expected, rtol=1e-5, atol=1e-5)
        opcheck(operator, arguments)


def test_fake_tensors_have_the_shapes() -> None:
    with FakeTensorMode():
        x, weights = torch.empty(2, 7, 96), torch.empty(3, 96, 16)
        assert torch.ops.quickchange.linear(x, weights, None, None, 33).shape == (2, 7, 33)
        assert torch.ops.quickchange.gated(torch.empty(5, 64), "silu").shape == (5, 32)
