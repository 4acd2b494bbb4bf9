"""Owns the way from a recipe's settings to plans: the base's shape, the rows, the device. Loads no weights.

Settings are those of a recipe, as plain values; what is left out has the recipe's default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adapters import host_memory
from adapters.cache import default_cache_dir
from adapters.sources import local_source
from training.errors import RecipeError
from training.methods import METHODS, OWN_SETTINGS, Method
from training.pace import CARDS, Device
from training.plan import PlannedRun, plan_run
from training.planned_step import planned_step
from training.published import SHAPES
from training.recipe import Recipe
from training.row_lengths import Rows
from training.shape import ModelShape, read_shape

ALL: Final = "all"
_UNNAMED: Final = Path("planned")


@dataclass(frozen=True, slots=True)
class Plans:
    """Every way of training that was asked about, on one device.

    Attributes:
        rows: of the first of them.
        left_out: methods that cannot be planned for with these settings, with the reason.
    """

    base: ModelShape
    device: Device
    rows: Rows
    runs: tuple[PlannedRun, ...]
    left_out: Mapping[str, str]


def plan(settings: Mapping[str, Any], *, device: str = "auto") -> Plans:
    """Plans for a recipe's settings; `method` may be "all", which leaves out what cannot be.

    Args:
        device: "auto", "cpu", or a card of training/pace.py.

    Raises:
        RecipeError: a setting is unknown or impossible.
        BaseModelError: the base is not on this machine, or states no decoder's shape.
        DataError: the rows cannot be used.
    """
    recipes, left_out = _recipes(settings)
    recipe = recipes[0]
    folder = None if recipe.base in SHAPES else local_source(recipe.base, default_cache_dir())
    shape = SHAPES[recipe.base] if folder is None else read_shape(folder.folder, folder.name)
    has_data = settings.get("data") is not None
    path = None if folder is None else folder.folder
    rows = _rows(recipe, shape, path, has_data=has_data)
    place = _device(device, shape, recipe.products)
    total = _total_tokens(recipe, rows)
    runs = []
    for one in recipes:
        try:
            own = rows if _meet_alike(one, recipe) else _rows(one, shape, path, has_data=has_data)
            work = planned_step(one, shape, own, place.place, heap_keeps=_heap_keeps(place))
        except RecipeError as error:
            if len(recipes) == 1:
                raise
            left_out[one.method] = str(error)
        else:
            runs.append(plan_run(shape, work, place, total))
    return Plans(shape, place, rows, tuple(runs), left_out)


def _recipes(settings: Mapping[str, Any]) -> tuple[list[Recipe], dict[str, str]]:
    """One for each method, with the settings that it knows."""
    given = {"data": _UNNAMED, "out": _UNNAMED} | {k: v for k, v in settings.items() if v is not None}
    if given.get("method") != ALL:
        return [Recipe.from_mapping(given, source="the plan")], {}
    recipes: list[Recipe] = []
    left_out: dict[str, str] = {}
    for kind in METHODS.values():
        try:
            recipes.append(Recipe.from_mapping(_known_to(kind, given), source="the plan"))
        except RecipeError as error:
            left_out[kind.name] = str(error)
    if not recipes:
        raise RecipeError(next(iter(left_out.values())))
    return recipes, left_out


def _meet_alike(one: Recipe, other: Recipe) -> bool:
    """Whether both methods compute the same batches: virtual tokens stand before each row."""
    return ("virtual_tokens" in one.kind.settings) == ("virtual_tokens" in other.kind.settings)


def _known_to(kind: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    foreign = OWN_SETTINGS - kind.settings
    return {name: value for name, value in given.items() if name not in foreign} | {"method": kind.name}


def _device(name: str, shape: ModelShape, products: str) -> Device:
    if name in CARDS:
        return CARDS[name]
    if name not in ("auto", "cpu"):
        raise RecipeError(f"device is {name!r}, must be auto, cpu, or one of {', '.join(CARDS)}")
    from training.calibration import measured_cpu

    free = host_memory.now().available_bytes
    return measured_cpu(shape, 2 if products == "bfloat16" else 4, free)


def _heap_keeps(device: Device) -> bool:
    if device.place == "cuda":
        return False
    from training.footprint import heap_keeps_blocks

    return heap_keeps_blocks()


def _rows(recipe: Recipe, shape: ModelShape, folder: Path | None, *, has_data: bool) -> Rows:
    if not has_data:
        longest = min(recipe.max_length, shape.max_positions or recipe.max_length)
        return Rows(longest, longest, shares_prefixes=False, tokens=None, count=None)
    if folder is None:
        raise RecipeError(f"data is given, but {recipe.base} is a shape without a tokenizer; give a folder")
    from training.measured_rows import measured_rows

    return measured_rows(recipe, shape, folder)


def _total_tokens(recipe: Recipe, rows: Rows) -> float | None:
    if recipe.max_steps is not None:
        mean = rows.longest if rows.tokens is None or rows.count is None else rows.tokens / rows.count
        return float(recipe.max_steps * recipe.batch_size * recipe.gradient_accumulation * mean)
    return None if rows.tokens is None else float(recipe.epochs * rows.tokens)
