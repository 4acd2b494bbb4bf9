"""Owns what trains on a base: the weights of one method, put on it and taken off again. Knows no data.

The base may be one that others share. Gradients flow through its weights without changing them, and whatever
a method does to its modules, weights and flags meanwhile is undone. What is trained is held in float32: it is
small, or the base was loaded so, and its updates are smaller still.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapters.base import Base
from adapters.wrapping import wrapped
from training.errors import RecipeError
from training.initial import begin_with_lost, ordinary_lora, pissa_config, trained_factors
from training.peft_configs import peft_config
from training.products import products_in
from training.recipe import Recipe
from training.targets import adapted_modules, check_rank, target_modules
from training.untouched import Untouched


@dataclass(frozen=True, slots=True)
class Trainee:
    """A base made ready to train.

    Attributes:
        model: what goes forward and backward; whichever of its parameters want gradients are trained.
        settled: ends the training: the model in the form in which it is saved and served.
    """

    model: Any
    settled: Callable[[], Any]


def check_attachable(base: Base, recipe: Recipe) -> None:
    """Finds out before anything is spent whether the method can train on this base.

    Raises:
        RecipeError: what it would train is not there, is too narrow, or has the wrong type.
    """
    if "target_modules" in recipe.kind.settings:
        check_rank(recipe, base.layout)
        names = adapted_modules(target_modules(recipe, base.layout), base.layout)
        if recipe.method == "pissa" and base.layout.head in names and _is_tied(base.model):
            raise RecipeError(
                f"target_modules has {base.layout.head}, whose weight is the embedding's too: pissa would "
                "change both; leave it out, or use method lora"
            )
    if recipe.kind.family == "own_weights":
        _check_own_weights(base, recipe)


@contextmanager
def attached(base: Base, recipe: Recipe, products: torch.dtype) -> Iterator[Trainee]:
    """The base with what the method trains on it; afterwards the base is as it was.

    Args:
        products: type of the matrix products around 4-bit weights.

    Raises:
        RecipeError: the method cannot train on this base.
    """
    check_attachable(base, recipe)
    untouched = Untouched(base)
    base.model.requires_grad_(False)
    try:
        trainee = _trainee(base, recipe, untouched)
        with products_in(base, products), _contiguous_head(base.model), _checkpointed(base, recipe):
            yield trainee
    finally:
        untouched.restore()


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model can leave out the logits of columns that nobody learns."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _trainee(base: Base, recipe: Recipe, untouched: Untouched) -> Trainee:
    if recipe.kind.family == "own_weights":
        _free_own_weights(base, recipe)
        return Trainee(base.model, lambda: base.model)
    if recipe.method == "pissa":
        model = _with_peft(base, recipe, pissa_config(recipe, base.layout))
        initial = trained_factors(model)
        return Trainee(model, lambda: ordinary_lora(model, initial, base, recipe, untouched))
    model = _with_peft(base, recipe, peft_config(recipe, base.layout))
    if recipe.method == "loftq":
        begin_with_lost(model, base)
    return Trainee(model, lambda: model)


def _with_peft(base: Base, recipe: Recipe, config: Any) -> Any:
    try:
        return wrapped(base.model, config)
    except ValueError as error:  # what PEFT does not do with this architecture
        raise RecipeError(f"method {recipe.method} does not train on {base.name}: {error}") from None


def _own_weights(base: Base, recipe: Recipe) -> dict[str, nn.Parameter]:
    every = dict(base.model.named_parameters())
    if recipe.method == "full":
        return every
    return {name: parameter for name, parameter in every.items() if name.endswith(".bias")}


def _check_own_weights(base: Base, recipe: Recipe) -> None:
    if not _own_weights(base, recipe):
        raise RecipeError(
            f"method {recipe.method} trains biases, and {base.name} ({base.model.config.model_type}) has "
            "none; use ia3, which trains as few parameters, or lora"
        )
    if base.dtype != torch.float32:
        raise RecipeError(
            f"method {recipe.method} trains the base's own weights, whose updates {base.dtype} would lose; "
            "load the base with dtype='float32'"
        )


def _free_own_weights(base: Base, recipe: Recipe) -> None:
    """Trains copies in the base's place; the base's own tensors stay aside."""
    for parameter in _own_weights(base, recipe).values():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Hands the output head contiguous rows: a slice of columns is multiplied row by row, 15 times slower."""

    def contiguous(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].contiguous(), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(contiguous)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _checkpointed(base: Base, recipe: Recipe) -> Iterator[None]:
    if not recipe.gradient_checkpointing:
        yield
        return
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        base.model.gradient_checkpointing_disable()
