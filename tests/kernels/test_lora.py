"""The low-rank update against the plain formula, over awkward shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.lora import LoraFactors, Segment, Segments, add_lora_delta

LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33]


def random_factors(rank: int, width_in: int, width_out: int, generator: torch.Generator) -> LoraFactors:
    return LoraFactors(
        torch.randn(rank, width_in, generator=generator), torch.randn(rank, width_out, generator=generator)
    )


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=5),
    ranks=st.lists(st.sampled_from([1, 2, 7, 8, 16, 33]), min_size=2, max_size=2),
    widths=st.tuples(st.sampled_from([1, 16, 33]), st.sampled_from([1, 16, 33])),
    seed=st.integers(0, 1000),
)
def test_each_token_gets_its_own_adapters_update(
    lengths: list[int], ranks: list[int], widths: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {slot + 1: random_factors(rank, *widths, generator) for slot, rank in enumerate(ranks)}
    total = sum(lengths)
    x, y = (
        torch.randn(total, widths[0], generator=generator),
        torch.randn(total, widths[1], generator=generator),
    )
    expected, segments, start = y.clone(), [], 0
    for index, length in enumerate(lengths):
        slot = index % 3  # 0 is the base
        if slot:
            rows = slice(start, start + length)
            scale = (1.0, -0.5)[index % 2]
            expected[rows] += scale * (x[rows] @ factors[slot].a_RD.T @ factors[slot].b_RO)
            segments.append(Segment(start, start + length, slot, scale))
        start += length
    add_lora_delta(y, x, Segments(segments), factors)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_slot_without_factors_leaves_its_tokens_bit_identical() -> None:
    y = torch.randn(4, 8)
    before = y.clone()
    add_lora_delta(y, torch.randn(4, 8), Segments([Segment(0, 4, 3)]), {})
    assert torch.equal(y, before)


def test_neighbours_do_not_change_a_tokens_numbers_beyond_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {1: random_factors(4, 16, 16, generator), 2: random_factors(9, 16, 16, generator)}
    x = torch.randn(6, 16, generator=generator)
    together = torch.zeros(6, 16)
    add_lora_delta(together, x, Segments([Segment(0, 3, 1), Segment(3, 6, 2)]), factors)
    alone = torch.zeros(1, 16)
    add_lora_delta(alone, x[4:5], Segments([Segment(0, 1, 2)]), factors)
    torch.testing.assert_close(together[4:5], alone, rtol=1e-5, atol=1e-6)


def test_bfloat16_outputs_take_float32_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {1: random_factors(4, 16, 16, generator)}
    x, y = torch.randn(2, 16).bfloat16(), torch.zeros(2, 16, dtype=torch.bfloat16)
    add_lora_delta(y, x, Segments([Segment(0, 2, 1)]), factors)
    expected = x.float() @ factors[1].a_RD.T @ factors[1].b_RO
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
