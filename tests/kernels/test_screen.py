"""The likeliest token by screening: always that of all logits, ties and near ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.library import native
from kernels.linear import PackedLinear, packed_dense
from kernels.rowwise import argmax
from kernels.screen import ScreenedHead, can_be_screened
from kernels.structs import Bfloat16, Precision

_LIBRARY = native()
needs_bfloat16 = pytest.mark.skipif(
    _LIBRARY is None or _LIBRARY.bfloat16 == Bfloat16.NONE, reason="needs products of bfloat16 pairs"
)


def head_of(weight_VD: torch.Tensor) -> PackedLinear:
    return packed_dense(weight_VD.bfloat16(), None, Precision.MEDIUM)


@needs_bfloat16
@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 9),
    width=st.sampled_from([1, 5, 8, 24, 100, 576]),
    vocabulary=st.sampled_from([1, 16, 17, 100, 1000]),
    outlier=st.sampled_from([0.0, 50.0]),
    copies=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_it_is_the_argmax_of_all_logits(
    rows: int, width: int, vocabulary: int, outlier: float, copies: bool, seed: int
) -> None:
    """Copies of a feature tie exactly, and those beside them differ by one rounding."""
    generator = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(vocabulary, width, generator=generator)
    x_BD = torch.randn(rows, width, generator=generator)
    x_BD[:, 0] += outlier
    if copies:
        first_D = weight_VD[0].clone()
        weight_VD[::3] = first_D
        weight_VD[1::6] = first_D * 1.005
        x_BD += 4 * first_D
    head = head_of(weight_VD)
    assert ScreenedHead(head).likeliest(x_BD).tolist() == argmax(head(x_BD)).tolist()


@needs_bfloat16
def test_a_row_that_is_not_finite_has_none() -> None:
    generator = torch.Generator().manual_seed(0)
    head = head_of(torch.randn(300, 64, generator=generator))
    x_BD = torch.randn(4, 64, generator=generator)
    x_BD[1, 3], x_BD[2, 5] = float("nan"), float("inf")
    found = ScreenedHead(head).likeliest(x_BD)
    assert found.tolist() == argmax(head(x_BD)).tolist()
    assert found.tolist()[1:3] == [-1, -1]


@needs_bfloat16
def test_margins_hold_and_are_narrow() -> None:
    """Of a head as large as real ones few logits are computed; no margin is ever exceeded."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(4000, 576, generator=generator).bfloat16()
    screen = ScreenedHead(head_of(weight_VD))
    x_BD = (torch.randn(16, 576, generator=generator) * 2).bfloat16()
    codes = screen._codes.permute(0, 3, 1, 4, 2).reshape(4000, 576).double() - 64
    found = (codes * screen._steps.reshape(-1, 1).double()) @ x_BD.double().T
    exact = weight_VD.double() @ x_BD.double().T
    margin = screen._errors.reshape(-1, 1).double() * x_BD.double().norm(dim=1)
    assert bool(((found - exact).abs() <= margin).all())
    assert float(margin.mean() / exact.std()) < 0.5


@pytest.mark.skipif(_LIBRARY is None, reason="needs the native library")
def test_heads_of_other_kinds_are_left_alone() -> None:
    weight_VD = torch.randn(64, 32)
    assert not can_be_screened(packed_dense(weight_VD, None, Precision.MEDIUM))
    assert not can_be_screened(packed_dense(weight_VD.bfloat16(), None))
    assert not can_be_screened(packed_dense(weight_VD.bfloat16(), torch.ones(64), Precision.MEDIUM))
