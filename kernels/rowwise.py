"""Row-wise operations in native code, each with its reference in plain torch: norm, rotary, gate, argmax.

T tokens, D features, H heads, E head dimension, V vocabulary. All float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.library import NativeLibrary, native
from kernels.structs import Activation


def _library() -> NativeLibrary:
    library = native()
    assert library is not None, "called only where the library is"
    return library


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """weight · x / sqrt(mean(x²) + epsilon) of each row of […, D] (Zhang and Sennrich 2019)."""
    rows_TD = x.float().reshape(-1, x.shape[-1]).contiguous()
    y_TD = torch.empty_like(rows_TD)
    count, width = rows_TD.shape
    _library().functions.qc_rms_norm(
        rows_TD.data_ptr(), width, weight_D.data_ptr(), y_TD.data_ptr(), width, count, width, epsilon,
        torch.get_num_threads(),
    )  # fmt: skip
    return y_TD.view(x.shape)


def rms_norm_reference(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """As `rms_norm`."""
    return weight_D * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def rotary(x_THE: Tensor, cosines_TR: Tensor, sines_TR: Tensor) -> Tensor:
    """Rotates the first R dimensions of each head by its token's angles (Su et al. 2021), in halves."""
    y_THE = x_THE.float().clone(memory_format=torch.contiguous_format)
    count, heads, width = y_THE.shape
    cosines, sines = cosines_TR.float().contiguous(), sines_TR.float().contiguous()
    _library().functions.qc_rotary(
        y_THE.data_ptr(), heads * width, heads, width, cosines.data_ptr(), sines.data_ptr(),
        cosines.shape[-1], count, torch.get_num_threads(),
    )  # fmt: skip
    return y_THE


def rotary_reference(x_THE: Tensor, cosines_TR: Tensor, sines_TR: Tensor) -> Tensor:
    """As `rotary`."""
    width = cosines_TR.shape[-1]
    turned, rest = x_THE[..., :width], x_THE[..., width:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cosines_TR[:, None] + swapped * sines_TR[:, None], rest), dim=-1)


def gated(x_T2D: Tensor, activation: Activation) -> Tensor:
    """act(x[:, :D]) · x[:, D:] (Shazeer 2020: SwiGLU, GEGLU)."""
    rows = x_T2D.float().contiguous()
    count, width = rows.shape[0], rows.shape[1] // 2
    y_TD = torch.empty((count, width))
    _library().functions.qc_gated(
        rows.data_ptr(), 2 * width, y_TD.data_ptr(), width, count, width, activation, torch.get_num_threads()
    )
    return y_TD


def gated_reference(x_T2D: Tensor, activation: Activation) -> Tensor:
    """As `gated`."""
    gate, up = x_T2D.chunk(2, dim=-1)
    return (F.silu(gate) if activation is Activation.SILU else F.gelu(gate, approximate="tanh")) * up


def argmax(x_TV: Tensor) -> Tensor:
    """Index of each row's largest value, the first of equals; -1 where a row is not finite. [T] int64."""
    rows = x_TV.float().contiguous()
    count, width = rows.shape
    index_T = torch.empty(count, dtype=torch.int64)
    _library().functions.qc_argmax(
        rows.data_ptr(), width, index_T.data_ptr(), count, width, torch.get_num_threads()
    )
    return index_T


def argmax_reference(x_TV: Tensor) -> Tensor:
    """As `argmax`."""
    finite = torch.isfinite(x_TV).all(dim=-1)
    return torch.where(finite, x_TV.argmax(dim=-1), -1)
