"""One bounded JSON object out of bytes that a stranger wrote. Knows nothing of what the object means."""

import json
import math
import reprlib
from typing import Any, NoReturn

from adapters.errors import InvalidAdapterError

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 160


def brief(value: object) -> str:
    """The value as Python would show it, cut to a length that fits in an error message."""
    return _BRIEF.repr(value)


def parse_object(raw: bytes, *, source: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in raw, strictly: UTF-8, no duplicate key, no NaN or infinity, nesting bounded.

    Raises:
        InvalidAdapterError: reason BAD_JSON, naming `source` and what is wrong.
    """
    if len(raw) > max_bytes:
        raise _bad(f"{source} is {len(raw)} bytes; at most {max_bytes} are read")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be stored or hashed
    except (ValueError, RecursionError) as error:  # both decoding errors are ValueErrors
        raise _bad(f"{source} is not valid JSON: {_cause(error)}") from None
    if not isinstance(value, dict):
        raise _bad(f"{source} must hold a JSON object, not {brief(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"the key {brief(key)} appears twice")
        members[key] = value
    return members


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return number


def _cause(error: ValueError | RecursionError) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:300]


def _bad(message: str) -> InvalidAdapterError:
    return InvalidAdapterError(message, reason="BAD_JSON")
