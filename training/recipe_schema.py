"""Owns the JSON schema of recipe files, made of `Recipe`: its types, choices, ranges, defaults and docstring.

Editors check a recipe with it while it is written; what it cannot say, such as which settings need another
one, `Recipe` refuses all the same. Draft 2020-12.
"""

import dataclasses
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Final, Literal

from training.methods import METHODS, OWN_SETTINGS, Method
from training.recipe import Recipe
from training.recipe_checks import LICENSE, RANGES

_DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: Final = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_DEFAULT_METHOD: Final = {field.name: field.default for field in dataclasses.fields(Recipe)}["method"]
_ATTRIBUTE: Final = re.compile(r"    (\w+): (.*)")


def schema_text() -> str:
    """The schema as a file."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file; `data` and `out` may be missing there, for a flag can give them."""
    described = _descriptions()
    hints = typing.get_type_hints(Recipe)
    return {
        "$schema": _DRAFT,
        "title": "Recipe of quickchange train",
        "type": "object",
        "properties": {
            field.name: {"description": described[field.name]} | _values(field, hints[field.name])
            for field in dataclasses.fields(Recipe)
        },
        "additionalProperties": False,
        "allOf": [_rule(method) for method in METHODS.values()],
    }


def _values(field: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    """What a field may be, and its default where it is not open."""
    schema = _typed(hint)
    if field.name in RANGES:
        kind, low, high = RANGES[field.name]
        schema |= {"minimum": kind(low), "maximum": kind(high)}
    if field.name == "license":
        schema["pattern"] = f"^{LICENSE.pattern}$"
    if field.default is not dataclasses.MISSING and field.default is not None:
        schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return schema


def _typed(hint: Any) -> dict[str, Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _either([_typed(part) for part in typing.get_args(hint)])
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    if typing.get_origin(hint) is tuple:
        return {"type": "array", "items": {"type": "string", "minLength": 1}}
    return {"type": "null" if hint is type(None) else _PLAIN[hint]}


def _either(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema for several: of plain types their list, of choices and null all of them."""
    names = [part["type"] for part in parts if part.keys() == {"type"}]
    if len(names) == len(parts):
        return {"type": names}
    if names == ["null"] and len(parts) == 2 and "enum" in parts[0]:
        return {"enum": [*parts[0]["enum"], None]}
    return {"anyOf": parts}


def _rule(method: Method) -> dict[str, Any]:
    """What a method does not know, and which bases it takes; where none is named, the default method's."""
    condition: dict[str, Any] = {"properties": {"method": {"const": method.name}}}
    properties: dict[str, Any] = dict.fromkeys(sorted(OWN_SETTINGS - method.settings), False)
    properties["quantization"] = {"enum": ["auto", *method.quantizations]}
    return {
        "if": condition if method.name == _DEFAULT_METHOD else condition | {"required": ["method"]},
        "then": {"properties": properties},
    }


def _descriptions() -> dict[str, str]:
    """Of every field, from the docstring of `Recipe`."""
    attributes = (inspect.getdoc(Recipe) or "").partition("Attributes:\n")[2].partition("\nRaises:")[0]
    found: dict[str, str] = {}
    for line in attributes.splitlines():
        begun = _ATTRIBUTE.fullmatch(line)
        if begun:
            name = begun[1]
            found[name] = begun[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found
