"""How an evaluation reads: a table, and a page with the answers side by side. Measures nothing."""

from training.comparison import Difference, Figure
from training.document import facts
from training.evaluation import Evaluation
from training.intervals import Interval
from training.markdown import cell, table_lines
from training.metrics import METRICS

SHOWN_ROWS = 20


def table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each metric with its interval, of both, and the difference."""
    theirs = {figure.name: figure for figure in evaluation.their_figures}
    deltas = {difference.name: difference for difference in evaluation.differences}
    header = ["metric", evaluation.ours.name]
    if evaluation.theirs is not None:
        header += [evaluation.theirs.name, "difference", "better/worse/same"]
    rows = []
    for figure in evaluation.figures:
        row = [METRICS[figure.name].title, _figure(figure)]
        if evaluation.theirs is not None:
            row += [_figure(theirs[figure.name]), *_difference(deltas[figure.name])]
        rows.append(row)
    return header, rows


def source(evaluation: Evaluation) -> str:
    """One line: who answered."""
    return f"answers: {facts(evaluation.about.get('answers', 'from nobody knows where'))}"


def page(evaluation: Evaluation) -> str:
    """evaluation.md."""
    header, rows = table(evaluation)
    against = "" if evaluation.theirs is None else f" and {evaluation.theirs.name}"
    lines = [
        f"# {evaluation.ours.name}{against} on {len(evaluation.cases)} rows",
        "",
        *(f"- {name}: {facts(value)}" for name, value in evaluation.about.items()),
        "- intervals: 95 %, Wilson's for rates, else a bootstrap over rows; differences are paired by row",
        "",
        *table_lines(header, rows),
        "",
        f"## Answers, side by side ({min(SHOWN_ROWS, len(evaluation.cases))} rows)",
        "",
        *(
            line
            for index in range(min(SHOWN_ROWS, len(evaluation.cases)))
            for line in _row(evaluation, index)
        ),
    ]
    return "\n".join(lines) + "\n"


def _row(evaluation: Evaluation, index: int) -> list[str]:
    case = evaluation.cases[index]
    said = [("question", case.question), ("reference", case.reference)]
    said.append((evaluation.ours.name, evaluation.ours.answers[index].text))
    if evaluation.theirs is not None:
        said.append((evaluation.theirs.name, evaluation.theirs.answers[index].text))
    if index < len(evaluation.base_answers):
        said.append(("base", evaluation.base_answers[index].text))
    cells = [[who, cell(text)] for who, text in said]
    return [f"### {case.place}", "", *table_lines(["", "text"], cells), ""]


def _figure(figure: Figure) -> str:
    return f"{_number(figure.value)} {_span(figure.interval)}"


def _difference(difference: Difference) -> list[str]:
    sign = "+" if difference.value > 0 else ""
    tally = f"{difference.wins}/{difference.losses}/{difference.ties}"
    return [
        f"{sign}{_number(difference.value)} {_span(difference.interval)}",
        "" if METRICS[difference.name].better == "neither" else tally,
    ]


def _span(interval: Interval) -> str:
    return f"[{_number(interval.low)}, {_number(interval.high)}]"


def _number(value: float) -> str:
    return f"{value:.4g}"
