"""Owns which optimizer trains: its name in transformers, its fallback, LoRA+'s groups. Knows no data."""

import warnings
from typing import Any, Final

import torch
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from training.recipe import Recipe

# training/notices.py says it in one line.
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)

_NAMES: Final = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""Name in a recipe → name in transformers."""


def optimizer_name(recipe: Recipe, device: torch.device) -> str:
    """The optimizer in transformers' words.

    A CPU has nothing to page, and 8-bit states cost more time there than the memory they save is worth;
    docs/guides/training.md has the figures.
    """
    if recipe.optimizer != "auto":
        return _NAMES[recipe.optimizer]
    return _NAMES["paged_adamw_8bit" if device.type == "cuda" else "adamw"]


def own_optimizer(model: Any, arguments: TrainingArguments, recipe: Recipe) -> Optimizer | None:
    """The method's own optimizer; None if the Trainer's serves.

    LoRA+ is the recipe's optimizer at the recipe's rate for A and lora_plus_ratio times it for B.
    """
    if recipe.method != "lora_plus":
        return None
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: Optimizer = create_loraplus_optimizer(
        model,
        kind,
        lr=options.pop("lr"),
        loraplus_lr_ratio=recipe.lora_plus_ratio,
        loraplus_weight_decay=recipe.weight_decay,
        **options,
    )
    return optimizer
