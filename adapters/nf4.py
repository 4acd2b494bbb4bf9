"""Owns the serving forms of an NF4 linear layer that run in bitsandbytes and torch. Knows no adapters.

B rows of activations, D in-features, O out-features, K blocks of 64 weights.

bitsandbytes' Linear4bit repacks its weight in place at the first evaluation and is wrong for everything but
evaluation from then on. The layers here pack a private copy once, at load, and can do nothing but `forward`;
whatever would read their weights (state_dict, pickle, PEFT, gradients) is refused.

On a CPU adapters/native.py comes first. Without the native library, and on CUDA, there are three forms, one
choice for the life of the layer:

PackedNF4Linear   CPU with AVX512-BF16: bitsandbytes' fused kernel, activations rounded to bfloat16
CudaNF4Linear     CUDA: bitsandbytes' fused kernel, dequantise + GEMM for long batches
PlainNF4Linear    everything else, and exact float32: dequantise + GEMM

Measured on an AMD EPYC (Zen 4), one thread, milliseconds: fused kernel through the operator, fused kernel
called directly, dequantise + float32 GEMM, dequantise + bfloat16 GEMM:

    D→O        B=1                   B=16                  B=64                B=256
    576→576    .060 .026 .120 .162   .128 .094 .249 .212   .38 .34 .65 .37     1.4 1.3 2.4 1.1
    576→192    .063 .019 .053 .111   .091 .044 .119 .151   .18 .13 .24 .21     .55 .48 .83 .42
    576→1536   .074 .042 .240 .292   .265 .226 .907 .452   1.0 .90 2.1 1.1     4.3 3.9 7.9 3.1
    1536→576   .070 .043 .219 .278   .268 .222 1.05 .448   1.0 .90 1.9 .82     3.3 3.3 5.4 2.4
    896→4864   .152 .128 2.22 1.51   1.01 .97 4.23 2.23    4.5 4.4 11. 4.9     18. 16. 31. 13.

So the operator's Python costs as much as a small product, and the kernel is called directly. Dequantise +
bfloat16 GEMM overtakes it only past about 64 rows, by a quarter at most; that would need a second copy of all
codes, and would make a row depend on its batch: the fused kernel gives a row the same bits whatever its
neighbours, the number of rows and the number of threads. One copy, one kernel. (A processor whose float32
GEMM outruns its bfloat16 dot products would gain up to twice at 128 rows, at the same price.)
"""

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from adapters.bnb import Linear4bit, functional, lib
from adapters.serving import ServingLinear, refuse_gradients

log = logging.getLogger(__name__)

_ROWS_PER_TILE = 32  # the fused kernel's tile of out-features
_COLUMNS_PER_STEP = 64  # and of in-features
_Kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)


class PlainNF4Linear(ServingLinear):
    """Dequantises the weight to the activations' type at every call, then one GEMM. Any device and shape."""

    def __init__(self, codes: Tensor, state: functional.QuantState, bias: Tensor | None) -> None:
        super().__init__(state.shape[1], state.shape[0], bias)
        self._codes = codes.detach().clone()
        self._absmax = plain_absmax(state)
        self._blocksize = int(state.blocksize)

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, O]."""
        refuse_gradients(x)
        shape = (self.out_features, self.in_features)
        dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
        weight_OD = dequantize(self._codes, self._absmax, self._blocksize, "nf4", shape, x.dtype)
        return linear(x, weight_OD, self.bias)


class CudaNF4Linear(ServingLinear):
    """bitsandbytes' own path for CUDA: it picks a fused kernel or dequantise + GEMM by the number of rows."""

    def __init__(self, codes: Tensor, state: functional.QuantState, bias: Tensor | None) -> None:
        super().__init__(state.shape[1], state.shape[0], bias)
        self._codes = codes.detach().clone().view(-1, 1)
        self._state = state
        self._nested: dict[str, Any] = {}
        self._absmax = state.absmax
        if state.nested:
            self._absmax = state.state2.absmax
            self._nested = {
                "absmax_8bit": state.absmax,
                "absmax_code": state.state2.code,
                "absmax_offset": state.offset,
            }

    @property
    def weight_bytes(self) -> int:
        """Bytes of every tensor this layer keeps."""
        nested = sum(tensor.nbytes for tensor in self._nested.values())
        return super().weight_bytes + int(nested)

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, O]."""
        refuse_gradients(x)
        state = self._state
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            x, self._codes, state.shape, self._absmax, state.blocksize, "nf4", bias=self.bias, **self._nested
        )
        return y


class PackedNF4Linear(ServingLinear):
    """bitsandbytes' fused CPU kernel over codes packed once; bfloat16 products, each row on its own."""

    def __init__(self, codes: Tensor, state: functional.QuantState, bias: Tensor | None) -> None:
        super().__init__(state.shape[1], state.shape[0], bias)
        self._packed = pack_codes(codes, self.out_features, self.in_features)
        absmax_OK = plain_absmax(state).view(self.out_features, -1)
        self._absmax = absmax_OK.T.to(torch.bfloat16).contiguous()
        self._blocksize = int(state.blocksize)
        self._kernel = _fused_kernel()
        self._pointers = self._packed.data_ptr(), self._absmax.data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, O] in the type of x."""
        refuse_gradients(x)
        rows_BD = x.to(torch.bfloat16).view(-1, self.in_features) if x.is_contiguous() else self._rows(x)
        rows, outs = rows_BD.shape[0], self.out_features
        if rows == 0:  # the kernel divides by the number of rows, and the process would die
            return x.new_empty((*x.shape[:-1], outs))
        y_BO = torch.empty((rows, outs), dtype=torch.bfloat16)
        packed, absmax = self._pointers
        self._kernel(
            rows, outs, self.in_features,
            rows_BD.data_ptr(), packed, absmax, y_BO.data_ptr(),
            self._blocksize, self.in_features, outs,
        )  # fmt: skip
        y = y_BO.to(x.dtype).view(*x.shape[:-1], outs)
        return y if self.bias is None else y.add_(self.bias)

    def _rows(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).reshape(-1, self.in_features).contiguous()


def serving_linear(layer: Linear4bit, dtype: torch.dtype, *, fused: bool) -> ServingLinear:
    """The serving form of an NF4 Linear4bit, by its device and shape; the layer's weight is copied, not kept.

    Args:
        dtype: of the activations; the bias is kept in it.
        fused: whether products may be in bfloat16 on a CPU.
    """
    codes, state = layer.weight.data, layer.weight.quant_state
    refuse_repacked(layer)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    form: type[PlainNF4Linear | CudaNF4Linear | PackedNF4Linear] = PlainNF4Linear
    if codes.device.type == "cuda":
        form = CudaNF4Linear
    elif codes.device.type == "cpu" and fused and fits_fused_kernel(state):
        form = PackedNF4Linear
    return form(codes, state, bias)


def refuse_repacked(layer: Linear4bit) -> None:
    """Raises ValueError if bitsandbytes has repacked the layer's weight, since its codes then differ."""
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError("the layer was evaluated and bitsandbytes repacked it; load the base again")


def fits_fused_kernel(state: functional.QuantState) -> bool:
    """Whether the fused CPU kernel runs here and takes this shape."""
    outs, ins = state.shape
    tiled = outs % _ROWS_PER_TILE == 0 and ins % _COLUMNS_PER_STEP == 0 and state.blocksize == 64
    return tiled and fused_kernel_works()


def plain_absmax(state: functional.QuantState) -> Tensor:
    """The float32 scale of each block, with the second quantisation undone; never shared with `state`."""
    if not state.nested:
        absmax: Tensor = state.absmax.float().clone()
        return absmax
    unnested: Tensor = functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return unnested


def dequantized_weight(layer: Linear4bit) -> Tensor:
    """The [O, D] weight of a Linear4bit, NF4 or FP4, in float32, without rounding in between."""
    refuse_repacked(layer)
    state = layer.weight.quant_state
    absmax, shape = plain_absmax(state), tuple(state.shape)
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        layer.weight.data, absmax, state.blocksize, state.quant_type, shape, torch.float32
    )
    return weight


def pack_codes(codes: Tensor, outs: int, ins: int) -> Tensor:
    """Codes in the fused kernel's order: tiles of 32 out-features, column by column.

    In `codes` a byte holds two neighbouring columns of one row, the first in the high nibble. In a tile a
    byte holds one column of two rows, r in the low nibble and r + 16 in the high one.
    """
    tiles = codes.view(torch.uint8).view(outs // _ROWS_PER_TILE, 2, _ROWS_PER_TILE // 2, ins // 2)
    first, second = tiles >> 4, tiles & 0xF
    columns = [half[:, 0] | (half[:, 1] << 4) for half in (first, second)]
    return torch.stack(columns, dim=-1).transpose(1, 2).contiguous().view(outs, ins // 2)


@functools.cache
def fused_kernel_works() -> bool:
    """Whether this processor has AVX512-BF16 and the kernel agrees with dequantisation on a small product."""
    if not functional.has_avx512bf16():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((64, 128), generator=generator)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    x = torch.randn((3, 128), generator=generator)
    exact = PlainNF4Linear(codes, state, None)(x)
    error = (PackedNF4Linear(codes, state, None)(x) - exact).norm() / exact.norm()
    if error > 0.02:
        log.warning(
            "this bitsandbytes packs NF4 differently (error %.3f); serving without its CPU kernel", error
        )
    return bool(error <= 0.02)


@functools.cache
def _fused_kernel() -> Any:
    """The C function, with argument types of its own (bitsandbytes calls the same symbol without any)."""
    symbol = lib.gemv_4bit_inference_cpu_nf4_bf16
    address = ctypes.cast(symbol, ctypes.c_void_p).value
    assert address is not None
    return _Kernel(address)
