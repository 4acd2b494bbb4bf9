"""What PEFT is asked for, method by method. Knows no weights."""

from typing import Any

from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
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
