"""Owns every setting of a training run: its default, its range, its file form. Knows no torch.

Settings come, weakest first, from their defaults, a YAML file (`Recipe.from_file`) and whatever the caller
overrides, such as command-line flags.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import yaml  # type: ignore[import-untyped]  # PyYAML carries no types

from training.errors import RecipeError

Method = Literal["lora", "qlora", "rslora"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"]
Products = Literal["auto", "bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
LossOn = Literal["completions", "all"]
TooLong = Literal["cut", "drop", "fail"]

ALL_LINEAR: Final = "all-linear"
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "method": get_args(Method),
    "schedule": get_args(Schedule),
    "optimizer": get_args(Optimizer),
    "products": get_args(Products),
    "device": get_args(Device),
    "loss_on": get_args(LossOn),
    "on_too_long": get_args(TooLong),
}
# Kind of number, lowest and highest value that make sense, both allowed.
_RANGES: Final[Mapping[str, tuple[type, float, float]]] = {
    "rank": (int, 1, 1024),
    "alpha": (float, 1e-3, 1e5),
    "dropout": (float, 0, 0.9),
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
    "seed": (int, 0, 2**32 - 1),
}
_MAY_BE_OPEN: Final = ("alpha", "max_steps", "early_stopping")
_PATHS: Final = ("data", "out")
_LISTS: Final = ("target_modules", "trackers")
_OPEN_PATHS: Final = ("eval_data",)
_SWITCHES: Final = ("gradient_checkpointing", "packing", "share_prefixes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        data: JSON lines, CSV or Parquet; training/rows.py says which rows.
        out: the adapter's folder; must not exist. Metrics and the loss curve appear beside it: OUT.training.
        base: a model folder, a GGUF file, a hub id, or smollm2.
        method: "qlora" trains on the NF4 base that `quickchange serve` keeps resident; "rslora" does too, but
            scales by α/√r instead of α/r; "lora" trains on the unquantised base, for servers started with
            --quantization none.
        rank: r; 8 to 32 are usual.
        alpha: α; None is 2 r.
        dropout: of the adapter's input.
        target_modules: "all-linear", or names of modules such as ("q_proj", "v_proj").
        epochs: passes over the data; may be a fraction.
        max_steps: stops after so many optimizer steps; None for all epochs.
        learning_rate: at the end of the warm-up.
        schedule: of the learning rate after the warm-up.
        warmup_ratio: part of all steps over which the learning rate rises from nought.
        batch_size: rows in one forward pass.
        gradient_accumulation: forward passes of one optimizer step; the rows of a step are the product.
        gradient_checkpointing: computes activations twice in order to keep fewer; slower, smaller.
        max_length: tokens of a sequence.
        on_too_long: rows that are longer are cut, dropped or an error.
        share_prefixes: computes what all rows of a batch begin with once, where the model allows it and it is
            less work; loss and gradients are the same.
        packing: puts several rows into one sequence of at most max_length tokens; none sees another.
        loss_on: "completions" learns answers alone, "all" questions too.
        weight_decay: of the adapter's weights.
        max_gradient_norm: longer gradients are shortened to this.
        optimizer: "auto" is paged_adamw_8bit on CUDA and adamw on a CPU.
        products: type of the frozen layers' matrix products; "auto" takes the faster one on a CPU.
        eval_fraction: part of the rows that is held out, and whose loss is measured in between.
        eval_data: a file of rows for that, in place of a part of `data`.
        evals_per_epoch: how often it is.
        early_stopping: ends the run after so many evaluations without a lower held-out loss, and keeps the
            weights that had the lowest; None runs to the end and keeps the last.
        neftune_alpha: strength of the noise on embedded tokens (NEFTune, Jain et al. 2023); 0 for none.
        checkpoint_every_s: seconds between two checkpoints, from which a stopped run goes on; 0 for none.
        trackers: where losses go besides the report: "tensorboard", or others that transformers knows and
            that are installed, such as "wandb" or "mlflow".
        canary_probes: prompts of the data that travel with the adapter, with what it answers to them, so that
            a server can check that it answers the same; 0 for none.
        seed: of the adapter's first weights, the split and the order of rows.
        device: "auto" is CUDA if there is one.
        publish: HOST:PORT of the server to upload the adapter to; None to leave it in `out`.
        name: what it is called there; needed with `publish`.

    Raises:
        RecipeError: a value is out of its range.
    """

    data: Path
    out: Path
    base: str = "smollm2"
    method: Method = "qlora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.05
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    max_length: int = 1024
    on_too_long: TooLong = "cut"
    share_prefixes: bool = True
    packing: bool = False
    loss_on: LossOn = "completions"
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    optimizer: Optimizer = "auto"
    products: Products = "auto"
    eval_fraction: float = 0.0
    eval_data: Path | None = None
    evals_per_epoch: int = 1
    early_stopping: int | None = None
    neftune_alpha: float = 0.0
    checkpoint_every_s: float = 300.0
    trackers: tuple[str, ...] = ("tensorboard",)
    canary_probes: int = 3
    seed: int = 0
    device: Device = "auto"
    publish: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            _check_choice(field, getattr(self, field), choices)
        for field, (kind, low, high) in _RANGES.items():
            _check_number(field, getattr(self, field), kind, low, high)
        for field in _SWITCHES:
            _check_switch(field, getattr(self, field))
        _check_targets(self.target_modules)
        _check_trackers(self.trackers)
        if self.eval_data is not None and self.eval_fraction > 0:
            raise RecipeError("eval_data and eval_fraction are both given; give the one or the other")
        if self.early_stopping is not None and self.eval_data is None and self.eval_fraction == 0:
            raise RecipeError("early_stopping needs held-out rows; set eval_fraction or eval_data")
        if self.packing and self.neftune_alpha > 0:
            raise RecipeError(
                "neftune_alpha depends on the length of a row, which packing hides; give the one or the other"
            )
        if self.publish is not None and not self.name:
            raise RecipeError(f"publish is {self.publish}, but no name is given; say what to call it there")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str) -> "Recipe":
        """A recipe from plain values, such as a parsed file or flags.

        Args:
            source: where the values came from, for error messages.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise RecipeError(f"{source} sets {name!r}, which does not exist{_nearest(name, fields)}")
        for name in _PATHS:
            if values.get(name) is None:
                raise RecipeError(f"{source} does not set {name}; it is needed")
        return cls(**{name: _converted(name, value) for name, value in values.items()})

    @classmethod
    def from_file(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> "Recipe":
        """A recipe from a YAML file; `overrides` win, and their None values count as not given."""
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        return cls.from_mapping(read_recipe_file(path) | given, source=str(path))

    @property
    def effective_alpha(self) -> float:
        """α, chosen by the rank where it was left open."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def quantization(self) -> Literal["nf4", "none"]:
        """How the base is loaded."""
        return "none" if self.method == "lora" else "nf4"

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as a recipe file would hold them."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, unchecked.

    Raises:
        RecipeError: it cannot be read, or is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"{path} is not YAML ({why})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise RecipeError(f"{path} must hold lines such as `rank: 16`")
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _converted(name: str, value: Any) -> Any:
    if name in _PATHS or (name in _OPEN_PATHS and value is not None):
        return Path(value).expanduser()
    if name in _LISTS and isinstance(value, list):  # YAML and flags know no tuples
        return tuple(value)
    return value


def _check_targets(value: object) -> None:
    names = value if isinstance(value, tuple) else ()
    if value != ALL_LINEAR and not (names and all(isinstance(name, str) and name for name in names)):
        raise RecipeError(
            f"target_modules is {value!r}, must be {ALL_LINEAR} or names of modules such as q_proj, v_proj"
        )


def _check_trackers(value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(name, str) and name for name in value):
        raise RecipeError(f"trackers is {value!r}, must be a list of names such as tensorboard, or empty")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{name} is {value!r}, must be one of {', '.join(choices)}")


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"{name} is {value!r}, must be true or false")


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


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
