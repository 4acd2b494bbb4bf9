"""Owns the way from files to what is trained on: read, split, encode, pack, report. Knows no model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from training.data_report import DataReport, duplicates, leakage, side
from training.encoding import Encoded, Example, RowEncoder
from training.errors import DataError
from training.packing import Pack, alone, packed
from training.recipe import Recipe
from training.rows import Row, read_rows, split


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Ready to train on.

    Attributes:
        train: the examples to learn.
        sequences: the same as they are computed: each alone, or packed.
        held_out: sequences whose loss is measured.
        sha256: 64 hexadecimal digits over the file of rows.
        eval_sha256: over the file of rows that are held out; None if they come from the same file.
    """

    train: tuple[Example, ...]
    sequences: tuple[Pack, ...]
    held_out: tuple[Pack, ...]
    report: DataReport
    sha256: str
    eval_sha256: str | None


def prepare(recipe: Recipe, encoder: RowEncoder, processes: int = 1) -> TrainingData:
    """Reads, splits and encodes the files of a recipe; the same in each of several processes.

    Args:
        processes: that learn together, for the report.

    Raises:
        DataError: a file cannot be read, a row is malformed, or nothing is left to learn.
    """
    rows = read_rows(recipe.data)
    learned, held_out = sides(recipe, rows)
    train = _encoded(recipe.data, encoder, learned)
    if not train.examples:
        raise DataError(f"{recipe.data}: no row leaves anything to learn; raise max_length or give more rows")
    measured = _encoded(recipe.eval_data or recipe.data, encoder, held_out)
    if recipe.eval_data is not None and not measured.examples:
        raise DataError(f"{recipe.eval_data}: no row leaves anything to measure; raise max_length")
    sequences = _sequences(train.examples, recipe, encoder)
    held_out_sequences = _sequences(measured.examples, recipe, encoder)
    report = DataReport(
        rows=len(rows),
        max_length=encoder.max_length,
        packing=recipe.packing,
        train=side(learned, train, sequences),
        held_out=side(held_out, measured, held_out_sequences) if held_out else None,
        duplicates=duplicates(rows),
        leakage=leakage(learned, held_out) if held_out else None,
        processes=processes,
        sequences_per_step=recipe.batch_size * recipe.gradient_accumulation * processes,
    )
    return TrainingData(
        train.examples,
        sequences,
        held_out_sequences,
        report,
        sha256=file_sha256(recipe.data),
        eval_sha256=None if recipe.eval_data is None else file_sha256(recipe.eval_data),
    )


def file_sha256(path: Path) -> str:
    """64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sides(recipe: Recipe, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to learn and rows that are held out, of the rows in recipe.data."""
    if recipe.eval_data is not None:
        return rows, read_rows(recipe.eval_data)
    return split(rows, recipe.eval_fraction, recipe.seed)


def _encoded(path: Path, encoder: RowEncoder, rows: list[Row]) -> Encoded:
    try:
        return encoder.encode_all(rows)
    except DataError as error:
        raise DataError(f"{path} {error}") from None


def _sequences(examples: tuple[Example, ...], recipe: Recipe, encoder: RowEncoder) -> tuple[Pack, ...]:
    return packed(examples, encoder.max_length, recipe.seed) if recipe.packing else alone(examples)
