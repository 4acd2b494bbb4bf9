"""Owns every setting of a training run and its default. Knows no torch.

Settings come, weakest first, from their defaults, a YAML file (`Recipe.from_file`) and whatever the caller
overrides, such as command-line flags. What values may be stands in training/recipe_checks.py, what a method
is in training/methods.py.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from training.errors import RecipeError
from training.methods import OWN_SETTINGS, Method, MethodName, Quantization, method_named
from training.recipe_checks import (
    Device,
    LossOn,
    Optimizer,
    Preset,
    Products,
    PromoteIf,
    PromoteMetric,
    QuantizationChoice,
    Schedule,
    TooLong,
    check_base,
    check_known,
    check_together,
    check_values,
)
from training.recipe_file import read_recipe_file

ALL_LINEAR: Final = "all-linear"
_PATHS: Final = ("data", "out")
_LISTS: Final = ("target_modules", "trackers")
_OPEN_PATHS: Final = ("eval_data",)
WITHOUT_EFFECT: Final = (
    *("out", "checkpoint_every_s", "trackers", "canary_probes", "license"),
    *("exceed_memory", "publish", "name", "promote_if", "alias", "promote_metric", "promote_margin"),
)
"""Settings that no weight depends on: a run may change them when it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        data: JSON lines, CSV or Parquet; training/rows.py says which rows.
        out: the result's folder; must not exist. Metrics and the loss curve appear beside it: OUT.training.
        base: a model folder, a GGUF file, a hub id, or smollm2.
        method: one of training/methods.py. "qlora" trains on the NF4 base that `quickchange serve` keeps
            resident; "lora" on the unquantised base, for servers started with --quantization none.
        quantization: of the base; "auto" is the method's own. What comes of it fits a base quantised the same
            way and no other.
        double_quantization: whether a 4-bit base's scales are quantised again; None is yes, as servers do.
        rank: r; 8 to 32 are usual.
        alpha: α; None is 2 r.
        dropout: of the adapter's input.
        target_modules: "all-linear", "attention", "qv", "mlp", or names of modules such as
            ("q_proj", "v_proj"); None is all-linear, for ia3 keys, values and the MLP's last layer.
        lora_plus_ratio: of B's learning rate to A's.
        virtual_tokens: learned positions before the prompt.
        epochs: passes over the data; may be a fraction.
        max_steps: stops after so many optimizer steps; None for all epochs.
        learning_rate: at the end of the warm-up; None is the method's own.
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
        exceed_memory: goes on although more memory is predicted than is free.
        loss_on: "completions" learns answers alone, "all" questions too.
        weight_decay: of the weights that are trained.
        max_gradient_norm: longer gradients are shortened to this.
        optimizer: "auto" is paged_adamw_8bit on CUDA and adamw on a CPU.
        products: type of matrix products with the base's weights; "auto" takes the faster one on a CPU.
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
        seed: of the first weights, the split and the order of rows.
        device: "auto" is CUDA if there is one.
        publish: HOST:PORT of the server to upload the adapter to; None to leave it in `out`.
        name: what it is called there; needed with `publish`.
        promote_if: what becomes of the alias after a publication. "better" moves it to the new version if,
            on the rows that are held out, that is better than what the alias has; "never" compares and moves
            nothing; "always" moves it without a comparison; None leaves it alone.
        alias: which one; None is "prod".
        promote_metric: what decides.
        promote_margin: by how much, in its unit: points of 100 for chrf and bleu, parts of 1 for the others.
        license: of the result, for its model card, as hubs spell it, such as "apache-2.0"; None if unknown.

    Raises:
        RecipeError: a value is out of its range, or a setting is none of the method's.
    """

    data: Path
    out: Path
    base: str = "smollm2"
    method: MethodName = "qlora"
    quantization: QuantizationChoice = "auto"
    double_quantization: bool | None = None
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Preset | tuple[str, ...] | None = None
    lora_plus_ratio: float = 16.0
    virtual_tokens: int = 20
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float | None = None
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.05
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    max_length: int = 1024
    on_too_long: TooLong = "cut"
    share_prefixes: bool = True
    packing: bool = False
    exceed_memory: bool = False
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
    promote_if: PromoteIf | None = None
    alias: str | None = None
    promote_metric: PromoteMetric = "chrf"
    promote_margin: float = 0.0
    license: str | None = None

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kind = method_named(self.method)
        check_values(values)
        changed = (f.name for f in dataclasses.fields(self) if values[f.name] != f.default)
        check_known(kind, changed, source="the recipe")
        check_base(kind, self.base_quantization, self.double_quantization)
        check_together(kind, values)
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
        given = {name: _converted(name, value) for name, value in values.items()}
        kind = method_named(given.get("method", fields["method"].default))
        check_known(kind, (name for name, value in given.items() if value is not None), source=source)
        return cls(**given)

    @classmethod
    def from_file(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> "Recipe":
        """A recipe from a YAML file; `overrides` win, and their None values count as not given."""
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        return cls.from_mapping(read_recipe_file(path) | given, source=str(path))

    @property
    def promoted_alias(self) -> str:
        """The alias that may move."""
        return self.alias or "prod"

    @property
    def kind(self) -> Method:
        """The method's row in the table."""
        return method_named(self.method)

    @property
    def effective_alpha(self) -> float:
        """α, chosen by the rank where it was left open."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def effective_learning_rate(self) -> float:
        """The learning rate, the method's own where it was left open."""
        return self.kind.learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def saved_rank(self) -> int | None:
        """The rank of the adapter that comes of it; None if it has none."""
        return self.rank * self.kind.rank_factor if "rank" in self.kind.settings else None

    @property
    def base_quantization(self) -> Quantization:
        """How the base is loaded."""
        return self.kind.quantizations[0] if self.quantization == "auto" else self.quantization

    @property
    def quantizes_scales(self) -> bool:
        """Whether the base's scales are quantised too, where it has any."""
        return self.double_quantization is not False

    @property
    def merge_command(self) -> str:
        """What makes a plain model of the result, but for paths."""
        plain = "" if self.quantizes_scales else " --no-double-quantization"
        return f"quickchange merge --quantization {self.base_quantization}{plain}"

    @property
    def afterwards(self) -> str:
        """What to do with the result if no server applies it."""
        return self.kind.afterwards.format(merge=self.merge_command, out=self.out)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as a recipe file would hold them; without settings that the method does not know."""
        return {
            name: _plain(value)
            for name, value in dataclasses.asdict(self).items()
            if name not in OWN_SETTINGS or name in self.kind.settings
        }


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


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
