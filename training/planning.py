"""Owns the way from a recipe's settings to plans: the base's shape, the rows, the device. Loads no weights.

Settings are those of a recipe, as plain values; what is left out has the recipe's default.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from adapters.cache import default_cache_dir
from adapters.sources import local_source
from training.errors import RecipeError
from training.pace import CARDS, Device
from training.plan import PlannedRun, plan_run
from training.published import SHAPES
from training.recipe import Recipe
from training.row_lengths import Rows
from training.shape import ModelShape, read_shape
from training.workload import TECHNIQUES, Workload

ALL: Final = "all"
_FOUR_BITS: Final = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class Plans:
    """Every way of training that was asked about, on one device."""

    base: ModelShape
    device: Device
    rows: Rows
    runs: tuple[PlannedRun, ...]


def plan(settings: Mapping[str, Any], *, device: str = "auto") -> Plans:
    """Plans for a recipe's settings; `method` may be "all".

    Args:
        device: "auto", "cpu", or a card of training/pace.py.

    Raises:
        RecipeError: a setting is unknown or impossible.
        BaseModelError: the base is not on this machine, or states no decoder's shape.
        DataError: the rows cannot be used.
    """
    values = {**_DEFAULTS, **settings}
    base = str(values["base"])
    folder = None if base in SHAPES else local_source(base, default_cache_dir())
    shape = SHAPES[base] if folder is None else read_shape(folder.folder, folder.name)
    rows = _rows(values, shape, None if folder is None else folder.folder)
    place = _device(device, shape, values["products"])
    total = _total_tokens(values, rows)
    runs = tuple(
        plan_run(shape, workload(values, rows, place, method), place, total)
        for method in _methods(values["method"])
    )
    return Plans(shape, place, rows, runs)


_DEFAULTS: Final[Mapping[str, Any]] = {
    field.name: field.default
    for field in dataclasses.fields(Recipe)
    if field.default is not dataclasses.MISSING
} | {"quantization": "auto", "virtual_tokens": 32}


def workload(values: Mapping[str, Any], rows: Rows, device: Device, method: str) -> Workload:
    """One step of a run with these settings."""
    targets = values["target_modules"]
    optimizer = values["optimizer"]
    if optimizer == "auto":
        optimizer = "adamw" if device.place == "cpu" else "paged_adamw_8bit"
    storage = TECHNIQUES[method].storage
    if values["quantization"] != "auto":
        storage = values["quantization"]
    return Workload(
        method=method,
        place=device.place,
        storage=storage,
        rank=values["rank"],
        targets=tuple(targets) if isinstance(targets, list) else targets,
        virtual_tokens=values["virtual_tokens"],
        dropout=values["dropout"] > 0,
        optimizer=optimizer,
        batch_rows=values["batch_size"],
        row_tokens=rows.longest,
        kept_tokens=rows.kept,
        shares_prefixes=rows.shares_prefixes,
        accumulates=values["gradient_accumulation"] > 1,
        checkpointing=values["gradient_checkpointing"],
        activation_bytes=4 if device.place == "cpu" else 2,
        product_bytes=4 if device.place == "cpu" and values["products"] == "float32" else 2,
    )


def _methods(named: str) -> Sequence[str]:
    if named == ALL:
        return list(TECHNIQUES)
    if named not in TECHNIQUES:
        raise RecipeError(f"method is {named!r}, must be one of {', '.join(TECHNIQUES)}, or {ALL}")
    return [named]


def _device(name: str, shape: ModelShape, products: str) -> Device:
    if name in CARDS:
        return CARDS[name]
    if name not in ("auto", "cpu"):
        raise RecipeError(f"device is {name!r}, must be auto, cpu, or one of {', '.join(CARDS)}")
    from training.calibration import measured_cpu

    free = int(psutil.virtual_memory().available)
    return measured_cpu(shape, 4 if products == "float32" else 2, free)


def _rows(values: Mapping[str, Any], shape: ModelShape, folder: Path | None) -> Rows:
    longest = min(values["max_length"], shape.max_positions or values["max_length"])
    if values.get("data") is None:
        return Rows(longest, longest, shares_prefixes=False, tokens=None, count=None)
    if folder is None:
        raise RecipeError(
            f"data is given, but {values['base']} is a shape without a tokenizer; give a folder"
        )
    from training.measured_rows import measured_rows

    known = {field.name for field in dataclasses.fields(Recipe)} - {"method"}
    given = {name: value for name, value in values.items() if name in known}
    recipe = Recipe.from_mapping(given | {"out": given.get("out", "planned")}, source="the plan")
    return measured_rows(recipe, shape, folder)


def _total_tokens(values: Mapping[str, Any], rows: Rows) -> float | None:
    step_rows = values["batch_size"] * values["gradient_accumulation"]
    if values["max_steps"] is not None:
        mean = rows.longest if rows.tokens is None or rows.count is None else rows.tokens / rows.count
        return float(values["max_steps"] * step_rows * mean)
    return None if rows.tokens is None else float(values["epochs"] * rows.tokens)
