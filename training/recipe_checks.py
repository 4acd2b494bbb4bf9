"""What a recipe's values may be: choices, ranges, and what its method knows. Knows no files and no torch."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from adapters.kinds import MAX_VIRTUAL_TOKENS
from training.errors import RecipeError
from training.methods import METHODS, OWN_SETTINGS, Method, Quantization

Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["auto", "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Products = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
LossOn = Literal["completions", "all"]
TooLong = Literal["cut", "drop", "fail"]
QuantizationChoice = Literal["auto", "nf4", "fp4", "int8", "none"]
PromoteIf = Literal["better", "always", "never"]
PromoteMetric = Literal["chrf", "bleu", "exact", "json_valid", "json_equal"]
Preset = Literal["all-linear", "attention", "qv", "mlp"]

PRESETS: Final = get_args(Preset)
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "quantization": get_args(QuantizationChoice),
        "schedule": get_args(Schedule),
        "optimizer": get_args(Optimizer),
        "products": get_args(Products),
        "device": get_args(Device),
        "loss_on": get_args(LossOn),
        "on_too_long": get_args(TooLong),
        "promote_if": get_args(PromoteIf),
        "promote_metric": get_args(PromoteMetric),
    }
)

# Kind of number, lowest and highest value that make sense, both allowed.
RANGES: Final[Mapping[str, tuple[type, float, float]]] = MappingProxyType(
    {
        "rank": (int, 1, 1024),
        "alpha": (float, 1e-3, 1e5),
        "dropout": (float, 0, 0.9),
        "lora_plus_ratio": (float, 1, 1000),
        "virtual_tokens": (int, 1, MAX_VIRTUAL_TOKENS),
        "epochs": (float, 1e-3, 1e4),
        "max_steps": (int, 1, 1e7),
        "learning_rate": (float, 1e-8, 1),
        "batch_size": (int, 1, 4096),
        "gradient_accumulation": (int, 1, 4096),
        "max_length": (int, 8, 1e6),
        "warmup_ratio": (float, 0, 0.9),
        "weight_decay": (float, 0, 1),
        "max_gradient_norm": (float, 1e-3, 1e6),
        "eval_fraction": (float, 0, 0.5),
        "evals_per_epoch": (int, 1, 1000),
        "early_stopping": (int, 1, 1000),
        "neftune_alpha": (float, 0, 1000),
        "checkpoint_every_s": (float, 0, 1e6),
        "canary_probes": (int, 0, 16),
        "promote_margin": (float, 0, 100),
        "seed": (int, 0, 2**32 - 1),
    }
)
LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_MAY_BE_OPEN: Final = ("alpha", "learning_rate", "max_steps", "early_stopping", "promote_if")
_SWITCHES: Final = ("gradient_checkpointing", "packing", "share_prefixes", "exceed_memory")


def check_values(values: Mapping[str, object]) -> None:
    """Refuses a value that is no choice, no number of its kind, or out of its range.

    Raises:
        RecipeError: names it, with what it must be.
    """
    for field, choices in _CHOICES.items():
        _check_choice(field, values[field], choices)
    for field, (kind, low, high) in RANGES.items():
        _check_number(field, values[field], kind, low, high)
    for field in _SWITCHES:
        _check_switch(field, values[field])
    _check_targets(values["target_modules"])
    _check_trackers(values["trackers"])
    _check_license(values["license"])


def check_known(method: Method, names: Iterable[str], *, source: str) -> None:
    """Refuses settings that a method would ignore.

    Args:
        names: of the settings that were given.
    """
    for name in names:
        if name in OWN_SETTINGS and name not in method.settings:
            others = ", ".join(other.name for other in METHODS.values() if name in other.settings)
            knows = f"it knows {', '.join(sorted(method.settings))}" if method.settings else "it needs none"
            raise RecipeError(
                f"{source} sets {name}, which method {method.name} does not know ({knows}); leave it out, or "
                f"use one of {others}"
            )


def check_base(method: Method, quantization: Quantization, double_quantization: bool | None) -> None:
    """Refuses a quantisation of the base that the method does not take."""
    if quantization not in method.quantizations:
        takes = " or ".join(method.quantizations)
        raise RecipeError(
            f"quantization is {quantization}, but method {method.name} takes {takes}: {method.why_only}"
        )
    if double_quantization is not None and quantization not in ("nf4", "fp4"):
        raise RecipeError(
            f"double_quantization is set, but quantization {quantization} has no scales of blocks; leave it "
            "out, or use nf4 or fp4"
        )


def check_together(method: Method, values: Mapping[str, Any]) -> None:
    """Refuses values that do not go together."""
    if values["eval_data"] is not None and values["eval_fraction"] > 0:
        raise RecipeError("eval_data and eval_fraction are both given; give the one or the other")
    if values["early_stopping"] is not None and values["eval_data"] is None and values["eval_fraction"] == 0:
        raise RecipeError("early_stopping needs held-out rows; set eval_fraction or eval_data")
    _check_promotion(values)
    if values["packing"] and values["neftune_alpha"] > 0:
        raise RecipeError(
            "neftune_alpha depends on the length of a row, which packing hides; give the one or the other"
        )
    if values["packing"] and method.family in ("prefix", "prompt"):
        raise RecipeError(
            f"packing is on, but with method {method.name} rows of one sequence would share what is learned "
            "before them: virtual tokens stand before the whole sequence, not before each row; turn packing "
            "off"
        )
    if values["gradient_checkpointing"] and method.family == "prefix":
        raise RecipeError(
            "gradient_checkpointing is on, but prefix tuning needs the keys and values that it drops; "
            "turn it off, or use method prompt"
        )


def _check_promotion(values: Mapping[str, Any]) -> None:
    wanted = values["promote_if"]
    if wanted is None:
        if values["alias"] is not None:
            raise RecipeError(f"alias is {values['alias']}, but nothing moves it; set promote_if")
        return
    if values["publish"] is None:
        raise RecipeError(f"promote_if is {wanted}, but nothing is published; set publish and name")
    if wanted != "always" and values["eval_data"] is None and values["eval_fraction"] == 0:
        raise RecipeError(
            f"promote_if is {wanted}, which needs held-out rows; set eval_fraction or eval_data"
        )


def _check_targets(value: object) -> None:
    names = value if isinstance(value, tuple) else ()
    named = bool(names) and all(isinstance(name, str) and name for name in names)
    if value is not None and value not in PRESETS and not named:
        raise RecipeError(
            f"target_modules is {value!r}, must be {', '.join(PRESETS)} or names of modules such as q_proj, "
            "v_proj"
        )


def _check_trackers(value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(name, str) and name for name in value):
        raise RecipeError(f"trackers is {value!r}, must be a list of names such as tensorboard, or empty")


def _check_license(value: object) -> None:
    if value is not None and not (isinstance(value, str) and LICENSE.fullmatch(value)):
        raise RecipeError(
            f"license is {value!r}, must be a name such as apache-2.0 or other, of small letters, digits, "
            "'.', '+' and '-'"
        )


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"{name} is {value!r}, must be true or false")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices and not (value is None and name in _MAY_BE_OPEN):
        raise RecipeError(f"{name} is {value!r}, must be one of {', '.join(choices)}")


def _check_number(name: str, value: object, kind: type, low: float, high: float) -> None:
    if value is None and name in _MAY_BE_OPEN:
        return
    wanted = f"a{' whole' if kind is int else ''} number from {low:g} to {high:g}"
    allowed = int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise RecipeError(f"{name} is {value!r}, must be {wanted}{_yaml_hint(value)}")
    if not low <= value <= high:  # NaN fails too
        raise RecipeError(f"{name} is {value}, must be {wanted}")


def _yaml_hint(value: object) -> str:
    """YAML 1.1 reads 2e-4 as text."""
    return "; in YAML write 2.0e-4 for 2e-4" if isinstance(value, str) and "e" in value else ""
