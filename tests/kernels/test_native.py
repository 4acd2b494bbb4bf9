"""Every native operation against its reference, over awkward shapes, in every instruction set that runs here.

And what the references do not have: a row's bits depend on nothing but itself.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from kernels import rowwise
from kernels.library import NativeLibrary, native, status
from kernels.linear import (
    _NF4_GAIN,
    NF4_VALUES,
    PackedLinear,
    dequantize_nf4,
    linear_forward,
    linear_reference,
    medium_nf4_weight,
    packed_dense,
    packed_nf4,
    unpacked_weight,
)
from kernels.lora import LoraFactors, Segment, Segments, add_lora_delta
from kernels.paged_attention import AttentionRule, LayerCache
from kernels.paging import PagedRows, cache_record, native_paged_attention
from kernels.structs import Activation, Bfloat16, Precision, WeightForm
from tests.kernels.attention_reference import attention_reference
from tests.kernels.conditions import needs_native

pytestmark = needs_native

ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 18, 19, 33, 64, 65, 70]
WIDTHS = [1, 3, 8, 15, 16, 17, 24, 40, 63, 64, 65, 96, 128, 200]
RANKS = [1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 256]
SCALES = [1.0, 0.5, -2.0]
AWKWARD = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def library() -> NativeLibrary:
    loaded = native()
    assert loaded is not None
    return loaded


@pytest.fixture(params=status().available or ["none"], autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = library().isa
    library().use_isa(request.param)
    yield
    library().use_isa(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nf4_codes(ins: int, outs: int, blocksize: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (-(-ins * outs // 2),), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(-(-ins * outs // blocksize), generator=generator) + 0.1


def nf4_layer(
    ins: int,
    outs: int,
    blocksize: int,
    bias: Tensor | None,
    seed: int,
    precision: Precision = Precision.HIGHEST,
) -> tuple[PackedLinear, Tensor]:
    """A layer with random codes and scales, and the weight that they stand for."""
    codes, absmax = nf4_codes(ins, outs, blocksize, seed)
    shape = (outs, ins)
    layer = packed_nf4(codes, absmax, shape, blocksize, bias, precision)
    return layer, dequantize_nf4(codes, absmax, shape, blocksize)


def assert_close(found: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Within float32's rounding of a sum whose terms' absolute values add up to `magnitude`."""
    assert found.shape == expected.shape
    excess = (found - expected).abs() - 2e-6 * magnitude - 1e-7
    assert found.numel() == 0 or float(excess.max()) <= 0, float((found - expected).abs().max())


@AWKWARD
@given(
    rows=st.sampled_from(ROWS),
    ins=st.sampled_from(WIDTHS),
    outs=st.sampled_from([*WIDTHS, 500]),
    blocksize=st.sampled_from([32, 64, 128]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nf4_linear(rows: int, ins: int, outs: int, blocksize: int, with_bias: bool, seed: int) -> None:
    bias = randn(outs, seed=seed) if with_bias else None
    layer, weight_OD = nf4_layer(ins, outs, blocksize, bias, seed)
    assert layer.form is (WeightForm.FLOAT32 if ins % 8 else WeightForm.NF4)
    x = randn(rows, ins, seed=seed + 1)
    expected = linear_reference(weight_OD.double(), x, bias)
    assert_close(layer(x), expected, linear_reference(weight_OD.abs(), x.abs(), None) + 1)


@AWKWARD
@given(
    rows=st.sampled_from(ROWS),
    ins=st.sampled_from(WIDTHS),
    outs=st.sampled_from([*WIDTHS, 500]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_dense_linear(rows: int, ins: int, outs: int, dtype: torch.dtype, seed: int) -> None:
    weight_OD, bias, x = randn(outs, ins, seed=seed).to(dtype), randn(outs, seed=1), randn(rows, ins, seed=2)
    layer = packed_dense(weight_OD, bias)
    expected = linear_reference(weight_OD, x, bias)
    assert_close(layer(x), expected, linear_reference(weight_OD.abs(), x.abs(), None) + 1)


@AWKWARD
@given(
    rows=st.sampled_from(ROWS),
    ins=st.sampled_from(WIDTHS),
    outs=st.sampled_from([*WIDTHS, 500]),
    blocksize=st.sampled_from([32, 64, 128]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_of_medium_precision(
    rows: int, ins: int, outs: int, blocksize: int, with_bias: bool, seed: int
) -> None:
    """Exact sums of rounded factors; rounded or not, within bfloat16's rounding of the exact product."""
    bias, x = randn(outs, seed=seed) if with_bias else None, randn(rows, ins, seed=seed + 1)
    codes, absmax = nf4_codes(ins, outs, blocksize, seed)
    shape, dense_OD = (outs, ins), randn(outs, ins, seed=seed).bfloat16()
    nf4 = packed_nf4(codes, absmax, shape, blocksize, bias, Precision.MEDIUM)
    exact_OD, rounded_OD = (of(codes, absmax, shape, blocksize) for of in (dequantize_nf4, medium_nf4_weight))
    dense = packed_dense(dense_OD, bias, Precision.MEDIUM)
    rounds = library().bfloat16 is not Bfloat16.NONE
    for layer, weight_OD, medium_OD in ((nf4, exact_OD, rounded_OD), (dense, dense_OD, dense_OD)):
        found, magnitude = layer(x), linear_reference(weight_OD.abs(), x.abs(), None)
        rounded = rounds and layer.form is not WeightForm.FLOAT32
        factors = (medium_OD.double(), x.bfloat16().double()) if rounded else (weight_OD.double(), x.double())
        expected = linear(factors[1], factors[0], None if bias is None else bias.double())
        assert_close(found, expected, magnitude + 1)
        error = (found - linear_reference(weight_OD, x, bias)).abs()
        assert not rows or float((error - 2**-8 * magnitude).max()) < 1e-5


def test_nf4_values_are_rounded_with_the_best_gain() -> None:
    """Error of the rounded values, root mean square over that of the values."""
    values = torch.tensor(NF4_VALUES)

    def error(gain: Tensor) -> Tensor:
        scaled = values * gain[:, None]
        return ((scaled.bfloat16() - scaled) / gain[:, None]).norm(dim=1) / values.norm()

    ours, plain = error(torch.tensor([_NF4_GAIN, 1.0])).tolist()
    assert ours == pytest.approx(6.3e-4, rel=0.01)
    assert plain == pytest.approx(1.06e-3, rel=0.01)
    assert ours < 1.001 * float(error(torch.linspace(1, 2, 100_001)).min())


def test_without_bfloat16_products_medium_is_highest() -> None:
    x = randn(19, 96)
    bits = [nf4_layer(96, 80, 64, None, 3, precision)[0](x) for precision in Precision]
    assert torch.equal(*bits) == (library().bfloat16 is Bfloat16.NONE)


def test_packing_loses_nothing() -> None:
    for ins, outs, blocksize in ((64, 32, 64), (96, 33, 64), (40, 7, 32), (8, 1, 64)):
        layer, weight_OD = nf4_layer(ins, outs, blocksize, None, seed=ins)
        weights, scales = layer.weights, layer.scales
        assert torch.equal(unpacked_weight(weights, scales, (outs, ins)), weight_OD)


@AWKWARD
@given(
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 16, 17]), min_size=1, max_size=6),
    ranks=st.lists(st.sampled_from(RANKS), min_size=2, max_size=3),
    ins=st.sampled_from(WIDTHS),
    outs=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_each_row_gets_its_own_adapters_update(
    lengths: list[int], ranks: list[int], ins: int, outs: list[int], dtype: torch.dtype, seed: int
) -> None:
    """Several projections side by side; slot 0 is the base, and one slot more than there are is empty."""
    total, segments, start = sum(lengths), [], 0
    for index, length in enumerate(lengths):
        segments.append(Segment(start, start + length, index % (len(ranks) + 2), SCALES[index % 3]))
        start += length
    parts, expected, magnitudes = [], [], []
    x = randn(total, ins, seed=seed)
    for part, out in enumerate(outs):
        weight_OD = randn(out, ins, seed=seed + part)
        layer = packed_dense(weight_OD, None)
        factors = {
            slot + 1: LoraFactors(
                randn(rank, ins, seed=slot).to(dtype), randn(rank, out, seed=slot + 9).to(dtype), 0.5 + slot
            )
            for slot, rank in enumerate(ranks)
        }
        y, magnitude = x @ weight_OD.T, x.abs() @ weight_OD.abs().T
        exact = {slot: _map(pair, Tensor.float) for slot, pair in factors.items()}
        add_lora_delta(y, x, Segments(segments), exact)
        positive = Segments([replace(segment, scale=abs(segment.scale)) for segment in segments])
        add_lora_delta(magnitude, x.abs(), positive, {s: _map(p, Tensor.abs) for s, p in exact.items()})
        for slot, pair in factors.items():
            layer.set_slot(slot, pair)
        parts.append(layer), expected.append(y), magnitudes.append(magnitude)
    found = linear_forward(parts, x, Segments(segments))
    assert_close(found, torch.cat(expected, dim=1), torch.cat(magnitudes, dim=1) + 1)


def _map(pair: LoraFactors, function: object) -> LoraFactors:
    return LoraFactors(function(pair.a_RD.float()), function(pair.b_RO.float()), pair.scaling)  # type: ignore[operator]


@AWKWARD
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 3, 15, 16, 250, 300]), st.sampled_from([1, 1, 2, 17])),
        min_size=1,
        max_size=4,
    ),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (5, 1), (9, 1)]),
    widths=st.sampled_from([(16, 16), (64, 64), (8, 8), (80, 80), (24, 40), (128, 128)]),
    block_tokens=st.sampled_from([1, 4, 16, 48]),
    window=st.sampled_from([None, 1, 3, 16, 257]),
    softcap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_paged_attention(
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    widths: tuple[int, int],
    block_tokens: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Each row is (tokens already cached, tokens of this step); blocks are scattered at random."""
    generator = torch.Generator().manual_seed(seed)
    (query_heads, kv_heads), (key_width, value_width) = heads, widths
    needed = [-(-(past + new) // block_tokens) for past, new in rows]
    free = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    nan = torch.full((sum(needed) + 2, block_tokens, kv_heads, 1), float("nan"))  # what others left there
    cache = LayerCache(nan.repeat(1, 1, 1, key_width).to(dtype), nan.repeat(1, 1, 1, value_width).to(dtype))
    rule, expected = AttentionRule(0.3, window, softcap), []
    q, k, v, positions, sequences, tables = [], [], [], [], [], []
    for index, ((past, new), count) in enumerate(zip(rows, needed, strict=True)):
        table = [free.pop() for _ in range(count)]
        slots = torch.tensor(
            [table[p // block_tokens] * block_tokens + p % block_tokens for p in range(past + new)]
        )
        keys, values = (
            torch.randn(past + new, kv_heads, width, generator=generator).to(dtype).float()
            for width in widths
        )
        queries = torch.randn(new, query_heads, key_width, generator=generator)
        cache.write(slots[:past], keys[:past], values[:past])
        q.append(queries), k.append(keys[past:]), v.append(values[past:]), tables.append(table)
        positions += range(past, past + new)
        sequences += [index] * new
        expected.append(attention_reference(queries, keys, values, rule))
    paged = PagedRows(positions, sequences, tables, block_tokens)
    out = native_paged_attention(torch.cat(q), torch.cat(k), torch.cat(v), cache_record(cache), paged, rule)
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)


@AWKWARD
@given(rows=st.sampled_from(ROWS), width=st.sampled_from(WIDTHS), seed=st.integers(0, 1000))
def test_row_wise_operations(rows: int, width: int, seed: int) -> None:
    x, weight = 3 * randn(rows, 2 * width, seed=seed), randn(2 * width, seed=1)
    found = rowwise.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found, rowwise.rms_norm_reference(x, weight, 1e-5), rtol=2e-6, atol=1e-6)
    for activation in Activation:
        expected = rowwise.gated_reference(x.double(), activation).float()
        torch.testing.assert_close(rowwise.gated(x, activation), expected, rtol=1e-5, atol=5e-6)
    angles = randn(rows, 2 * width, seed=2)
    heads = x[:, None].repeat(1, 3, 2)  # twice as wide as what is rotated
    expected = rowwise.rotary_reference(heads, angles.cos(), angles.sin())
    torch.testing.assert_close(
        rowwise.rotary(heads, angles.cos(), angles.sin()), expected, rtol=2e-6, atol=2e-6
    )


def test_activations_over_their_whole_range() -> None:
    x = torch.cat([torch.linspace(-100, 100, 20_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])])
    for activation in Activation:
        pairs = torch.stack((x, torch.ones_like(x)), dim=1)
        expected = rowwise.gated_reference(pairs.double(), activation).float()
        # GELU's 1 + tanh cancels where x is very negative: an ulp of one, times x.
        torch.testing.assert_close(rowwise.gated(pairs, activation), expected, rtol=1e-5, atol=1e-6)


def test_argmax_takes_the_first_of_equals_and_tells_what_is_not_finite() -> None:
    x = randn(6, 1000)
    x[1, [7, 990]] = 50.0
    x[2, 500], x[3, 999], x[4, 0] = float("nan"), float("inf"), float("-inf")
    x[5] = -1.0
    found = rowwise.argmax(x)
    assert found.tolist() == [int(x[0].argmax()), 7, -1, -1, -1, 0]
    assert found.tolist() == rowwise.argmax_reference(x).tolist()
    for width in (1, 15, 16, 17):
        assert rowwise.argmax(x[:1, :width]).item() == int(x[0, :width].argmax())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_rows_bits_are_its_own(threads: int) -> None:
    """Alone, among others, in any place and with any number of threads."""
    layers = {
        "nf4, medium": nf4_layer(96, 80, 64, randn(80), 3, Precision.MEDIUM)[0],
        "bfloat16, medium": packed_dense(randn(80, 96).bfloat16(), None, Precision.MEDIUM),
        "nf4": nf4_layer(96, 80, 64, randn(80), seed=3)[0],
        "float32": packed_dense(randn(80, 96), None),
        "bfloat16": packed_dense(randn(80, 96).bfloat16(), None),
    }
    x = randn(70, 96)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for layer in layers.values():
            for slot, rank in ((1, 5), (2, 16)):
                layer.set_slot(slot, LoraFactors(randn(rank, 96), randn(rank, 80)))
        alone = {
            name: torch.cat([layer(x[i : i + 1], Segments([Segment(0, 1, i % 3)])) for i in range(70)])
            for name, layer in layers.items()
        }
        torch.set_num_threads(threads)
        for name, layer in layers.items():
            for first, count in ((0, 70), (3, 2), (5, 7), (1, 19), (0, 64), (69, 1)):
                rows = range(first, first + count)
                segments = Segments([Segment(i - first, i - first + 1, i % 3) for i in rows])
                found = layer(x[first : first + count], segments)
                assert torch.equal(found, alone[name][first : first + count]), name
            uniform = Segments([Segment(2, 68, 1)])  # one adapter over many rows
            several = layer(x, uniform)
            assert all(
                torch.equal(several[i], layer(x[i : i + 1], Segments([Segment(0, 1, 1)]))[0])
                for i in (2, 31, 67)
            )
    finally:
        torch.set_num_threads(before)


def test_every_instruction_set_computes_the_same_bits() -> None:
    layer, _ = nf4_layer(96, 80, 64, randn(80), seed=3)
    layer.set_slot(1, LoraFactors(randn(7, 96), randn(7, 80)))
    x = randn(23, 96)
    results = []
    for isa in status().available:
        library().use_isa(isa)
        y = layer(x, Segments([Segment(0, 20, 1)]))
        results.append((y, rowwise.rms_norm(y, randn(80), 1e-6), rowwise.gated(y, Activation.GELU_TANH)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("precision", Precision)
def test_values_that_are_not_finite_stay_in_their_row_and_are_not_lost(precision: Precision) -> None:
    layer, _ = nf4_layer(64, 48, 64, None, 1, precision)
    x = randn(9, 64)
    expected = layer(x)
    for poison in (float("nan"), float("inf")):
        poisoned = x.clone()
        poisoned[4, 10] = poison
        found = layer(poisoned)
        assert not torch.isfinite(found[4]).any()
        assert torch.equal(torch.cat((found[:4], found[5:])), torch.cat((expected[:4], expected[5:])))


def test_factors_that_do_not_fit_are_refused() -> None:
    layer = packed_dense(randn(80, 96), None)
    for factors in (
        LoraFactors(randn(4, 95), randn(4, 80)),
        LoraFactors(randn(4, 96), randn(5, 80)),
        LoraFactors(randn(4, 96).half(), randn(4, 80).half()),
        LoraFactors(randn(96, 4).T, randn(4, 80)),
    ):
        with pytest.raises(ValueError, match="factors"):
            layer.set_slot(1, factors)


def test_slots_are_filled_emptied_and_filled_again() -> None:
    layer, x = packed_dense(torch.zeros(8, 16), None), randn(1, 16)
    pairs = {slot: LoraFactors(randn(2, 16, seed=slot), randn(2, 8, seed=slot)) for slot in (1, 5, 2, 40)}

    def update(slot: int) -> Tensor:
        return layer(x, Segments([Segment(0, 1, slot)]))

    for slot, pair in pairs.items():
        layer.set_slot(slot, pair)
    expected = {slot: update(slot) for slot in pairs}
    for slot, pair in pairs.items():
        assert_close(expected[slot], x @ pair.a_RD.T @ pair.b_RO, torch.full((1, 8), 100.0))
    layer.set_slot(5, None)
    layer.set_slot(7, None)  # never filled
    assert not update(5).any()
    assert not update(1000).any()
    layer.set_slot(5, pairs[2])
    assert torch.equal(update(5), expected[2])
    assert torch.equal(update(40), expected[40])


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    library = native()
    assert library is not None
    with pytest.raises(ValueError, match="sse9 is not available here"):
        library.use_isa("sse9")
