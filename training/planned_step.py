"""Owns the way from a recipe to the step that is planned for. Knows no torch and no files."""

from typing import Final

from training.errors import RecipeError
from training.methods import Method
from training.recipe import Recipe
from training.row_lengths import Rows
from training.shape import ModelShape
from training.targets import adapted_modules, target_modules
from training.workload import Place, PlannedOptimizer, Storage, Trains, Workload

_CPU_PRODUCT_BYTES: Final = 4


def planned_step(
    recipe: Recipe,
    shape: ModelShape,
    rows: Rows,
    place: Place,
    *,
    product_bytes: int | None = None,
    heap_keeps: bool = False,
) -> Workload:
    """One step of a run by this recipe.

    Args:
        product_bytes: of the frozen layers' products, where they are known; None assumes what is usual.

    Raises:
        RecipeError: target_modules names what the base has not, or the method has nothing to train there.
    """
    trains = _trains(recipe.kind)
    if trains == "bitfit" and not shape.bias_values:
        raise RecipeError(f"method bitfit trains biases, and {shape.name} ({shape.model_type}) has none")
    return Workload(
        method=recipe.method,
        trains=trains,
        place=place,
        storage=_storage(recipe),
        rank=recipe.rank,
        targets=_targets(recipe, shape),
        virtual_tokens=recipe.virtual_tokens,
        dropout=recipe.dropout > 0,
        optimizer=_optimizer(recipe, place),
        batch_rows=recipe.batch_size,
        row_tokens=rows.longest,
        kept_tokens=rows.kept,
        shares_prefixes=rows.shares_prefixes,
        accumulates=recipe.gradient_accumulation > 1,
        checkpointing=recipe.gradient_checkpointing,
        activation_bytes=4 if place == "cpu" else 2,
        product_bytes=product_bytes or _product_bytes(recipe, place),
        heap_keeps=heap_keeps,
    )


def _trains(kind: Method) -> Trains:
    match kind.family:
        case "low_rank":
            return "dora" if kind.name in ("dora", "qdora") else "lora"
        case "scales":
            return "ia3"
        case "prefix" | "prompt":
            return kind.family
        case "own_weights":
            return "all" if kind.name == "full" else "bitfit"


def _storage(recipe: Recipe) -> Storage:
    match recipe.base_quantization:
        case "nf4":
            return "nf4" if recipe.quantizes_scales else "nf4-single"
        case "fp4":
            return "fp4" if recipe.quantizes_scales else "fp4-single"
        case other:
            return other


def _targets(recipe: Recipe, shape: ModelShape) -> tuple[str, ...]:
    every = tuple(module.name for module in shape.modules)
    if "target_modules" not in recipe.kind.settings:
        return every
    layout = shape.block_layout
    chosen = adapted_modules(target_modules(recipe, layout), layout)
    return tuple(name for name in every if any(module.endswith(f".{name}") for module in chosen))


def _optimizer(recipe: Recipe, place: Place) -> PlannedOptimizer:
    if recipe.optimizer != "auto":
        return recipe.optimizer
    return "adamw" if place == "cpu" else "paged_adamw_8bit"


def _product_bytes(recipe: Recipe, place: Place) -> int:
    """On a CPU unquantised weights are float32, 4-bit ones multiplied in what is faster: the larger."""
    if place == "cuda":
        return 4 if recipe.products == "float32" else 2
    return 2 if recipe.products == "bfloat16" else _CPU_PRODUCT_BYTES
