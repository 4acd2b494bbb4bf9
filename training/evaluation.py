"""Owns an evaluation: who answered what, every figure, and how one compares with another. Asks nobody.

The same rows are drawn in every bootstrap, so that figures of one run can be compared with each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.cases import Answer, Case
from training.comparison import (
    Difference,
    Figure,
    differences,
    figures,
    plain_difference,
    plain_figure,
)
from training.intervals import CONFIDENCE, RESAMPLES, Resampling
from training.metrics import RowLoss, measure, signatures


@dataclass(frozen=True, slots=True)
class Answered:
    """One model's answers to all cases.

    Attributes:
        name: "sql@3", a folder's name, or "base".
        losses: of the reference answers; None if they were not computed.
    """

    name: str
    answers: Sequence[Answer]
    losses: Sequence[RowLoss] | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """
    Attributes:
        about: where rows, answers and losses are from, as JSON has it.
        base_answers: of the first rows, where neither of the two compared is the base.
    """

    cases: Sequence[Case]
    ours: Answered
    theirs: Answered | None
    figures: Sequence[Figure]
    their_figures: Sequence[Figure]
    differences: Sequence[Difference]
    about: Mapping[str, Any] = field(default_factory=dict)
    base_answers: Sequence[Answer] = ()

    def to_mapping(self) -> dict[str, Any]:
        """Plain values: evaluation.json."""
        mapping: dict[str, Any] = {
            "format": 1,
            **self.about,
            "statistics": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "sacrebleu": signatures()},
            "model": {"name": self.ours.name, "metrics": _by_name(self.figures)},
        }
        if self.theirs is not None:
            mapping["against"] = {"name": self.theirs.name, "metrics": _by_name(self.their_figures)}
            mapping["differences"] = {item.name: plain_difference(item) for item in self.differences}
        return mapping | {"rows": [self._row(index) for index in range(len(self.cases))]}

    def _row(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        row: dict[str, Any] = {
            "place": str(case.place),
            "question": case.question,
            "reference": case.reference,
            "answer": self.ours.answers[index].text,
        }
        if self.theirs is not None:
            row["answer_against"] = self.theirs.answers[index].text
        if index < len(self.base_answers):
            row["answer_base"] = self.base_answers[index].text
        return row


def evaluate(
    cases: Sequence[Case],
    ours: Answered,
    theirs: Answered | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    base_answers: Sequence[Answer] = (),
) -> Evaluation:
    """Every figure of one model's answers, and of another's if there is one."""
    references = [case.reference for case in cases]
    resampling = Resampling(len(cases))
    samples = measure(references, ours.answers, ours.losses)
    others = [] if theirs is None else measure(references, theirs.answers, theirs.losses)
    return Evaluation(
        cases=cases,
        ours=ours,
        theirs=theirs,
        figures=figures(samples, resampling),
        their_figures=figures(others, resampling),
        differences=differences(samples, others, resampling),
        about=about or {},
        base_answers=base_answers,
    )


def _by_name(measured: Sequence[Figure]) -> dict[str, Any]:
    return {figure.name: plain_figure(figure) for figure in measured}
