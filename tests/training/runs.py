"""A run on a tiny model, and its recipe. No test lives here."""

from pathlib import Path
from typing import Any

from adapters.base import Base
from training.recipe import Recipe
from training.train import TrainingResult, train


def recipe_for(data: Path, out: Path, **changes: Any) -> Recipe:
    values = {"rank": 4, "epochs": 2.0, "learning_rate": 5e-3, "batch_size": 8, "products": "float32"}
    return Recipe(data=data, out=out, **(values | changes))


def run(base: Base, data: Path, folder: str = "out", /, **changes: Any) -> TrainingResult:
    return train(recipe_for(data, data.with_name(folder), **changes), base, progress=False)
