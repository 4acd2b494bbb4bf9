"""Files to training data: what is learned, what is held out, and what is said of both beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import CHAT_TEMPLATE, build_tokenizer
from training.data import TrainingData, file_sha256, prepare
from training.data_report import Bin, Duplicates, Leakage, histogram, normalised, report_lines
from training.encoding import RowEncoder
from training.errors import DataError
from training.recipe import Recipe


def write(path: Path, *rows: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


def prepared(data: Path, max_length: int = 512, **settings: Any) -> TrainingData:
    tokenizer = build_tokenizer()
    encoder = RowEncoder(tokenizer, CHAT_TEMPLATE, frozenset({tokenizer.eos_token_id}), max_length)
    return prepare(Recipe(data=data, out=Path("unused"), **settings), encoder)


def said(data: TrainingData) -> str:
    return "\n".join(report_lines(data.report))


def test_counts(tmp_path: Path) -> None:
    """A row of prompt p and completion c has 4 tokens besides their bytes, one of them learned."""
    data = prepared(write(tmp_path / "rows.jsonl", ("abcd", "ef"), ("abcd" * 4, "ef")))
    train = data.report.train
    assert (train.rows, train.examples, train.tokens, train.learned_tokens) == (2, 2, 10 + 22, 3 + 3)
    assert train.longest == 22
    assert train.lengths == (Bin(16, 1), Bin(32, 1))
    assert data.report.held_out is None
    assert data.report.leakage is None
    lines = said(data).splitlines()
    assert lines[0] == "learned   2 rows, 2 examples, 32 tokens, 6 of them learned (19%); longest 22"
    assert lines[1] == "tokens    up to     16  ######################################## 1"
    assert len(lines) == 3


def test_histogram_has_every_bin_between_the_first_and_the_last() -> None:
    assert histogram([1, 8, 9, 64, 65]) == (Bin(8, 2), Bin(16, 1), Bin(32, 0), Bin(64, 1), Bin(128, 1))
    assert histogram([]) == ()


def test_rows_that_are_cut_or_dropped_are_said_by_line(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ("a", "b"), ("a", "b" * 30), ("a" * 30, "b"), ("c" * 30, "b"))
    text = said(prepared(rows, max_length=20))
    assert "cut       1 row (line 2), longer than max_length 20: their end is not learned" in text
    assert "dropped   2 rows (lines 3, 4), longer than max_length 20" in text


def test_repetitions(tmp_path: Path) -> None:
    rows = [("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("c", "1"), ("b", "1")]
    data = prepared(write(tmp_path / "rows.jsonl", *rows))
    assert data.report.duplicates == Duplicates(rows=(3, 6), prompts=(3, 4, 6), conflicts=((1, 3, 4),))
    assert "repeated  2 rows (lines 3, 6), each the same as an earlier one" in said(data)
    assert "at odds   1 prompt with different answers; the first in lines 1, 3, 4" in said(data)


def test_a_file_of_its_own_is_held_out_and_searched_for_leaks(tmp_path: Path) -> None:
    learned = write(tmp_path / "rows.jsonl", ("What is 2 + 2?", "4"), ("Who?", "me"), ("x", "y"))
    eval_data = tmp_path / "eval.csv"
    eval_data.write_text('prompt,completion\n"what is  2 + 2",5\nnew,1\nx,z\nWho?,me\n')
    data = prepared(learned, eval_data=eval_data)
    assert len(data.train) == 3
    assert [len(pack) for pack in data.held_out] == [1] * 4
    assert data.report.leakage == Leakage(rows=(5,), prompts=(4, 5), alike=(2,))
    assert "leaked    2 rows (lines 4, 5) held out, with a prompt that is learned" in said(data)
    assert "learned but for case, blanks and punctuation" in said(data)
    assert (data.sha256, data.eval_sha256) == (file_sha256(learned), file_sha256(eval_data))


def test_a_part_that_is_held_out_leaks_no_prompt(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", *[(f"q{n % 10}", f"a{n}") for n in range(40)])
    data = prepared(rows, eval_fraction=0.3)
    assert data.report.held_out is not None
    assert (data.report.rows, data.report.train.rows, data.report.held_out.rows) == (40, 28, 12)
    assert data.report.leakage == Leakage((), (), ())
    assert data.eval_sha256 is None


def test_a_bad_row_is_named_with_the_file_it_is_in(tmp_path: Path) -> None:
    learned = write(tmp_path / "rows.jsonl", ("a", "b"))
    bad = write(tmp_path / "eval.jsonl", ("a", ""))
    with pytest.raises(DataError, match=r"eval.jsonl line 1: completion is empty"):
        prepared(learned, eval_data=bad)
    with pytest.raises(DataError, match=r"eval.jsonl: no row leaves anything to measure"):
        prepared(learned, eval_data=write(bad, ("a" * 30, "b")), max_length=20)


def test_packs_are_counted(tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "rows.jsonl", *[(f"{n}", "ab") for n in range(9)]), 28, packing=True)
    assert [len(pack) for pack in data.sequences] == [4, 4, 1]
    assert data.report.train.sequences == 3
    assert "packed into 3 sequences of 28 tokens, 75% full" in said(data)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  What IS\tit?! ", "what is it"),
        ("Ｆｕｌｌ　width", "full width"),
        ("???", "???"),
        ("2 + 2", "2 + 2"),
    ],
)
def test_normalised(text: str, same: str) -> None:
    assert normalised(text) == same
