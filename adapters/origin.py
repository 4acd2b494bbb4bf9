"""How an adapter came about, as its manifest tells it: recipe, metrics, versions. No server acts on it.

It is there for people, and small: bounds are such that no field can crowd out what servers do act on.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from adapters.canary import Refuse

MAX_RECIPE_BYTES: Final = 32 * 1024
MAX_METRICS: Final = 64
MAX_VERSIONS: Final = 32

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_VERSION_CHARS: Final = 128
_FIELDS: Final = frozenset({"eval_data_sha256", "recipe", "metrics", "versions"})


@dataclass(frozen=True, slots=True)
class Origin:
    """A training run, without anything of the machine that it ran on.

    Attributes:
        eval_data_sha256: 64 hexadecimal digits over a file of held-out rows; None if there was none.
        recipe: the settings that the result depends on; of files their names alone.
        metrics: numbers by name, such as "final_loss" in nats.
        versions: of the libraries, by package.
    """

    eval_data_sha256: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def canonical(self) -> dict[str, object]:
        """JSON-able; what is not known is left out."""
        return {name: value for name, value in asdict(self).items() if value}


def fits_recipe(recipe: Mapping[str, Any]) -> bool:
    """Whether so large a recipe may travel."""
    return len(json.dumps(recipe, ensure_ascii=False).encode()) <= MAX_RECIPE_BYTES


def parse_origin(value: object, refuse: Refuse) -> Origin:
    """The origin in a member of a manifest.

    Args:
        refuse: raises, given the field, its value and what is wrong.
    """
    members = _object(value, "training", refuse)
    for name in sorted(members.keys() - _FIELDS):
        refuse(f"training.{name}", members[name], f"unknown; the fields are {', '.join(sorted(_FIELDS))}")
    sha256 = members.get("eval_data_sha256")
    if sha256 is not None and (not isinstance(sha256, str) or not _SHA256.fullmatch(sha256)):
        refuse("training.eval_data_sha256", sha256, "it must be 64 hexadecimal digits")
    return Origin(
        sha256,
        _recipe(members.get("recipe", {}), refuse),
        _metrics(members.get("metrics", {}), refuse),
        _versions(members.get("versions", {}), refuse),
    )


def _recipe(value: object, refuse: Refuse) -> dict[str, Any]:
    recipe = _named(value, "training.recipe", refuse)
    if not fits_recipe(recipe):
        refuse("training.recipe", value, f"at most {MAX_RECIPE_BYTES} bytes of JSON are read")
    for name, setting in recipe.items():
        parts = setting if isinstance(setting, list) else [setting]
        if not all(part is None or isinstance(part, str | int | float) for part in parts):
            refuse(f"training.recipe.{name}", setting, "it must be a plain value or a list of such")
    return recipe


def _metrics(value: object, refuse: Refuse) -> dict[str, float]:
    metrics = _named(value, "training.metrics", refuse)
    if len(metrics) > MAX_METRICS:
        refuse("training.metrics", value, f"at most {MAX_METRICS} are read")
    for name, number in metrics.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            refuse(f"training.metrics.{name}", number, "it must be a number")
    return metrics


def _versions(value: object, refuse: Refuse) -> dict[str, str]:
    versions = _named(value, "training.versions", refuse)
    if len(versions) > MAX_VERSIONS:
        refuse("training.versions", value, f"at most {MAX_VERSIONS} are read")
    for name, version in versions.items():
        if not isinstance(version, str) or not 0 < len(version) <= _MAX_VERSION_CHARS:
            refuse(f"training.versions.{name}", version, f"it must be 1 to {_MAX_VERSION_CHARS} characters")
    return versions


def _named(value: object, field: str, refuse: Refuse) -> dict[str, Any]:
    members = _object(value, field, refuse)
    for name in members:
        if not _NAME.fullmatch(name):
            refuse(field, name, "names are 1 to 64 letters, digits, '_', '.' and '-'")
    return members


def _object(value: object, field: str, refuse: Refuse) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(field, value, "it must be an object")
    return value
