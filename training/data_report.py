"""Owns what is known of the data before the first step: counts, lengths, repetitions, leaks. Knows no model.

`report_lines` says it to people; as plain values it stands in training.json.
"""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from training.encoding import Encoded
from training.packing import Pack
from training.readers import Place
from training.rows import Row

_SHOWN_PLACES: Final = 8
_BAR: Final = 40
_SHORTEST_BIN: Final = 8


@dataclass(frozen=True, slots=True)
class Bin:
    """So many examples have at most `up_to` tokens, and more than those of the bin before."""

    up_to: int
    examples: int


@dataclass(frozen=True, slots=True)
class Side:
    """The rows that are learned, or those that are held out.

    Attributes:
        unit: what numbers of rows count.
        tokens: of all examples, as they are computed.
        longest: tokens of an example before any was cut.
        lengths: of all examples before any was cut or dropped.
        cut: numbers of the rows that are there in part, because they are longer than max_length.
        dropped: numbers of the rows of which nothing is left.
        sequences: that are computed; fewer than there are examples if they are packed.
    """

    unit: Literal["line", "row"]
    rows: int
    examples: int
    tokens: int
    learned_tokens: int
    longest: int
    lengths: tuple[Bin, ...]
    cut: tuple[int, ...]
    dropped: tuple[int, ...]
    sequences: int


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Rows of the data that are there again, by number.

    Attributes:
        rows: those that equal an earlier one.
        prompts: those whose prompt an earlier one has, whatever the answer.
        conflicts: for each prompt that has different answers, its rows.
    """

    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    conflicts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Leakage:
    """Rows that are held out, by number, and that training gives away.

    Attributes:
        rows: those that are learned too.
        prompts: those whose prompt is learned too, whatever the answer.
        alike: those whose prompt is learned but for case, blanks and punctuation; the others are not among
            them.
    """

    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    alike: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the rows.

    Attributes:
        rows: of the data, whether learned or held out.
        max_length: tokens of the longest sequence that is allowed.
        leakage: None if nothing is held out.
        processes: that learn together.
        sequences_per_step: of one optimizer step, over all its passes and processes.
    """

    rows: int
    max_length: int
    packing: bool
    train: Side
    held_out: Side | None
    duplicates: Duplicates
    leakage: Leakage | None
    processes: int
    sequences_per_step: int


def side(rows: Sequence[Row], encoded: Encoded, sequences: Sequence[Pack]) -> Side:
    """Counts of the rows of one side, of which there is one at least."""
    return Side(
        unit=rows[0].place.unit,
        rows=len(rows),
        examples=len(encoded.examples),
        tokens=sum(len(example.token_ids) for example in encoded.examples),
        learned_tokens=sum(example.learned_tokens for example in encoded.examples),
        longest=max(encoded.lengths, default=0),
        lengths=histogram(encoded.lengths),
        cut=_numbers(encoded.cut),
        dropped=_numbers(encoded.dropped),
        sequences=len(sequences),
    )


def histogram(lengths: Sequence[int]) -> tuple[Bin, ...]:
    """Bins that end at powers of two, from the shortest to the longest length there is."""
    if not lengths:
        return ()
    counts: dict[int, int] = defaultdict(int)
    for length in lengths:
        counts[max(_SHORTEST_BIN, 1 << (length - 1).bit_length())] += 1
    bounds = range(min(counts).bit_length() - 1, max(counts).bit_length())
    return tuple(Bin(1 << bits, counts[1 << bits]) for bits in bounds)


def duplicates(rows: Sequence[Row]) -> Duplicates:
    """Rows and prompts that are there more than once; plain text is its own prompt."""
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[row.question].append(row)
    again: list[int] = []
    conflicts: list[tuple[int, ...]] = []
    for same in by_prompt.values():
        answers: set[str] = set()
        for row in same:
            if row.answer in answers:
                again.append(row.place.number)
            answers.add(row.answer)
        if len(answers) > 1:
            conflicts.append(tuple(row.place.number for row in same))
    prompts = sorted(row.place.number for same in by_prompt.values() for row in same[1:])
    return Duplicates(tuple(sorted(again)), tuple(prompts), tuple(conflicts))


def leakage(learned: Sequence[Row], held_out: Sequence[Row]) -> Leakage:
    """Held-out rows that learned ones give away."""
    whole = {(row.question, row.answer) for row in learned}
    prompts = {row.question for row in learned}
    normalised = {_normalised_question(row) for row in learned}

    def which(leaks: Callable[[Row], bool]) -> tuple[int, ...]:
        return tuple(row.place.number for row in held_out if leaks(row))

    return Leakage(
        rows=which(lambda row: (row.question, row.answer) in whole),
        prompts=which(lambda row: row.question in prompts),
        alike=which(lambda row: row.question not in prompts and _normalised_question(row) in normalised),
    )


def normalised(text: str) -> str:
    """A text without what people vary when they write the same again; unchanged if nothing else is left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(" " if unicodedata.category(char).startswith("P") else char for char in folded)
    return " ".join(plain.split()) or text


def report_lines(report: DataReport) -> Iterator[str]:
    """The report for a terminal."""
    yield from _side_lines("learned", report.train, report)
    if report.held_out is not None:
        yield from _side_lines("held out", report.held_out, report)
    if report.processes > 1:
        yield (
            f"{'each step':<9} {report.sequences_per_step} sequences, "
            f"{report.sequences_per_step // report.processes} in each of {report.processes} processes"
        )
    yield from _histogram_lines(report)
    yield from _length_lines(report)
    yield from _repetition_lines(report)


def _side_lines(name: str, part: Side, report: DataReport) -> Iterator[str]:
    share = part.learned_tokens / max(1, part.tokens)
    yield (
        f"{name:<9} {part.rows} rows, {part.examples} examples, {part.tokens} tokens, "
        f"{part.learned_tokens} of them learned ({share:.0%}); longest {part.longest}"
    )
    if report.packing:
        full = part.tokens / max(1, part.sequences * report.max_length)
        yield f"{'':<9} packed into {part.sequences} sequences of {report.max_length} tokens, {full:.0%} full"


def _histogram_lines(report: DataReport) -> Iterator[str]:
    bins = report.train.lengths
    most = max((each.examples for each in bins), default=1)
    for index, each in enumerate(bins):
        bar = "#" * -(-each.examples * _BAR // most)
        title = "tokens" if index == 0 else ""
        yield f"{title:<9} up to {each.up_to:>6}  {bar}{' ' if bar else ''}{each.examples}"


def _length_lines(report: DataReport) -> Iterator[str]:
    limit = f"longer than max_length {report.max_length}"
    for part, where in ((report.train, ""), (report.held_out, ", held out")):
        if part is not None and part.cut:
            yield f"{'cut':<9} {_rows(part, part.cut)}{where}, {limit}: their end is not learned"
        if part is not None and part.dropped:
            yield f"{'dropped':<9} {_rows(part, part.dropped)}{where}, {limit}"


def _repetition_lines(report: DataReport) -> Iterator[str]:
    again = report.duplicates
    if again.rows:
        yield f"{'repeated':<9} {_rows(report.train, again.rows)}, each the same as an earlier one"
    if again.conflicts:
        first = _shown(report.train.unit, again.conflicts[0])
        count = f"{len(again.conflicts)} {'prompt' if len(again.conflicts) == 1 else 'prompts'}"
        yield f"{'at odds':<9} {count} with different answers; the first in {first}"
    if report.held_out is None or report.leakage is None:
        return
    learned = "held out, with a prompt that is learned"
    if report.leakage.prompts:
        yield f"{'leaked':<9} {_rows(report.held_out, report.leakage.prompts)} {learned}"
    if report.leakage.alike:
        rows = _rows(report.held_out, report.leakage.alike)
        yield f"{'leaked':<9} {rows} {learned} but for case, blanks and punctuation"


def _rows(part: Side, numbers: Sequence[int]) -> str:
    return f"{len(numbers)} {'row' if len(numbers) == 1 else 'rows'} ({_shown(part.unit, numbers)})"


def _shown(unit: str, numbers: Sequence[int]) -> str:
    """The first of many, as in "lines 3, 9"."""
    more = ", …" if len(numbers) > _SHOWN_PLACES else ""
    return f"{unit}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers[:_SHOWN_PLACES]))}{more}"


def _numbers(places: Sequence[Place]) -> tuple[int, ...]:
    return tuple(place.number for place in places)


def _normalised_question(row: Row) -> str:
    if row.text:
        return normalised(row.text)
    return json.dumps([(message["role"], normalised(message["content"])) for message in row.messages[:-1]])
