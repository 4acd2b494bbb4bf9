"""Owns the forms of a row of training data, whatever file it comes from. Knows no tokens.

{"prompt": …, "completion": …}                          one question and its answer
{"instruction": …, "input": … (optional), "output": …}  the same, the input below the instruction
{"messages": [{"role": …, "content": …}, …]}            a chat, as a list or as JSON text
{"text": …}                                             plain text; all of it is learned

Other members of a row, such as ids, are left alone.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from training.errors import DataError
from training.readers import Place, Record, Records, open_records

ROLES: Final = ("system", "user", "assistant")

_SHOWN_PROBLEMS = 3
_FORMS: Final = (("prompt", "completion"), ("instruction", "output"), ("messages",), ("text",))
_FORMS_TEXT: Final = "prompt + completion, instruction + output, messages, or text"
_COLUMNS: Final = frozenset({"input"}.union(*_FORMS))

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": "…"}"""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was meant.

    Attributes:
        place: where it stands in its file.
        messages: a chat that ends with an answer; empty for plain text.
        text: plain text; empty for a chat.
    """

    place: Place
    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def question(self) -> str:
        """What two rows have in common if one of them gives the other away."""
        return self.text or json.dumps(self.messages[:-1], sort_keys=True)

    @property
    def answer(self) -> str:
        """What the question leads to; empty for plain text."""
        return self.messages[-1]["content"] if self.messages else ""


def read_rows(path: Path) -> list[Row]:
    """Every row of a file; blank lines do not count.

    Raises:
        DataError: it cannot be read, holds no row, or holds malformed ones, which are named by their place.
    """
    source = open_records(path, _COLUMNS)
    _check_columns(path, source)
    rows: list[Row] = []
    problems: list[str] = []
    for record in source.records:
        try:
            rows.append(row_of(record))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{path} {shortened(problems)}")
    if not rows:
        raise DataError(f"{path} holds no rows; give {_FORMS_TEXT}")
    return rows


def row_of(record: Record) -> Row:
    """A record as one of the forms; errors name its place."""
    place, values = record.place, record.values
    if isinstance(values, DataError):
        raise values
    forms = [form for form in _FORMS if all(name in values for name in form)]
    if len(forms) != 1:
        has = "mixes forms" if forms else f"has only {', '.join(values) or 'nothing'}"
        raise DataError(f"{place} {has}; give {_FORMS_TEXT}")
    return _FORM_READERS[forms[0]](place, values)


def shortened(problems: Sequence[str]) -> str:
    """The first few of many problems, and how many more there are."""
    rest = len(problems) - _SHOWN_PROBLEMS
    return "; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {rest} more" if rest > 0 else "")


def _check_columns(path: Path, source: Records) -> None:
    columns = source.columns
    if columns is not None and not any(set(form) <= set(columns) for form in _FORMS):
        raise DataError(f"{path} has the columns {', '.join(map(repr, columns))}; give {_FORMS_TEXT}")


def _from_prompt(place: Place, values: Mapping[str, Any]) -> Row:
    prompt = _string(place, values, "prompt")
    return _chat(place, turn("user", prompt), _string(place, values, "completion"))


def _from_instruction(place: Place, values: Mapping[str, Any]) -> Row:
    instruction = _string(place, values, "instruction")
    has_details = values.get("input") is not None
    details = _string(place, values, "input", may_be_empty=True) if has_details else ""
    question = f"{instruction}\n\n{details}" if details else instruction
    return _chat(place, turn("user", question), _string(place, values, "output"))


def _from_messages(place: Place, values: Mapping[str, Any]) -> Row:
    messages = values["messages"]
    if isinstance(messages, str):
        messages = _parsed(place, messages)
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{place}: messages must be a list of at least two")
    turns = tuple(_checked_message(place, index, message) for index, message in enumerate(messages))
    if turns[0]["role"] == "assistant" or turns[-1]["role"] != "assistant":
        raise DataError(f"{place}: messages must begin with a question and end with role 'assistant'")
    return Row(place, messages=turns)


def _parsed(place: Place, messages: str) -> Any:
    try:
        return json.loads(messages)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: messages is not JSON ({error})") from None


def _from_text(place: Place, values: Mapping[str, Any]) -> Row:
    return Row(place, text=_string(place, values, "text"))


_FORM_READERS: Final[Mapping[tuple[str, ...], Callable[[Place, Mapping[str, Any]], Row]]] = {
    ("prompt", "completion"): _from_prompt,
    ("instruction", "output"): _from_instruction,
    ("messages",): _from_messages,
    ("text",): _from_text,
}


def _checked_message(place: Place, index: int, message: Any) -> Message:
    where = f"{place}: messages[{index}]"
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f"{where} must be an object with role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"{where}.role is {role!r}, must be one of {', '.join(ROLES)}")
    if not isinstance(content, str) or (role == "assistant" and not content):
        raise DataError(f"{where}.content must be text{', and not empty' if content == '' else ''}")
    _check_characters(f"{where}.content", content)
    return turn(role, content)


def _string(place: Place, values: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} is {type(value).__name__}, must be text")
    if not value and not may_be_empty:
        raise DataError(f"{place}: {name} is empty")
    _check_characters(f"{place}: {name}", value)
    return value


def _check_characters(where: str, text: str) -> None:
    """JSON can write half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half of a character (\\u{ord(text[error.start]):04x})"
        raise DataError(f"{where} holds {half}; write the whole surrogate pair") from None


def turn(role: str, content: str) -> Message:
    """One message of a chat."""
    return {"role": role, "content": content}


def _chat(place: Place, question: Message, answer: str) -> Row:
    return Row(place, messages=(question, turn("assistant", answer)))


def split(rows: Sequence[Row], held_out_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to learn and rows to hold out, in the order of the file.

    Rows with the same question stay on the same side, so that no answer is held out and learned at once.
    """
    questions = sorted({row.question for row in rows})
    random.Random(seed).shuffle(questions)  # noqa: S311  a split is no secret
    held_out = set(questions[: round(len(questions) * held_out_fraction)])
    return (
        [row for row in rows if row.question not in held_out],
        [row for row in rows if row.question in held_out],
    )
