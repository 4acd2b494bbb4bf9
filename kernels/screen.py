"""The likeliest token without all logits: the output head in seven bits, and itself where it matters.

B rows of activations, D in-features, V vocabulary, N tiles of 16 out-features.

A head is read once for every token, and in small models it is most of what is read. Its copy in seven bits is
half as long and gives every logit to within a margin that is known; the few whose margins reach the top are
computed from the head itself. The result is that of all logits, bit for bit.
"""

import ctypes

import torch
from torch import Tensor

from kernels.library import native
from kernels.linear import TILE, PackedLinear, unpacked_weight
from kernels.structs import Bfloat16, Precision, ScreenRecord, WeightForm

_LARGEST_CODE = 63
_ZERO_CODE = 64
_FLOAT_ROUNDING = 2.0**-24
_SLACK = 1.01
"""Of margins, for the few operations that make them."""
_TILES_AT_ONCE = 256


class ScreenedHead:
    """Finds the likeliest token of each row; its copy of a bfloat16 head takes half of the head's bytes."""

    def __init__(self, head: PackedLinear) -> None:
        """
        Args:
            head: for which `can_be_screened` is true; kept.
        """
        parts = [_coded(weights) for weights in torch.split(head.weights, _TILES_AT_ONCE)]
        self._codes, self._steps, self._errors = (torch.cat(each) for each in zip(*parts, strict=True))
        self._head = head
        self._record = ScreenRecord(self._codes.data_ptr(), self._steps.data_ptr(), self._errors.data_ptr())

    @property
    def nbytes(self) -> int:
        """Memory beside that of the head."""
        return self._codes.nbytes + self._steps.nbytes + self._errors.nbytes

    def likeliest(self, x_BD: Tensor) -> Tensor:
        """Index of each row's largest logit, the first of equals; -1 where a row is not finite. [B] int64.

        Args:
            x_BD: contiguous float32.
        """
        library = native()
        assert library is not None, "packed layers are made only where the library is"
        index_B = torch.empty(len(x_BD), dtype=torch.int64)
        done = library.functions.qc_likeliest(
            ctypes.byref(self._head.record), ctypes.byref(self._record), x_BD.data_ptr(), x_BD.shape[1],
            len(x_BD), index_B.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        assert done == 0, "made only where the instruction set has these products"
        return index_B


def can_be_screened(head: PackedLinear) -> bool:
    """Whether products with this head are those that screening stands for, here and now."""
    library = native()
    return (
        library is not None
        and library.bfloat16 != Bfloat16.NONE
        and head.form is WeightForm.BFLOAT16
        and head.record.precision == Precision.MEDIUM
        and head.bias is None
    )


def _coded(weights_ND16: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and lengths of errors of some tiles; see qc_screen."""
    tiles, ins, _ = weights_ND16.shape
    weight_OD = unpacked_weight(weights_ND16, None, (tiles * TILE, ins))
    step_O = weight_OD.abs().amax(dim=1) / _LARGEST_CODE
    step_O = torch.where(step_O > 0, step_O, 1.0)
    rounded_OD = torch.round(weight_OD / step_O[:, None])
    error_O = (rounded_OD.double() * step_O[:, None].double() - weight_OD.double()).norm(dim=1)
    margin_O = _SLACK * (error_O + _rounding(weight_OD, step_O))
    codes_OD = torch.nn.functional.pad(rounded_OD + _ZERO_CODE, (0, -ins % 8), value=_ZERO_CODE)
    pairs = codes_OD.to(torch.uint8).view(tiles, TILE, -1, 2, 4)  # the halves of an eight
    return (
        pairs.permute(0, 2, 4, 1, 3).contiguous(),
        step_O.view(tiles, TILE).contiguous(),
        margin_O.float().view(tiles, TILE).contiguous(),
    )


def _rounding(weight_OD: Tensor, step_O: Tensor) -> Tensor:
    """What float32 sums can be off, of codes and of weights, over the length of a row of activations.

    A sum of n products is off by at most n roundings of the sum of their sizes (Higham 2002, section 3.1),
    and sizes sum up to no more than the square root of n times their largest, times the length.
    """
    ins = weight_OD.shape[1]
    of_codes = 2 * (_LARGEST_CODE + 2 * _ZERO_CODE + 1) * ins**0.5 * step_O.double()
    rounding: Tensor = (ins + 8) * _FLOAT_ROUNDING * (of_codes + weight_OD.double().norm(dim=1))
    return rounding
