"""Owns the form of training data on disk: one JSON object a line, in one of four forms. Knows no tokens.

{"prompt": …, "completion": …}                          one question and its answer
{"instruction": …, "input": … (optional), "output": …}  the same, the input below the instruction
{"messages": [{"role": …, "content": …}, …]}            a chat; every answer in it is learned
{"text": …}                                             plain text; all of it is learned

Other members of an object, such as ids, are left alone.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from training.errors import DataError

ROLES: Final = ("system", "user", "assistant")

_SHOWN_PROBLEMS = 3
_FORMS: Final = (("prompt", "completion"), ("instruction", "output"), ("messages",), ("text",))
_FORMS_TEXT: Final = "prompt + completion, instruction + output, messages, or text"

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": "…"}"""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was meant.

    Attributes:
        line: where it stands in its file, from 1.
        messages: a chat that ends with an answer; empty for plain text.
        text: plain text; empty for a chat.
    """

    line: int
    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def question(self) -> str:
        """What two rows have in common if one of them gives the other away."""
        return self.text or json.dumps(self.messages[:-1], sort_keys=True)


def read_rows(path: Path) -> list[Row]:
    """Every row of a JSON-lines file; blank lines do not count.

    Raises:
        DataError: it cannot be read, holds no row, or holds malformed ones, which are named by line.
    """
    if path.suffix == ".parquet":
        raise DataError(
            f"{path} is Parquet; only JSON lines are read: "
            "pandas.read_parquet(…).to_json(…, orient='records', lines=True) converts it"
        )
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            rows.append(parse_row(number, line))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{path} {_summary(problems)}")
    if not rows:
        raise DataError(f"{path} holds no rows; give one JSON object a line")
    return rows


def parse_row(number: int, line: str) -> Row:
    """One line; errors name it by its number."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"line {number} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"line {number} is no JSON object; write {{…}} with {_FORMS_TEXT}")
    forms = [form for form in _FORMS if all(name in values for name in form)]
    if len(forms) != 1:
        has = "mixes forms" if forms else f"has only {', '.join(values) or 'nothing'}"
        raise DataError(f"line {number} {has}; give {_FORMS_TEXT}")
    return _FORM_READERS[forms[0]](number, values)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _summary(problems: Sequence[str]) -> str:
    rest = len(problems) - _SHOWN_PROBLEMS
    return "; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {rest} more lines" if rest > 0 else "")


def _from_prompt(number: int, values: Mapping[str, Any]) -> Row:
    prompt = _string(number, values, "prompt")
    return _chat(number, turn("user", prompt), _string(number, values, "completion"))


def _from_instruction(number: int, values: Mapping[str, Any]) -> Row:
    instruction = _string(number, values, "instruction")
    details = _string(number, values, "input", may_be_empty=True) if "input" in values else ""
    question = f"{instruction}\n\n{details}" if details else instruction
    return _chat(number, turn("user", question), _string(number, values, "output"))


def _from_messages(number: int, values: Mapping[str, Any]) -> Row:
    messages = values["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"line {number}: messages must be a list of at least two")
    turns = tuple(_checked_message(number, index, message) for index, message in enumerate(messages))
    if turns[0]["role"] == "assistant" or turns[-1]["role"] != "assistant":
        raise DataError(f"line {number}: messages must begin with a question and end with role 'assistant'")
    return Row(number, messages=turns)


def _from_text(number: int, values: Mapping[str, Any]) -> Row:
    return Row(number, text=_string(number, values, "text"))


_FORM_READERS: Final[Mapping[tuple[str, ...], Callable[[int, Mapping[str, Any]], Row]]] = {
    ("prompt", "completion"): _from_prompt,
    ("instruction", "output"): _from_instruction,
    ("messages",): _from_messages,
    ("text",): _from_text,
}


def _checked_message(number: int, index: int, message: Any) -> Message:
    where = f"line {number}: messages[{index}]"
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f"{where} must be an object with role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"{where}.role is {role!r}, must be one of {', '.join(ROLES)}")
    if not isinstance(content, str) or (role == "assistant" and not content):
        raise DataError(f"{where}.content must be text{', and not empty' if content == '' else ''}")
    return turn(role, content)


def _string(number: int, values: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise DataError(f"line {number}: {name} is {type(value).__name__}, must be text")
    if not value and not may_be_empty:
        raise DataError(f"line {number}: {name} is empty")
    return value


def turn(role: str, content: str) -> Message:
    """One message of a chat."""
    return {"role": role, "content": content}


def _chat(number: int, question: Message, answer: str) -> Row:
    return Row(number, messages=(question, turn("assistant", answer)))


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
