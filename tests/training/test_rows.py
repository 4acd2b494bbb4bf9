"""Rows: every form in every kind of file, and what is said of those that cannot be used."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from training.errors import DataError
from training.readers import Place, Record
from training.rows import Row, read_rows, row_of, split

CHAT = [{"role": role, "content": f'{role[0]}, "é"\n2'} for role in ("system", "user", "assistant")]

Writer = Callable[[Path, Sequence[dict[str, Any]]], Path]


def row(values: dict[str, Any], number: int = 7) -> Row:
    return row_of(Record(Place(number), values))


def json_lines(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return path


def comma_separated(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """As spreadsheets write it: every cell in quotes, lines that end with both characters."""
    cells = [[v if isinstance(v, str) else json.dumps(v) for v in values.values()] for values in rows]
    lines = [
        ",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [list(rows[0]), *cells]
    ]
    path = folder / "rows.csv"
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode() + b"\r\n")
    return path


def parquet(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


WRITERS = [json_lines, comma_separated, parquet]


@pytest.mark.parametrize(
    ("values", "question", "answer"),
    [
        ({"prompt": "2+2?", "completion": "4"}, "2+2?", "4"),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "Add.\n\n2 2", "4"),
        ({"instruction": "Add.", "input": "", "output": "4"}, "Add.", "4"),
        ({"instruction": "Add.", "input": None, "output": "4"}, "Add.", "4"),
        ({"instruction": "Add 2 2.", "output": "4", "id": 17}, "Add 2 2.", "4"),
    ],
)
def test_questions_become_chats(values: dict[str, Any], question: str, answer: str) -> None:
    assert row(values).messages == (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "2, \"é\"\n+ 2?", "completion": "  4 ", "id": "a"},
        {"id": "a", "instruction": "Add.", "input": "2\n\n2", "output": "4"},
        {"messages": CHAT},
        {"messages": json.dumps(CHAT)},
        {"text": "NA,\t你好\r\n\"null\""},
    ],
    ids=["prompt", "instruction", "messages", "messages as text", "text"],
)  # fmt: skip
def test_a_form_is_the_same_in_every_kind_of_file(
    write: Writer, values: dict[str, Any], tmp_path: Path
) -> None:
    rows = read_rows(write(tmp_path, [values, values]))
    for found in rows:
        assert (found.messages, found.text) == (row(values).messages, row(values).text)
    if write is parquet:
        assert [str(found.place) for found in rows] == ["row 1", "row 2"]


def test_a_csv_row_stands_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,id\n"one\n\nmore",1\n\ntwo,2\n')
    assert [(str(found.place), found.text) for found in read_rows(path)] == [
        ("line 2", "one\n\nmore"),
        ("line 6", "two"),
    ]


def test_a_parquet_file_may_mix_forms_and_hold_other_columns(tmp_path: Path) -> None:
    rows = [
        {"text": None, "prompt": "a", "completion": "b", "scan": b"\xff", "messages": None},
        {"text": "c", "prompt": None, "completion": None, "scan": None, "messages": None},
        {"text": None, "prompt": None, "completion": None, "scan": None, "messages": CHAT},
    ]
    found = read_rows(parquet(tmp_path, rows * 1000))
    assert len(found) == 3000
    assert [found[0].answer, found[1].text, found[2].messages] == ["b", "c", tuple(CHAT)]
    assert found[-1].place == Place(3000, "row")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a"}, "line 7 has only prompt; give prompt . completion"),
        ({}, "line 7 has only nothing"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "line 7 mixes forms"),
        ({"prompt": "a", "completion": ""}, "line 7: completion is empty"),
        ({"prompt": "a", "completion": 4}, "line 7: completion is int, must be text"),
        ({"text": "a\ud83d"}, r"line 7: text holds half of a character \(\\ud83d\)"),
        ({"messages": "[{"}, "line 7: messages is not JSON"),
        ({"messages": "{}"}, "at least two"),
        ({"messages": [{"role": "user", "content": "a"}]}, "at least two"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "end with"),
        ({"messages": [{"role": "bot", "content": "a"}, {"role": "user", "content": "b"}]}, "is 'bot'"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "with role and content"),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]}, "be text"),
    ],
)  # fmt: skip
def test_malformed_rows(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        row(values)


def test_bad_rows_are_all_counted_and_the_first_named(tmp_path: Path) -> None:
    lines, table, columns = tmp_path / "rows.jsonl", tmp_path / "rows.csv", tmp_path / "rows.parquet"
    lines.write_text('{"text": "good"}\n\n' + "{}\n" * 5)
    with pytest.raises(DataError, match=r"rows.jsonl line 3 .*line 4 .*line 5 .*and 2 more"):
        read_rows(lines)
    table.write_text('prompt,completion\na,b\n"a\n",\na,b,c\na\n')
    with pytest.raises(DataError, match=r"line 3: completion is empty; line 5 has 3 cells, .*line 6 has 1 c"):
        read_rows(table)
    parquet(tmp_path, [{"text": "a"}, {"text": ""}, {"text": None}])
    with pytest.raises(DataError, match="row 2: text is empty; row 3 has only nothing"):
        read_rows(columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"\n\n", "holds no rows"),
        ("list.json", b"[1]\n", "line 1 is no JSON object"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "line 2 is not UTF-8 at byte 10; save it as"),
        ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("empty.csv", b"", "is empty; begin it with the names of its columns"),
        ("header.csv", b"prompt,completion\n", "holds no rows"),
        ("latin.csv", b"text\n\xe9\n", "line 2 is not UTF-8 at byte 0"),
        ("columns.csv", b"question;answer\na;b\n", "has the columns 'question;answer'; give prompt"),
        ("twice.csv", b"text,text\na,b\n", "has column 'text' twice"),
        ("quote.csv", b'text\n"a\n', "line 2 is not CSV .unexpected end of data"),
        ("empty.parquet", b"", "is no whole Parquet file"),
        ("lines.parquet", b'{"text": "a"}\n', "is no whole Parquet file"),
        ("rows.txt", b"a", r"ends in '.txt'; data is read from .jsonl, .ndjson, .json, .csv, .parquet"),
        ("rows", b"a", "ends in ''"),
    ],
)  # fmt: skip
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.csv", "absent.parquet"])
def test_absent_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} cannot be read: No such file"):
        read_rows(tmp_path / name)


def test_broken_parquet_is_told_wherever_it_breaks(tmp_path: Path) -> None:
    """Cut short; and whole but for bytes within its first column, which only reading it shows."""
    path = parquet(tmp_path, [{"text": f"row {n}"} for n in range(1000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"rows.parquet is no whole Parquet file .*; write or fetch it again"):
        read_rows(path)
    path.write_bytes(whole[:4] + b"\xff" * 64 + whole[68:])
    with pytest.raises(DataError, match="is no whole Parquet file"):
        read_rows(path)


def test_parquet_columns_of_no_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the columns 'question', 'completion'; give prompt"):
        read_rows(parquet(tmp_path, [{"question": "a", "completion": "b"}]))


def test_a_cell_may_be_longer_than_csv_would_allow(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(path)[0].text) == 200_000


def test_split_keeps_equal_questions_together() -> None:
    rows = [row({"prompt": f"q{n % 10}", "completion": f"a{n}"}, n) for n in range(40)]
    train, held_out = split(rows, 0.3, seed=1)
    assert len(train) == 28
    assert len(held_out) == 12
    assert not {row.question for row in train} & {row.question for row in held_out}
    assert split(rows, 0.3, seed=1) == (train, held_out)
    assert split(rows, 0.3, seed=2) != (train, held_out)
    assert split(rows, 0.0, seed=1) == (rows, [])
