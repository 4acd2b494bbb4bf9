"""Reads recipes from YAML files. Knows no settings."""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML carries no types

from training.errors import RecipeError


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
