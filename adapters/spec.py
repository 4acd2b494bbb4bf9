"""An adapter's configuration, rebuilt from PEFT's adapter_config.json. Knows no torch and no files.

What a field means is what PEFT 0.21 does with it when it loads the adapter.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn, TypeGuard, TypeVar

from adapters.errors import AdapterError, InvalidAdapterError, raise_first
from adapters.facts import Method
from adapters.files import CONFIG_FILE
from adapters.kinds import APPLIED
from adapters.layout import BaseLayout
from adapters.patterns import MatchBudget, check_pattern
from adapters.peft_fields import check_fields
from adapters.strict_json import brief, parse_object

MAX_CONFIG_BYTES = 256 * 1024
MAX_RANK = 4096  # of the format; a server may allow less
MAX_ALPHA = 1e6

Value = TypeVar("Value")

_ALL_LINEAR = "all-linear"
_MAX_NAMES = 4096
_MAX_PATTERNS = 1024
_MAX_NAME_CHARS = 512


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What a LoRA adapter changes and how strongly.

    Attributes:
        method: "lora" scales by alpha / rank, "rslora" by alpha / sqrt(rank).
        rank, alpha: of every module that no pattern names.
        target_modules: name suffixes, or one regular expression, or "all-linear".
        exclude_modules: suffixes or a regular expression that wins over target_modules; None for none.
        rank_pattern, alpha_pattern: expression over the end of a module's name → value; the first match wins.
        layers_to_transform: layer indices that a suffix may match in; None for all.
        layers_pattern: names of the module list whose index counts; None for the first index in the name.
    """

    method: Method
    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...] | None

    def targets(self, layout: BaseLayout) -> tuple[str, ...]:
        """Every linear module of the base that PEFT would adapt, in the base's order.

        Raises:
            InvalidAdapterError: none at all, reason NO_TARGET; or a pattern takes too long.
        """
        return self._targets(layout, MatchBudget())

    def rank_of(self, module: str) -> int:
        """Rank of the update of one module."""
        return _by_pattern(self.rank_pattern, module, self.rank, MatchBudget())

    def scaling_of(self, module: str) -> float:
        """Factor on B @ A of one module."""
        return self._scaling(module, MatchBudget())

    def ranks_and_scalings(self, layout: BaseLayout) -> dict[str, tuple[int, float]]:
        """Rank and scaling of every target, in the base's order, all within one time budget."""
        budget = MatchBudget()
        return {
            module: (
                _by_pattern(self.rank_pattern, module, self.rank, budget),
                self._scaling(module, budget),
            )
            for module in self._targets(layout, budget)
        }

    def canonical(self) -> dict[str, object]:
        """All that decides what the adapter does, JSON-able, the same for the same meaning."""
        return {
            "method": self.method,
            "rank": self.rank,
            "alpha": self.alpha,
            "bias": "none",
            "target_modules": _plain(self.target_modules),
            "exclude_modules": _plain(self.exclude_modules),
            # Pairs, not objects: the first match wins, so their order is part of the meaning.
            "rank_pattern": [list(item) for item in self.rank_pattern.items()],
            "alpha_pattern": [list(item) for item in self.alpha_pattern.items()],
            "layers_to_transform": _plain(self.layers_to_transform),
            "layers_pattern": _plain(self.layers_pattern),
        }

    def _targets(self, layout: BaseLayout, budget: MatchBudget) -> tuple[str, ...]:
        found = tuple(module for module in layout.modules if self._is_target(module, layout, budget))
        if not found:
            raise InvalidAdapterError(
                f"target_modules {brief(self.target_modules)} match no linear module of this base; "
                "was the adapter trained on another architecture?",
                reason="NO_TARGET",
            )
        return found

    def _scaling(self, module: str, budget: MatchBudget) -> float:
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha, budget)
        rank = _by_pattern(self.rank_pattern, module, self.rank, budget)
        return APPLIED[self.method].scaling(alpha, rank)

    def _is_target(self, module: str, layout: BaseLayout, budget: MatchBudget) -> bool:
        """`check_target_module_exists` of peft.tuners.tuners_utils, step for step."""
        if self._is_excluded(module, budget):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == _ALL_LINEAR:
                return module != layout.head
            return budget.fullmatch(self.target_modules, module)
        if module in self.target_modules:
            return True  # a full name overrides layers_to_transform, in PEFT too
        return _ends_with_one(module, self.target_modules) and self._is_in_layers(module, budget)

    def _is_excluded(self, module: str, budget: MatchBudget) -> bool:
        if self.exclude_modules is None:
            return False
        if isinstance(self.exclude_modules, str):
            return budget.fullmatch(self.exclude_modules, module)
        return module in self.exclude_modules or _ends_with_one(module, self.exclude_modules)

    def _is_in_layers(self, module: str, budget: MatchBudget) -> bool:
        if self.layers_to_transform is None:
            return True
        index = self._layer_index(module, budget)
        return index is not None and index in self.layers_to_transform

    def _layer_index(self, module: str, budget: MatchBudget) -> int | None:
        for expression in self._layer_expressions():
            match = budget.match(expression, module)
            if match is not None:
                digits = match.groupdict()["idx"]
                return None if digits is None else int(digits)
        return None

    def _layer_expressions(self) -> Iterator[str]:
        if self.layers_pattern is None:
            yield r".*?\.[^.]*\.(?P<idx>\d+)\."
        else:  # the pattern stands bare, as it does in PEFT
            yield from (rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern)


def parse_spec(raw: bytes) -> AdapterSpec:
    """The specification in the bytes of an adapter_config.json.

    Raises:
        InvalidAdapterError: not a configuration, or a value is out of range.
        UnsupportedAdapterError: it asks for what cannot be applied here; names the field and the remedy.
    """
    config = parse_object(raw, source=CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    check_fields(config)
    values: dict[str, Any] = {}
    faults: list[AdapterError] = []
    for attribute, read in _READERS.items():
        try:
            values[attribute] = read(config)
        except AdapterError as fault:
            faults.append(fault)
    raise_first(faults)
    spec = AdapterSpec(**values)
    _check_layers(spec)
    return spec


def _target_modules(value: object) -> tuple[str, ...] | str:
    names = _names(value, "target_modules")
    if not names:
        _refuse("target_modules", value, "it must name at least one module")
    return names


def _exclude_modules(value: object) -> tuple[str, ...] | str | None:
    return _names([] if value is None else value, "exclude_modules") or None


def _names(value: object, field: str) -> tuple[str, ...] | str:
    """A regular expression, or distinct names in order: PEFT keeps them in a set and saves them in any."""
    if isinstance(value, str):
        if value.lower() != _ALL_LINEAR or field != "target_modules":
            check_pattern(value, field)
        return value
    names = _strings(value, field)
    if len(names) > _MAX_NAMES:
        _refuse(field, len(names), f"at most {_MAX_NAMES} names are read")
    return tuple(sorted(set(names)))


def _strings(value: object, field: str) -> list[str]:
    if not isinstance(value, list):
        _refuse(field, value, "it must be a list of names or one string")
    for name in value:
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_CHARS:
            _refuse(field, name, f"a name must be a string of 1 to {_MAX_NAME_CHARS} characters")
    return value


def _layers_to_transform(value: object) -> tuple[int, ...] | None:
    indices = [] if value is None else value if isinstance(value, list) else [value]
    for index in indices:
        if not _is_integer(index) or not 0 <= index < 2**31:
            _refuse("layers_to_transform", index, "it must be a layer index or a list of them")
    return tuple(sorted(set(indices))) or None


def _layers_pattern(value: object) -> tuple[str, ...] | None:
    patterns = _strings([value] if isinstance(value, str) and value else value or [], "layers_pattern")
    if len(patterns) > _MAX_PATTERNS:
        _refuse("layers_pattern", len(patterns), f"at most {_MAX_PATTERNS} patterns are read")
    for pattern in patterns:
        check_pattern(pattern, "layers_pattern")
    return tuple(patterns) or None


def _check_layers(spec: AdapterSpec) -> None:
    if isinstance(spec.target_modules, str) and spec.layers_to_transform is not None:
        _refuse("layers_to_transform", spec.layers_to_transform, "it needs target_modules to be a list")
    if spec.layers_pattern is not None and spec.layers_to_transform is None:
        _refuse("layers_pattern", spec.layers_pattern, "it needs layers_to_transform")


def _pattern_map(
    config: Mapping[str, Any], field: str, parse: Callable[[object, str], Value]
) -> Mapping[str, Value]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        _refuse(field, patterns, f"it must be an object of at most {_MAX_PATTERNS} patterns")
    for pattern in patterns:
        check_pattern(pattern, field)
    return MappingProxyType(
        {pattern: parse(value, f"{field}[{brief(pattern)}]") for pattern, value in patterns.items()}
    )


def _by_pattern(patterns: Mapping[str, Value], module: str, default: Value, budget: MatchBudget) -> Value:
    """`get_pattern_key` of peft.utils.other, and the look-up that follows it."""
    for pattern, value in patterns.items():
        if budget.match(rf"(.*\.)?({pattern})$", module):
            return value
    return patterns.get(module, default)


def _rank(value: object, field: str) -> int:
    if not _is_integer(value) or not 1 <= value <= MAX_RANK:
        _refuse(field, value, f"a rank must be an integer from 1 to {MAX_RANK}")
    return value


def _alpha(value: object, field: str) -> float:
    if not (_is_integer(value) or isinstance(value, float)) or not 0 < value <= MAX_ALPHA:
        _refuse(field, value, f"an alpha must be a number above 0, at most {MAX_ALPHA:g}")
    return float(value)


def _boolean(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        _refuse(field, value, "it must be true or false")
    return value


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _ends_with_one(module: str, names: tuple[str, ...]) -> bool:
    return module.endswith(tuple(f".{name}" for name in names))


_READERS: Mapping[str, Callable[[Mapping[str, Any]], object]] = {
    "method": lambda config: "rslora" if _boolean(config, "use_rslora") else "lora",
    "rank": lambda config: _rank(config["r"], "r"),
    "alpha": lambda config: _alpha(config["lora_alpha"], "lora_alpha"),
    "target_modules": lambda config: _target_modules(config["target_modules"]),
    "exclude_modules": lambda config: _exclude_modules(config.get("exclude_modules")),
    "rank_pattern": lambda config: _pattern_map(config, "rank_pattern", _rank),
    "alpha_pattern": lambda config: _pattern_map(config, "alpha_pattern", _alpha),
    "layers_to_transform": lambda config: _layers_to_transform(config.get("layers_to_transform")),
    "layers_pattern": lambda config: _layers_pattern(config.get("layers_pattern")),
}
"""By attribute of AdapterSpec: its value in a configuration, checked."""


def _plain(names: tuple[object, ...] | str | None) -> list[object] | str | None:
    return list(names) if isinstance(names, tuple) else names


def _refuse(field: str, value: object, why: str) -> NoReturn:
    raise InvalidAdapterError(f"{field} = {brief(value)} in {CONFIG_FILE}: {why}", reason="BAD_CONFIG")
