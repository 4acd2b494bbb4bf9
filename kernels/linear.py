"""Linear layers over packed weights, with the update of each row's adapter, in native code on a CPU.

B rows of activations, D in-features, O out-features, N tiles of 16 out-features, G groups of columns that
share a scale, S slots, R rank of one adapter.

Every row is computed on its own, in an order that depends on nothing else: the same bits in any batch and
with any number of threads. Weights are packed once; each function has a reference in plain torch beside it.
"""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.library import native
from kernels.lora import LoraFactors, Segments
from kernels.structs import ElementType, Factors, Linear, Precision, WeightForm

TILE = 16
_WORD = 8  # codes in one 32-bit word
_MAX_GROUP = 64

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022833234, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""4-bit NormalFloat, appendix E of the QLoRA paper (Dettmers et al. 2023), by code."""

_NF4_GAIN = 1.437006
"""Products of medium precision round the values times this to bfloat16: kGain of native/pairs.h."""

ELEMENT_TYPES = {torch.float32: ElementType.FLOAT32, torch.bfloat16: ElementType.BFLOAT16}
_DENSE_FORMS = {torch.float32: WeightForm.FLOAT32, torch.bfloat16: WeightForm.BFLOAT16}


class PackedLinear:
    """One layer's weights as the native code reads them, and the adapters that are attached to it.

    Attributes:
        in_features, out_features: D and O.
        form: how weights are stored.
        weights, scales, bias: as they are stored.
        record: the C structure; its address stays valid as long as this object lives.
    """

    def __init__(
        self,
        weights: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        *,
        shape: tuple[int, int],
        form: WeightForm,
        group: int = 1,
        precision: Precision = Precision.HIGHEST,
    ) -> None:
        """
        Args:
            weights, scales: as `pack_nf4` or `pack_dense` made them.
            bias: [O] float32.
            shape: O and D.
            group: columns per scale.
            precision: of products with NF4 and bfloat16 weights; where the instruction set has none of medium
                precision, they are of the highest.
        """
        self.out_features, self.in_features = shape
        self.form = form
        self.weights, self.scales, self.bias = weights, scales, bias
        self._factors: dict[int, LoraFactors] = {}  # keeps alive what the table points to
        self._table = (Factors * 0)()
        self.record = Linear(
            weights.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None,
            0,
            self.in_features,
            self.out_features,
            form,
            group,
            precision,
            0,
        )

    @property
    def weight_bytes(self) -> int:
        """Memory of weights, scales and bias."""
        kept = self.weights, self.scales, self.bias
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def set_slot(self, slot: int, factors: LoraFactors | None) -> None:
        """Attaches an adapter's factors to a slot, or takes them away with None; not while a step runs.

        Raises:
            ValueError: the factors do not fit this layer.
        """
        if factors is None:
            if self._factors.pop(slot, None) is not None:
                self._table[slot] = Factors()
            return
        _check_factors(factors, self.in_features, self.out_features)
        if slot >= len(self._table):
            self._grow(2 * slot + 1)
        self._factors[slot] = factors
        self._table[slot] = _factors_record(factors)

    def has_slot(self, slot: int) -> bool:
        """Whether an adapter's factors are attached to a slot."""
        return slot in self._factors

    def _grow(self, slots: int) -> None:
        """A longer table, with the old one in it: filling a slot costs the same however many there are."""
        table = (Factors * slots)(*self._table)
        # ctypes keeps the table alive with the pointer to it.
        self.record.slots, self.record.slot_count = table, slots
        self._table = table

    def __call__(self, x: Tensor, segments: "Segments | None" = None) -> Tensor:
        """[…, D] float32 → […, O], with the update of each row's adapter."""
        return linear_forward((self,), x, segments)

    def add_delta(self, y_BO: Tensor, x_BD: Tensor, segments: Segments) -> None:
        """Adds the update of each row's adapter, and no product, to y in place; both contiguous float32."""
        library = native()
        assert library is not None, "packed layers are made only where the library is"
        library.functions.qc_lora_delta(
            _pointers((self,)), 1, x_BD.data_ptr(), self.in_features, y_BO.data_ptr(), self.out_features,
            segments.address, len(segments), torch.get_num_threads(),
        )  # fmt: skip


def linear_forward(parts: Sequence[PackedLinear], x: Tensor, segments: "Segments | None" = None) -> Tensor:
    """Products of several layers with one input, side by side: […, D] float32 → […, sum of O]."""
    library = native()
    assert library is not None, "packed layers are made only where the library is"
    x_BD = x.reshape(-1, x.shape[-1]).contiguous()
    rows, width = x_BD.shape
    outs = sum(part.out_features for part in parts)
    y_BO = torch.empty((rows, outs))
    if rows:
        table, count = (segments.address, len(segments)) if segments else (None, 0)
        library.functions.qc_linear_forward(
            _pointers(parts), len(parts), x_BD.data_ptr(), width, y_BO.data_ptr(), outs, rows, table, count,
            0, torch.get_num_threads(),
        )  # fmt: skip
    return y_BO.view(*x.shape[:-1], outs)


def _pointers(parts: Sequence[PackedLinear]) -> "ctypes.Array[ctypes._Pointer[Linear]]":
    return (ctypes.POINTER(Linear) * len(parts))(*(ctypes.pointer(part.record) for part in parts))


def _factors_record(factors: LoraFactors) -> Factors:
    return Factors(
        factors.a_RD.data_ptr(),
        factors.b_RO.data_ptr(),
        factors.rank,
        ELEMENT_TYPES[factors.a_RD.dtype],
        factors.scaling,
        0,
    )


def _check_factors(factors: LoraFactors, ins: int, outs: int) -> None:
    a, b = factors.a_RD, factors.b_RO
    if a.shape != (factors.rank, ins) or b.shape != (factors.rank, outs):
        raise ValueError(f"factors of shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit {ins}→{outs}")
    if a.dtype not in ELEMENT_TYPES or a.dtype != b.dtype:
        raise ValueError(f"factors must be both float32 or both bfloat16, not {a.dtype} and {b.dtype}")
    if not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError("factors must be contiguous")


def nf4_group(ins: int, blocksize: int) -> int:
    """Columns that share a scale in every row, when blocks of `blocksize` run on from row to row; 1 to 64."""
    return math.gcd(ins, blocksize, _MAX_GROUP)


def packed_nf4(
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    bias: Tensor | None,
    precision: Precision = Precision.HIGHEST,
) -> PackedLinear:
    """A layer from bitsandbytes' NF4 codes; its arguments are copied.

    Args:
        codes: uint8, two neighbouring columns of a row to a byte, the first in the high nibble.
        absmax: float32, one scale for each `blocksize` weights, counted on from row to row.
        shape: O and D. Where D is no multiple of 8 the weights are kept in float32.
        bias: [O].
    """
    group = nf4_group(shape[1], blocksize)
    if group % _WORD:
        return packed_dense(dequantize_nf4(codes, absmax, shape, blocksize), bias)
    weights, scales = pack_nf4(codes, absmax, shape, blocksize)
    form, kept = WeightForm.NF4, _float_bias(bias)
    return PackedLinear(weights, scales, kept, shape=shape, form=form, group=group, precision=precision)


def packed_dense(
    weight_OD: Tensor, bias: Tensor | None, precision: Precision = Precision.HIGHEST
) -> PackedLinear:
    """A layer from a float32 or bfloat16 weight, which is copied and kept in its type."""
    outs, ins = weight_OD.shape
    weights, form = pack_dense(weight_OD), _DENSE_FORMS[weight_OD.dtype]
    return PackedLinear(weights, None, _float_bias(bias), shape=(outs, ins), form=form, precision=precision)


def pack_nf4(codes: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes as int32 words [N, D/8, 16] and scales [N, G, 16]; see qc_linear."""
    outs, ins = shape
    group = nf4_group(ins, blocksize)
    code_OD = _unpacked(codes, shape).to(torch.int32)
    words_NTW = _tiles(code_OD, _WORD)  # [N, 16, D/8, 8]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    words = (words_NTW << shifts).sum(dim=-1, dtype=torch.int32)
    first_OG = torch.arange(outs)[:, None] * ins + torch.arange(0, ins, group)
    scales = _tiles(absmax.float()[first_OG // blocksize], 1)[..., 0]
    return words.transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous()


def pack_dense(weight_OD: Tensor) -> Tensor:
    """A weight as [N, D, 16], padded with zeros."""
    return _tiles(weight_OD.detach(), 1)[..., 0].transpose(1, 2).contiguous()


def unpacked_weight(weights: Tensor, scales: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """The float32 weight [O, D] that packed weights stand for: the inverse of `pack_nf4` and `pack_dense`."""
    outs, ins = shape
    if scales is None:
        return weights.transpose(1, 2).reshape(-1, ins)[:outs].float()
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes_NWTJ = (weights[..., None] >> shifts) & 0xF
    values = torch.tensor(NF4_VALUES)[codes_NWTJ.long()].transpose(1, 2).reshape(-1, ins)
    scale_OG = scales.transpose(1, 2).reshape(len(values), -1)
    return (values * scale_OG.repeat_interleave(ins // scale_OG.shape[1], dim=1))[:outs]


def dequantize_nf4(codes: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int) -> Tensor:
    """The float32 weight [O, D]: the reference of every NF4 product."""
    flat = torch.tensor(NF4_VALUES)[_unpacked(codes, shape).long()].flatten()
    scale = absmax.float().repeat_interleave(blocksize)[: flat.numel()]
    return (flat * scale).view(shape)


def medium_nf4_weight(codes: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int) -> Tensor:
    """The weight [O, D] of products of medium precision, float64."""
    rounded = (torch.tensor(NF4_VALUES) * _NF4_GAIN).bfloat16().double() / _NF4_GAIN
    flat = rounded[_unpacked(codes, shape).long()].flatten()
    return (flat * absmax.double().repeat_interleave(blocksize)[: flat.numel()]).view(shape)


def linear_reference(weight_OD: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias in float32, in plain torch."""
    return F.linear(x.float(), weight_OD.float(), bias)


def _unpacked(codes: Tensor, shape: tuple[int, int]) -> Tensor:
    """One code to a byte, [O, D]."""
    pairs = codes.detach().view(torch.uint8).flatten()
    return torch.stack((pairs >> 4, pairs & 0xF), dim=-1).flatten()[: math.prod(shape)].view(shape)


def _tiles(matrix_OD: Tensor, columns: int) -> Tensor:
    """[O, D] → [N, 16, D / columns, columns], rows that are not there filled with zeros."""
    outs, ins = matrix_OD.shape
    padded = F.pad(matrix_OD, (0, 0, 0, -outs % TILE))
    return padded.view(-1, TILE, ins // columns, columns)


def _float_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous().clone()
