"""Counts right answers to the questions of a task, leniently: in any wording if need be. Knows no metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

from training.tasks import Question


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers were right.

    Attributes:
        exact: the answer and nothing else, but for case, outer blanks and a full stop.
        mentioned: the answer in any wording: of several labels the first one named counts.
    """

    exact: int
    mentioned: int
    total: int

    def __str__(self) -> str:
        return f"{self.exact}/{self.total} ({self.exact / self.total:.0%})"


def score(questions: Sequence[Question], answers: Sequence[str], labels: Sequence[str] = ()) -> Score:
    """Compares answers with what was expected.

    Args:
        labels: all possible answers, if they are few.
    """
    pairs = list(zip(questions, answers, strict=True))
    return Score(
        exact=sum(is_exact(answer, question.answer) for question, answer in pairs),
        mentioned=sum(is_mentioned(answer, question.gist, labels) for question, answer in pairs),
        total=len(pairs),
    )


def is_exact(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one and nothing else."""
    return _plain(answer) == _plain(expected)


def is_mentioned(answer: str, gist: str, labels: Sequence[str] = ()) -> bool:
    """Whether the answer says it somewhere; of labels only the first that it names counts."""
    text, wanted = answer.casefold(), gist.casefold()
    if not labels:
        return wanted in text
    named = [label.casefold() for label in labels if label.casefold() in text]
    return bool(named) and min(named, key=text.index) == wanted


def _plain(text: str) -> str:
    return text.strip().rstrip(".").rstrip().casefold()
