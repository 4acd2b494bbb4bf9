"""Owns giving a base back as it was: its modules, its tensors, its flags. Knows no methods."""

from typing import Any

from torch import nn

from adapters.base import Base


class Untouched:
    """What a base was before a method took it; nothing is copied, only held.

    A method may wrap modules and put other tensors in the place of weights. It must not write into a tensor
    that it did not make.
    """

    def __init__(self, base: Base) -> None:
        self._model = base.model
        self._attributes = dict(vars(base.model))
        self._modules = dict(base.model.named_modules())
        self._tensors = [(parameter, parameter.data) for parameter in base.model.parameters()]

    def restore(self) -> None:
        """Every module is in its place again, with its own weights, frozen and in evaluation mode."""
        for name, module in self._modules.items():
            if name and _found(self._model, name) is not module:
                self._model.set_submodule(name, module)
        for parameter, data in self._tensors:
            parameter.data = data
            parameter.grad = None
        vars(self._model).clear()  # PEFT and accelerate leave theirs
        vars(self._model).update(self._attributes)
        self._model.requires_grad_(False)
        self._model.eval()


def _found(model: Any, name: str) -> nn.Module | None:
    """The module of that name; None while something without it stands in its parent's place."""
    try:
        module: nn.Module = model.get_submodule(name)
    except AttributeError:
        return None
    return module
