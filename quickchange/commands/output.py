"""How results look on standard output: tables for people, JSON for programs. Knows no command."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(value: object) -> None:
    print(json.dumps(value, default=plain, indent=2, ensure_ascii=False))


def print_json_line(value: object) -> None:
    print(json.dumps(value, default=plain, ensure_ascii=False), flush=True)


def plain(value: object) -> Any:
    """One step from a typed result towards what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_facts(facts: Mapping[str, str]) -> None:
    """One fact to a line; empty ones are left out."""
    width = max(map(len, facts))
    for name, value in facts.items():
        if value:
            print(f"{name.ljust(width)}  {value}")


def size(size_bytes: int) -> str:
    """1536 as "1.5 KiB"."""
    value, unit = float(size_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{size_bytes} B"


def short(digest: str) -> str:
    """As much of a digest as tells it from others."""
    return digest.removeprefix("sha256:")[:12]
