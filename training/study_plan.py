"""Owns a study's settings and the cells that follow from them. Runs nothing; knows no torch.

A study compares methods on equal terms: the same rows, base and recipe, but for what is compared and for the
learning rate, of which each method needs its own.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from training.errors import RecipeError, StudyError
from training.methods import Method, method_named
from training.recipe import Recipe
from training.recipe_file import read_recipe_file

Targets = str | tuple[str, ...] | None
"""As a recipe's target_modules; None is the method's own choice."""

OWN_OF_CELLS: Final = ("method", "rank", "target_modules", "seed", "learning_rate")
_OF_THE_STUDY: Final = ("data", "out", "base")
_NOT_IN_STUDIES: Final = (
    *("publish", "name", "promote_if", "alias", "promote_metric", "promote_margin"),
    *("eval_data", "max_steps"),
)
_QUICK: Final[Mapping[str, object]] = {"canary_probes": 0, "trackers": []}
"""Of every cell unless its recipe says otherwise: nobody uploads what a study trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSearch:
    """How a method's learning rate is found: short runs, and the lowest held-out loss decides.

    Attributes:
        factors: rates to try, in terms of the method's own default. While the best is the lowest or the
            highest of them, one more is tried beyond it, twice at most.
        steps: of a short run.
        eval_fraction: part of the training rows that it is judged by, which it does not learn.
        given: rates by method that need no search.
    """

    factors: tuple[float, ...] = (1.0, 3.0, 10.0)
    steps: int = 40
    eval_fraction: float = 0.1
    given: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_numbers("rates.factors", self.factors, lambda number: number > 0, "positive numbers")
        _check_numbers("rates.given", tuple(self.given.values()), lambda number: number > 0, "positive", 0)
        _check_numbers("rates.steps", (self.steps,), _is_count, "a whole number from 1")
        _check_numbers(
            "rates.eval_fraction", (self.eval_fraction,), lambda n: 0 < n <= 0.5, "above 0, to 0.5"
        )
        for method in self.given:
            _method(method, "rates.given")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a study.

    Attributes:
        rank: None where the method has none.
    """

    method: str
    rank: int | None
    targets: Targets
    seed: int

    @property
    def kind(self) -> Method:
        return method_named(self.method)

    @property
    def name(self) -> str:
        """Of its folder."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        targets = "" if self.targets is None else f"-{self.targets_text}"
        return f"{self.method}{rank}{targets}-s{self.seed}"

    @property
    def targets_text(self) -> str | None:
        """Which modules it trains, for people; None where the method has no choice."""
        if "target_modules" not in self.kind.settings:
            return None
        if self.targets is None:
            return "all-linear" if self.kind.family == "low_rank" else "its own"
        return self.targets if isinstance(self.targets, str) else "+".join(self.targets)

    def settings(self) -> dict[str, Any]:
        """Those of a recipe that make this cell what it is."""
        own: dict[str, Any] = {"method": self.method, "seed": self.seed}
        if self.rank is not None:
            own["rank"] = self.rank
        if self.targets is not None:
            own["target_modules"] = self.targets if isinstance(self.targets, str) else list(self.targets)
        return own


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is compared, on what.

    Attributes:
        data: rows to learn from, as for training.
        test: rows that no cell learns.
        base: as a recipe's.
        rows, test_rows: so many of the files' rows, at random; None for all.
        methods, ranks, targets, seeds: every combination that makes a difference is a cell.
        rates: the search for learning rates.
        recipe: settings of every cell.
        overrides: settings of a method's cells, which win.
        max_new_tokens: longest answer to a test row; None for the server's default.
        title: of the report.

    Raises:
        StudyError: a setting is unknown or impossible, or a cell has an impossible recipe.
    """

    data: Path
    test: Path
    base: str = "smollm2"
    rows: int | None = None
    test_rows: int | None = None
    methods: tuple[str, ...] = ("qlora", "lora", "full")
    ranks: tuple[int, ...] = (16,)
    targets: tuple[Targets, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    rates: RateSearch = field(default_factory=RateSearch)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_new_tokens: int | None = None
    title: str = "Ways of training compared"

    def __post_init__(self) -> None:
        for name in ("methods", "ranks", "targets", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise StudyError(f"{name} is {list(values)}, must be a list of different values")
        for name in ("rows", "test_rows", "max_new_tokens"):
            if getattr(self, name) is not None:
                _check_numbers(name, (getattr(self, name),), _is_count, "a whole number from 1")
        for method in (*self.methods, *self.overrides):
            _method(method, "methods")
        _check_recipe_settings("recipe", self.recipe)
        for method, settings in self.overrides.items():
            _check_recipe_settings(f"overrides.{method}", settings)
        for cell in self.cells():
            self.recipe_of(cell, out=Path(cell.name))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str) -> "Study":
        """A study from plain values, such as a parsed file or flags."""
        _check_names(cls, values, source)
        for name in ("data", "test"):
            if values.get(name) is None:
                raise StudyError(f"{source} does not set {name}; it is needed")
        given = {name: _converted(name, value, source) for name, value in values.items()}
        return cls(**given)

    @classmethod
    def from_file(cls, path: Path, overrides: Mapping[str, Any]) -> "Study":
        """A study from a YAML file; `overrides` win."""
        try:
            values = read_recipe_file(path)
        except RecipeError as error:
            raise StudyError(str(error)) from None
        return cls.from_mapping(values | dict(overrides), source=str(path))

    def cells(self) -> Iterator[Cell]:
        """In the order in which they run; what a method does not know makes no cells of its own."""
        seen: set[Cell] = set()
        for seed, method, rank, targets in itertools.product(
            self.seeds, self.methods, self.ranks, self.targets
        ):
            knows = method_named(method).settings
            cell = Cell(
                method=method,
                rank=rank if "rank" in knows else None,
                targets=targets if "target_modules" in knows else None,
                seed=seed,
            )
            if cell not in seen:
                seen.add(cell)
                yield cell

    def recipe_of(self, cell: Cell, *, out: Path, data: Path | None = None, **more: Any) -> dict[str, Any]:
        """A recipe file's values for a cell.

        Args:
            data: in place of the study's own file.
            more: further settings, which win.

        Raises:
            StudyError: they are impossible.
        """
        values = {
            **_QUICK,
            **self.recipe,
            **self.overrides.get(cell.method, {}),
            **cell.settings(),
            **more,
            "base": self.base,
            "data": str(data or self.data),
            "out": str(out),
        }
        try:
            Recipe.from_mapping(values, source="the study")
        except RecipeError as error:
            raise StudyError(f"{cell.name}: {error}") from None
        return values

    def quantization_of(self, cell: Cell) -> str:
        """Of the base that a cell is trained on."""
        values = self.recipe_of(cell, out=Path(cell.name))
        return Recipe.from_mapping(values, source="the study").base_quantization

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as a study's file would hold them."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def terms(self) -> dict[str, Any]:
        """What must stay the same when a study goes on; cells may be added."""
        widened = ("methods", "ranks", "targets", "seeds", "title")
        return {name: value for name, value in self.to_mapping().items() if name not in widened}


def _converted(name: str, value: Any, source: str) -> Any:
    if name in ("data", "test"):
        return Path(value).expanduser()
    if name == "rates":
        return _rates(value, source)
    if name in ("methods", "ranks", "targets", "seeds"):
        if not isinstance(value, list | tuple):
            raise StudyError(f"{source}: {name} is {value!r}, must be a list")
        return tuple(tuple(member) if isinstance(member, list) else member for member in value)
    if name in ("recipe", "overrides") and not isinstance(value, dict):
        raise StudyError(f"{source}: {name} is {value!r}, must hold settings by name")
    return value


def _rates(value: Any, source: str) -> RateSearch:
    if not isinstance(value, dict):
        raise StudyError(f"{source}: rates is {value!r}, must hold factors, steps, eval_fraction or given")
    _check_names(RateSearch, value, f"{source}: rates")
    factors = value.get("factors", RateSearch().factors)
    if not isinstance(factors, list | tuple):
        raise StudyError(f"{source}: rates.factors is {factors!r}, must be a list of positive numbers")
    return RateSearch(**{**value, "factors": tuple(factors)})


def _check_names(kind: type, values: Mapping[str, Any], source: str) -> None:
    known = [each.name for each in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise StudyError(f"{source} sets {name!r}, which does not exist; there are {', '.join(known)}")


def _check_recipe_settings(where: str, settings: Mapping[str, Any]) -> None:
    for name in settings:
        if name in OWN_OF_CELLS or name in _OF_THE_STUDY:
            remedy = "give methods, ranks, targets, seeds, rates, data and base beside it, for all cells"
            raise StudyError(f"{where} sets {name}, which a study sets itself; {remedy}")
        if name in _NOT_IN_STUDIES:
            raise StudyError(f"{where} sets {name}, which has no place in a study; leave it out")


def _check_numbers(
    name: str, values: Sequence[Any], allowed: Callable[[Any], bool], wanted: str, least: int = 1
) -> None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if len(values) < least or not numbers or not all(allowed(value) for value in values):
        shown = values[0] if len(values) == 1 else list(values)
        raise StudyError(f"{name} is {shown!r}, must be {wanted}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _method(name: Any, where: str) -> None:
    try:
        method_named(str(name))
    except RecipeError as error:
        raise StudyError(f"{where}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(member) for name, member in value.items()}
    return [_plain(member) for member in value] if isinstance(value, tuple | list) else value
