"""Owns the native form of a serving base on a CPU: which modules native code takes over. Knows no adapters.

Linear layers always; norms where the native result equals theirs; embeddings are kept in the type that
weights are stored in. Everything else of a model stays as it is.
"""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.bnb import Linear4bit
from adapters.nf4 import plain_absmax, refuse_repacked
from adapters.serving import ServingLinear, refuse_gradients
from kernels.linear import PackedLinear, packed_dense, packed_nf4
from kernels.lora import Segments
from kernels.precision import MatmulPrecision
from kernels.rowwise import rms_norm
from kernels.structs import Precision

log = logging.getLogger(__name__)

_NORM_TOLERANCE = 1e-5


class NativeLinear(ServingLinear):
    """Packed weights, NF4 or not, with float32 sums; a row's bits do not depend on its batch.

    Attributes:
        packed: weights and the adapters attached to them.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__(packed.in_features, packed.out_features, None)
        self.packed = packed

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, scales and bias."""
        return self.packed.weight_bytes

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """[…, D] → […, O] in the type of x, with the update of each row's adapter."""
        refuse_gradients(x)
        return self.packed(x.float(), segments).to(x.dtype)


class NativeRMSNorm(nn.Module):
    """weight · x / sqrt(mean(x²) + epsilon).

    Attributes:
        weight: [D] float32, whatever form the replaced module kept it in.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Each row of […, D], in the type of x."""
        refuse_gradients(x)
        return rms_norm(x.float(), self.weight, self.epsilon).to(x.dtype)


class StoredEmbedding(nn.Module):
    """A table of token embeddings that is kept in one type and looked up in another.

    Attributes:
        weight: [V, D] in the type it is kept in.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """[…] → […, D]."""
        return functional.embedding(token_ids, self.weight).to(self._dtype)


def use_native_layers(model: nn.Module, storage: torch.dtype, matmul_precision: MatmulPrecision) -> None:
    """Replaces a model's linear layers, norms and embeddings in place; one thread, before anything is served.

    Args:
        storage: type in which weights that are not quantised are kept.
        matmul_precision: of products with NF4 and bfloat16 weights.
    """
    precision = Precision[matmul_precision.upper()]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Embedding and module.weight.dtype != storage:
            stored = StoredEmbedding(module.weight.detach().to(storage), module.weight.dtype)
            model.set_submodule(name, stored)
        elif isinstance(module, Linear4bit):
            model.set_submodule(name, NativeLinear(_packed_nf4(module, precision)))
        elif isinstance(module, nn.Linear):
            packed = packed_dense(module.weight.to(storage), module.bias, precision)
            model.set_submodule(name, NativeLinear(packed))
        elif (norm := native_norm(module)) is not None:
            model.set_submodule(name, norm)


def native_norm(module: nn.Module) -> NativeRMSNorm | None:
    """The native form of a norm, None if the module is none or computes anything else.

    Architectures keep the weight itself or its distance to one; which, its own result tells.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or epsilon is None or weight is None or weight.ndim != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, len(weight)), generator=generator)
    with torch.inference_mode():
        expected = copy.deepcopy(module).float()(x)
        for form in (weight.float(), 1.0 + weight.float()):
            norm = NativeRMSNorm(form.detach().clone(), float(epsilon))
            if torch.allclose(norm(x), expected, rtol=_NORM_TOLERANCE, atol=_NORM_TOLERANCE):
                return norm
    log.info("%s stays as it is: it is not the usual norm", type(module).__name__)
    return None


def _packed_nf4(layer: Any, precision: Precision) -> PackedLinear:
    refuse_repacked(layer)
    state = layer.weight.quant_state
    outs, ins = state.shape
    codes, absmax, blocksize = layer.weight.data, plain_absmax(state), int(state.blocksize)
    return packed_nf4(codes, absmax, (outs, ins), blocksize, layer.bias, precision)
