"""Owns the way from rows to token ids and batches: rendering, masks, padding. Knows no model.

Every row but plain text is a chat, rendered by the base's chat template up to where the answer begins, just
as the server renders a chat: the model sees the same tokens in training and in service. Only the answer is
learned, and after it the token that ends it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from training.errors import DataError
from training.rows import Message, Row, read_rows, split, turn

IGNORED: Final = -100
"""Label of a token that is not learned."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one sequence; those from `learned_from` on are learned."""

    token_ids: tuple[int, ...]
    learned_from: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the rows.

    Attributes:
        truncated: sequences whose answer was cut at max_length, and that therefore teach no ending.
        dropped_lines: rows of which nothing was left to learn, because the prompt alone fills max_length.
    """

    rows: int
    examples: int
    held_out: int
    tokens: int
    learned_tokens: int
    longest: int
    truncated: int
    dropped_lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Ready to train on; `sha256` is 64 hexadecimal digits over the file."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    report: DataReport
    sha256: str


def prepare(path: Path, encoder: "RowEncoder", *, held_out_fraction: float, seed: int) -> TrainingData:
    """Reads, splits and encodes a file of rows.

    Raises:
        DataError: the file cannot be read, a row is malformed, or nothing is left to learn.
    """
    rows = read_rows(path)
    train_rows, held_out_rows = split(rows, held_out_fraction, seed)
    train, held_out = encoder.encode_all(train_rows), encoder.encode_all(held_out_rows)
    if not train:
        raise DataError(f"{path}: no row leaves anything to learn; raise max_length or give more rows")
    every = train + held_out
    report = DataReport(
        rows=len(rows),
        examples=len(train),
        held_out=len(held_out),
        tokens=sum(len(example.token_ids) for example in train),
        learned_tokens=sum(len(example.token_ids) - example.learned_from for example in train),
        longest=max(len(example.token_ids) for example in every),
        truncated=encoder.truncated,
        dropped_lines=tuple(encoder.dropped_lines),
    )
    return TrainingData(train, held_out, report, file_sha256(path))


def file_sha256(path: Path) -> str:
    """64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RowEncoder:
    """Turns rows into examples with a base's tokenizer and chat template.

    Args:
        tokenizer: of the base.
        chat_template: Jinja source; None if the base has none, and then a prompt is plain text.
        eos_token_ids: tokens at which the server ends an answer.
        max_length: tokens of the longest example; longer ones are cut.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None, eos_token_ids: frozenset[int], max_length: int
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._max_length = max_length
        self.end_id = self._end_of_answer(eos_token_ids)
        self.truncated = 0
        self.dropped_lines: list[int] = []

    def encode_all(self, rows: Iterable[Row]) -> tuple[Example, ...]:
        """Every example of every row, each at most max_length long."""
        return tuple(
            fitted
            for row in rows
            for example in self.encode(row)
            if (fitted := self._fitted(row, example)) is not None
        )

    def encode(self, row: Row) -> list[Example]:
        """One example per answer, at its full length."""
        if row.text:
            return [Example((*self._ids(row.text, special=True), self.end_id), 0)]
        answers = [index for index, turn in enumerate(row.messages) if turn["role"] == "assistant"]
        return [self._answer(row, index) for index in answers]

    def prompt_ids(self, messages: Sequence[Message], *, line: int = 0) -> tuple[int, ...]:
        """What the server would compute before the answer to these messages."""
        if self._chat_template is None:
            return self._ids(_plain_prompt(messages, line), special=True)
        try:
            text = self._rendered(messages, up_to_the_answer=True)
        except Exception as error:  # a template is data, and can fail in any way
            raise DataError(f"line {line}: the base's chat template refuses it: {error}") from None
        return self._ids(text, special=False)  # the template wrote the special tokens itself

    def _rendered(self, messages: Sequence[Message], *, up_to_the_answer: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages),
            chat_template=self._chat_template,
            add_generation_prompt=up_to_the_answer,
            tokenize=False,
        )
        return text

    def _answer(self, row: Row, index: int) -> Example:
        prompt = self.prompt_ids(row.messages[:index], line=row.line)
        answer = self._ids(row.messages[index]["content"], special=False)
        return Example((*prompt, *answer, self.end_id), len(prompt))

    def _fitted(self, row: Row, example: Example) -> Example | None:
        if len(example.token_ids) <= self._max_length:
            return example
        if example.learned_from >= self._max_length:
            self.dropped_lines.append(row.line)
            return None
        self.truncated += 1
        return Example(example.token_ids[: self._max_length], example.learned_from)

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _end_of_answer(self, eos_token_ids: frozenset[int]) -> int:
        """The token that the template writes after an answer if the server stops at it, else plain EOS.

        Llama 3 ends turns with <|eot_id|>, which is not its tokenizer's EOS: learned is what is rendered.
        """
        if self._chat_template is not None:
            chat = (turn("user", "question"), turn("assistant", "answer"))
            _, _, after = self._rendered(chat, up_to_the_answer=False).rpartition("answer")
            for token in self._ids(after, special=False):
                if token in eos_token_ids:
                    return token
        return self._plain_eos(eos_token_ids)

    def _plain_eos(self, eos_token_ids: frozenset[int]) -> int:
        eos = self._tokenizer.eos_token_id
        if eos is not None:
            return int(eos)
        if not eos_token_ids:
            raise DataError("the base has no token that ends an answer; set eos_token in its tokenizer")
        return min(eos_token_ids)


def _plain_prompt(messages: Sequence[Message], line: int) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise DataError(
            f"line {line}: the base has no chat template and cannot render a chat; give prompt + completion"
        )
    return messages[0]["content"]


class Collator:
    """Puts examples into one batch, padded on the left so that all answers end in the last column.

    Args:
        pad_id: any token; it is masked wherever it pads, so it may be the one that ends answers.
        answers_only: whether the model computes logits of the last columns alone (`logits_to_keep`): the
            output head is a fifth of a small model, and most columns are prompts.
    """

    def __init__(self, pad_id: int, *, answers_only: bool) -> None:
        self._pad_id = pad_id
        self._answers_only = answers_only

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | int]:
        examples = [Example(tuple(f["input_ids"]), f["learned_from"]) for f in features]
        width = max(len(example.token_ids) for example in examples)
        input_ids = torch.tensor([self._row(e.token_ids, width, self._pad_id) for e in examples])
        mask = torch.tensor([self._row([1] * len(e.token_ids), width, 0) for e in examples])
        labels = torch.tensor([self._row(_labels(e), width, IGNORED) for e in examples])
        batch: dict[str, Tensor | int] = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "labels": labels,
        }
        if self._answers_only:
            # The logits before an answer's first token are needed too: they predict it.
            keep = min(width, 1 + max(len(e.token_ids) - e.learned_from for e in examples))
            batch |= {"labels": labels[:, -keep:], "logits_to_keep": keep}
        return batch

    @staticmethod
    def _row(values: Sequence[int], width: int, filler: int) -> list[int]:
        return [filler] * (width - len(values)) + list(values)


def _labels(example: Example) -> list[int]:
    return [IGNORED] * example.learned_from + list(example.token_ids[example.learned_from :])


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples as the Trainer wants them; it groups rows of like length by `input_ids`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        return {"input_ids": example.token_ids, "learned_from": example.learned_from}
