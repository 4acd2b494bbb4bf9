"""How an evaluation reads: a table, and a page with the answers side by side. Measures nothing."""

from collections.abc import Sequence

from training.comparison import Difference, Figure
from training.evaluation import Evaluation
from training.intervals import Interval
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
    return f"answers: {_facts(evaluation.about.get('answers', 'from nobody knows where'))}"


def page(evaluation: Evaluation) -> str:
    """evaluation.md."""
    header, rows = table(evaluation)
    against = "" if evaluation.theirs is None else f" and {evaluation.theirs.name}"
    lines = [
        f"# {evaluation.ours.name}{against} on {len(evaluation.cases)} rows",
        "",
        *(f"- {name}: {_facts(value)}" for name, value in evaluation.about.items()),
        "- intervals: 95 %, Wilson's for rates, else a bootstrap over rows; differences are paired by row",
        "",
        *_markdown_table(header, rows),
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
    cells = [[who, _cell(text)] for who, text in said]
    return [f"### {case.place}", "", *_markdown_table(["", "text"], cells), ""]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _cell(text: str) -> str:
    """Text that shows as it is, on one line of a table."""
    shown = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for mark in "|*_`[]":
        shown = shown.replace(mark, f"\\{mark}")
    return "<br>".join(shown.splitlines()) or "(nothing)"


def _facts(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_facts(member)}" for name, member in value.items())
    return str(value)


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
