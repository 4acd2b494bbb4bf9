"""Drawing tokens: native code against the reference, which puts whole rows in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.draw import Draw, draw_reference, draw_tokens
from tests.kernels.conditions import needs_native

DRAWS = st.builds(
    Draw,
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 20, 256, 257, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)


@needs_native
@settings(deadline=None, max_examples=400)
@given(
    draws=st.lists(DRAWS, min_size=1, max_size=4),
    width=st.sampled_from([1, 3, 200, 256, 257, 1000, 4000]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 10_000),
)
def test_native_code_draws_as_if_the_row_were_in_order(
    draws: list[Draw], width: int, spread: float, seed: int
) -> None:
    """Sums of float32 may decide otherwise than of float64, where a draw is that close to a border."""
    generator = torch.Generator().manual_seed(seed)
    rows = list(torch.randn(len(draws), width, generator=generator) * spread)
    for row_V, draw, token in zip(rows, draws, draw_tokens(rows, draws), strict=True):
        near = {
            float(row_V[draw_reference(row_V, moved)])
            for shift in (-3e-6, 0.0, 3e-6)
            for moved in [shifted(draw, shift)]
        }
        assert float(row_V[token]) in near


def shifted(draw: Draw, by: float) -> Draw:
    uniform = min(max(draw.uniform + by, 0.0), 1.0 - 1e-12)
    return Draw(draw.temperature, draw.top_k, draw.top_p, draw.min_p, uniform)


@needs_native
def test_what_the_likeliest_do_not_settle_is_put_in_order() -> None:
    row_V = torch.linspace(0, 1, 2000)
    for draw in (Draw(1.0, 0, 1.0, 0.0, 0.9), Draw(1.0, 1500, 1.0, 0.0, 0.9), Draw(1.0, 0, 0.8, 0.0, 0.9)):
        (token,) = draw_tokens([row_V], [draw])
        assert token == draw_reference(row_V, draw)
        assert token < 2000 - 256


@pytest.mark.parametrize("copies", [1, 3])
def test_a_draw_is_its_rows_own(copies: int) -> None:
    generator = torch.Generator().manual_seed(0)
    row_V, other_V = torch.randn(2, 3000, generator=generator) * 4
    draw = Draw(0.9, 0, 0.95, 0.0, 0.7)
    (alone,) = draw_tokens([row_V], [draw])
    mixed = draw_tokens([other_V, row_V] * copies, [draw] * (2 * copies))
    assert all(token == alone for token in mixed[1::2])


def test_no_rows_no_tokens() -> None:
    assert draw_tokens([], []) == []
