"""Owns the way from rows to token ids: rendering, what is learned, what is cut. Knows no batches.

Every row but plain text is a chat, rendered by the base's chat template up to where an answer begins, just as
the server renders a chat: the model sees the same tokens in training and in service. Unless all is asked for,
only answers are learned, and after each the token that ends it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from training.errors import DataError
from training.readers import Place
from training.recipe_checks import LossOn, TooLong
from training.rows import Message, Row, shortened, turn

Span = tuple[int, int]
"""First position and the one after the last."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one sequence; those within the spans are learned. Spans are ascending and never empty.

    No span begins at 0: nothing comes before the first token that could predict it.
    """

    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def learned_from(self) -> int:
        """Tokens before the first one that is learned."""
        return self.spans[0][0]

    @property
    def learned_tokens(self) -> int:
        return sum(end - begin for begin, end in self.spans)

    def cut(self, length: int) -> "Example | None":
        """Its beginning; None if nothing of that is learned."""
        spans = tuple((begin, min(end, length)) for begin, end in self.spans if begin < length)
        return Example(self.token_ids[:length], spans) if spans else None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of some rows.

    Attributes:
        examples: none longer than max_length.
        lengths: tokens of every example before any was cut or dropped.
        cut: rows that are there in part.
        dropped: rows of which nothing is left.
    """

    examples: tuple[Example, ...]
    lengths: tuple[int, ...]
    cut: tuple[Place, ...]
    dropped: tuple[Place, ...]


class RowEncoder:
    """Turns rows into examples with a base's tokenizer and chat template.

    Args:
        tokenizer: of the base.
        chat_template: Jinja source; None if the base has none, and then a prompt is plain text.
        eos_token_ids: tokens at which the server ends an answer.
        max_length: tokens of the longest example.
        loss_on: "completions" learns answers alone, "all" every token of a chat.
        on_too_long: what becomes of a row with a longer example.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None,
        eos_token_ids: frozenset[int],
        max_length: int,
        *,
        loss_on: LossOn = "completions",
        on_too_long: TooLong = "cut",
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.max_length = max_length
        self._loss_on = loss_on
        self._on_too_long = on_too_long
        self.end_id = self._end_of_answer(eos_token_ids)

    def encode_all(self, rows: Iterable[Row]) -> Encoded:
        """Every example of every row, each at most max_length long.

        Raises:
            DataError: a template refuses a row, or a row is too long and may not be.
        """
        examples: list[Example] = []
        lengths: list[int] = []
        cut: list[Place] = []
        dropped: list[Place] = []
        for row in rows:
            whole = self.encode(row)
            lengths += [len(example.token_ids) for example in whole]
            fits = all(len(example.token_ids) <= self.max_length for example in whole)
            fitted = whole if fits else self._fitted(whole)
            examples += fitted
            if not fits:
                (cut if fitted else dropped).append(row.place)
        if self._on_too_long == "fail" and dropped:
            raise DataError(
                f"{shortened([str(place) for place in dropped])}: longer than max_length {self.max_length}, "
                f"the longest {max(lengths)} tokens; raise it, or let on_too_long cut or drop them"
            )
        return Encoded(tuple(examples), tuple(lengths), tuple(cut), tuple(dropped))

    def encode(self, row: Row) -> list[Example]:
        """A row at its full length: one example, or several where its answers cannot share one."""
        if row.text:
            ids = (*self._ids(row.text, special=True), self.end_id)
            return [Example(ids, ((1, len(ids)),))]
        answers = [index for index, turn in enumerate(row.messages) if turn["role"] == "assistant"]
        if self._loss_on == "all":
            ids = self._answer(row, answers[-1]).token_ids
            return [Example(ids, ((1, len(ids)),))]
        return _joined(self._answer(row, index) for index in answers)

    def prompt_ids(self, messages: Sequence[Message], *, place: Place | None = None) -> tuple[int, ...]:
        """What the server would compute before the answer to these messages."""
        where = place or "a chat"
        if self._chat_template is None:
            return self._ids(_plain_prompt(messages, where), special=True)
        try:
            text = self._rendered(messages, up_to_the_answer=True)
        except Exception as error:  # a template is data, and can fail in any way
            raise DataError(f"{where}: the base's chat template refuses it: {error}") from None
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
        prompt = self.prompt_ids(row.messages[:index], place=row.place)
        answer = self._ids(row.messages[index]["content"], special=False)
        ids = (*prompt, *answer, self.end_id)
        return Example(ids, ((max(1, len(prompt)), len(ids)),))

    def _fitted(self, whole: Sequence[Example]) -> list[Example]:
        if self._on_too_long != "cut":
            return []
        cuts = (example.cut(self.max_length) for example in whole)
        return [example for example in cuts if example is not None]

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _end_of_answer(self, eos_token_ids: frozenset[int]) -> int:
        """The token that the template writes after an answer if the server stops at it, else plain EOS.

        Llama 3 ends turns with <|eot_id|>, which is not its tokenizer's EOS: learned is what is rendered.
        """
        for token in self._after_an_answer():
            if token in eos_token_ids:
                return token
        return self._plain_eos(eos_token_ids)

    def _after_an_answer(self) -> tuple[int, ...]:
        if self._chat_template is None:
            return ()
        chat = (turn("user", "question"), turn("assistant", "answer"))
        try:
            _, _, after = self._rendered(chat, up_to_the_answer=False).rpartition("answer")
        except Exception as error:  # a template is data, and can fail in any way
            raise DataError(f"the base's chat template refuses a question and its answer: {error}") from None
        return self._ids(after, special=False)

    def _plain_eos(self, eos_token_ids: frozenset[int]) -> int:
        eos = self._tokenizer.eos_token_id
        if eos is not None:
            return int(eos)
        if not eos_token_ids:
            raise DataError("the base has no token that ends an answer; set eos_token in its tokenizer")
        return min(eos_token_ids)


def _joined(answers: Iterable[Example]) -> list[Example]:
    """Answers of one chat, in as few examples as show each the very tokens that the server would.

    Where a later prompt begins with all of an earlier answer's sequence, both are learned in one pass. Where
    the template renders past answers otherwise (trimmed, without their reasoning, with another end), they
    stay apart.
    """
    joined: list[Example] = []
    for answer in answers:
        before = joined[-1] if joined else None
        prompt = answer.token_ids[: answer.learned_from]
        if before is not None and prompt[: len(before.token_ids)] == before.token_ids:
            joined[-1] = Example(answer.token_ids, before.spans + answer.spans)
        else:
            joined.append(answer)
    return joined


def _plain_prompt(messages: Sequence[Message], where: object) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise DataError(
            f"{where}: the base has no chat template and cannot render a chat; give prompt + completion"
        )
    return messages[0]["content"]
