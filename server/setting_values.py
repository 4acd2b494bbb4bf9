"""Values of settings as people write them, made into those of their types. Knows no setting by name."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def converted(value: object, wanted: Any) -> object:
    """A value as the type of its field; ValueError or TypeError says what it must be."""
    options = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    target = wanted if wanted in _CONVERTERS else next(each for each in options if each is not NoneType)
    if get_origin(target) is Literal:
        return _one_of(value, get_args(target))
    return _CONVERTERS[target](value)


def _one_of(value: object, allowed: tuple[object, ...]) -> object:
    if value not in allowed:
        raise ValueError(f"must be one of {', '.join(map(str, allowed))}")
    return value


_SIZE = re.compile(r"(\d+)\s*(KiB|MiB|GiB)?")
_UNITS = {None: 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def _whole_number(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("must be a whole number, or a size such as 512MiB")
    return int(match[1]) * _UNITS[match[2]]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a number") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text that is not empty")
    return value


def _folder(value: object) -> Path:
    if isinstance(value, Path):
        return value
    if "://" in _text(value):
        raise ValueError("must be a folder of this machine, not a URL")
    return Path(_text(value)).expanduser()


def _folder_or_url(value: object) -> Path | str:
    return value if isinstance(value, str) and "://" in value else _folder(value)


_CONVERTERS: Mapping[Any, Any] = {
    int: _whole_number,
    float: _number,
    str: _text,
    Path: _folder,
    Path | str: _folder_or_url,
}
