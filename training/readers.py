"""Owns the files that training data comes in: JSON lines, CSV and Parquet. Knows no forms of rows.

suffix                   a record is                            its place
.jsonl .ndjson .json     a line with a JSON object              line 7, from 1
.csv                     a row below the names of the columns   line 7, where it begins
.parquet                 a row; pyarrow reads it                row 7, from 1
"""

import codecs
import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from training.errors import DataError

_LONGEST_CELL: Final = 2**31 - 1  # csv would stop at 128 KiB
_ROWS_AT_ONCE: Final = 1024
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands in its file, from 1."""

    number: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Record:
    """What stands at a place, or why it cannot be read."""

    place: Place
    values: Mapping[str, Any] | DataError


@dataclass(frozen=True, slots=True)
class Records:
    """A file that is open.

    Attributes:
        columns: what every record has; None if each has names of its own.
        records: read as they are asked for; a file that turns out broken raises DataError.
    """

    columns: tuple[str, ...] | None
    records: Iterator[Record]


def open_records(path: Path, wanted: Collection[str]) -> Records:
    """The records of a file, whose kind its suffix says.

    Args:
        wanted: names of the values that are of use; others may be left out.

    Raises:
        DataError: it cannot be read, or is not what its suffix says.
    """
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise DataError(f"{path} ends in {path.suffix!r}; data is read from {', '.join(_OPENERS)}")
    return opener(path, wanted)


# JSON lines


def _open_json_lines(path: Path, _: Collection[str]) -> Records:
    return Records(None, (_json_record(n, line) for n, line in _text_lines(path) if line.strip()))


def _json_record(number: int, line: str) -> Record:
    place = Place(number)
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Record(place, DataError(f"{place} is not JSON ({error})"))
    if not isinstance(values, dict):
        return Record(place, DataError(f"{place} is no JSON object; write {{…}}, one to a line"))
    return Record(place, values)


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded one by one, so that an error names its line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, _decoded(path, number, line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _decoded(path: Path, number: int, line: bytes) -> str:
    if number == 1:
        if line.startswith(_UTF16):
            raise DataError(f"{path} is UTF-16; save it as UTF-8")
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path} line {number}"
        raise DataError(f"{where} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


# CSV


def _open_csv(path: Path, _: Collection[str]) -> Records:
    rows = _csv_rows(path)
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path} is empty; begin it with the names of its columns")
    columns = tuple(header[1])
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{path} has column {twice[0]!r} twice; give every column a name of its own")
    return Records(columns, (_csv_record(line, cells, columns) for line, cells in rows))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line on which each row begins, and its cells; blank lines are no rows."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader((line for _, line in _text_lines(path)), strict=True)
    begins = 1
    try:
        for cells in reader:
            if cells:
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} line {begins} is not CSV ({error})") from None


def _csv_record(line: int, cells: list[str], columns: tuple[str, ...]) -> Record:
    place = Place(line)
    if len(cells) != len(columns):
        counts = f"{len(cells)} cells, the columns are {len(columns)}"
        return Record(place, DataError(f"{place} has {counts}; put cells that hold commas in quotes"))
    return Record(place, dict(zip(columns, cells, strict=True)))


# Parquet


def _open_parquet(path: Path, wanted: Collection[str]) -> Records:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_schema
    except ModuleNotFoundError:
        raise DataError(f"{path} needs the package pyarrow: pip install 'quickchange[train]'") from None
    try:
        columns = tuple(read_schema(path).names)
    except (OSError, ArrowException) as error:
        raise _broken_parquet(path, error) from None
    return Records(columns, _parquet_records(path, [name for name in columns if name in wanted]))


def _parquet_records(path: Path, columns: list[str]) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                for values in batch.to_pylist():
                    number += 1
                    there = {name: value for name, value in values.items() if value is not None}
                    yield Record(Place(number, "row"), there)
    except (OSError, ArrowException) as error:
        raise _broken_parquet(path, error) from None


def _broken_parquet(path: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{path} cannot be read: {os.strerror(error.errno)}")
    why = " ".join(str(error).split())
    return DataError(f"{path} is no whole Parquet file ({why}); write or fetch it again")


_OPENERS: Final[Mapping[str, Callable[[Path, Collection[str]], Records]]] = {
    ".jsonl": _open_json_lines,
    ".ndjson": _open_json_lines,
    ".json": _open_json_lines,
    ".csv": _open_csv,
    ".parquet": _open_parquet,
}
