"""What a section of settings is: fields, each with a line that explains it and a range. Knows no settings."""

from typing import Any, NamedTuple, get_type_hints


class RangeError(ValueError):
    """A value that its own section refuses; the loader adds where the value came from."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name} {message}")
        self.name = name


class About(NamedTuple):
    """What stands beside a field's type: the line that explains it, and its range with both ends allowed."""

    text: str
    low: float | None = None
    high: float | None = None


class Section:
    """Checks every field's range when an instance is born."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, (_, about) in fields_of(type(self)).items():
            _check_range(name, getattr(self, name), about)


def fields_of(section: type[Section]) -> dict[str, tuple[Any, About]]:
    """Type and explanation of each field, in order."""
    hints = get_type_hints(section, include_extras=True)
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()}


def _check_range(name: str, value: object, about: About) -> None:
    if not isinstance(value, int | float):
        return
    low, high = about.low, about.high
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        ends = f"at least {low}" if high is None else f"{low} to {high}"
        raise RangeError(name, f"is {value}, must be {ends}")
