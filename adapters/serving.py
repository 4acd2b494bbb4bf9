"""The base class of linear layers that only serve: immutable, closed to whatever would read weights.

Their weights are packed for inference, so state_dict, pickle, PEFT and gradients would be wrong or
impossible.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class ServingLinear(nn.Module):
    """y = W x + bias. Immutable after construction, safe to call from many threads at once.

    Attributes:
        in_features, out_features: D and O.
        bias: [O] or None.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        # Tensors are plain attributes, not parameters or buffers: no optimizer and no cast reaches them.
        self.bias = None if bias is None else bias.detach().clone()

    @property
    def weight_bytes(self) -> int:
        """Bytes of every tensor this layer keeps."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def extra_repr(self) -> str:
        return f"{self.in_features}→{self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        refuse("has no state_dict")

    def _load_from_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        refuse("loads no state_dict")

    def _apply(self, *_: Any, **__: Any) -> NoReturn:
        refuse("cannot be moved or cast; choose device and dtype at load_base()")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse("cannot be pickled or copied")


def refuse(what: str) -> NoReturn:
    """Raises RuntimeError with what a serving layer cannot do and what to use instead."""
    raise RuntimeError(
        f"the serving base {what}: its weights are packed for inference. "
        "Use load_base(purpose='train') to train, dequantized_model() to export or merge"
    )


def refuse_gradients(x: Tensor) -> None:
    """Raises RuntimeError if a gradient is wanted through what only serves."""
    if x.requires_grad and torch.is_grad_enabled():
        refuse("has no gradients")
