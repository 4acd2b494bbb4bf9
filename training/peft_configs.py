"""What PEFT is asked for, method by method, and asking it. Knows no weights."""

import warnings
from typing import Any

from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
)

from adapters.layout import BaseLayout
from training.recipe import Recipe
from training.targets import feedforward_names, target_modules

_TASK = "CAUSAL_LM"


def peft_config(recipe: Recipe, layout: BaseLayout) -> Any:
    """The configuration of a method that PEFT trains.

    Raises:
        RecipeError: its targets are not there.
    """
    match recipe.kind.family:
        case "low_rank":
            return lora_config(recipe, layout)
        case "scales":
            return _ia3_config(recipe, layout)
        case "prefix":
            return PrefixTuningConfig(num_virtual_tokens=recipe.virtual_tokens, task_type=_TASK)
        case _:
            return _prompt_config(recipe)


def wrapped(model: Any, config: Any) -> Any:
    """The model with PEFT's own modules in the places that the configuration means.

    Raises:
        ValueError: PEFT does not do that with this architecture.
    """
    with warnings.catch_warnings():  # PEFT asks by a name that transformers has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, config)


def lora_config(recipe: Recipe, layout: BaseLayout) -> LoraConfig:
    """Nothing but updates of linear modules, of low rank; of their directions for DoRA."""
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.effective_alpha,
        lora_dropout=recipe.dropout,
        target_modules=target_modules(recipe, layout),
        use_rslora=recipe.method == "rslora",
        use_dora=recipe.method in ("dora", "qdora"),
        bias="none",
        task_type=_TASK,
    )


def _ia3_config(recipe: Recipe, layout: BaseLayout) -> IA3Config:
    names = target_modules(recipe, layout)
    return IA3Config(
        target_modules=names, feedforward_modules=feedforward_names(names, layout), task_type=_TASK
    )


def _prompt_config(recipe: Recipe) -> PromptTuningConfig:
    return PromptTuningConfig(
        num_virtual_tokens=recipe.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,  # vectors that the base has seen
        task_type=_TASK,
    )
