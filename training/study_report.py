"""Owns the report of a study: its sections, and the files they are written to. Measures nothing.

FOLDER/report.md     for repositories; its pictures are the PNGs beside it
FOLDER/report.html   the same in one file, for sending
FOLDER/results.json  every number, losses of all steps included
FOLDER/results.csv   a line for each run
FOLDER/*.png
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import yaml  # type: ignore[import-untyped]  # PyYAML carries no types

from training import study_notes
from training.document import Block, Code, Document, Heading, Items, Paragraph, Picture, facts
from training.html_page import html_page
from training.markdown import markdown
from training.metrics import Metric
from training.quantities import rate
from training.study_findings import headline, memory_findings
from training.study_groups import Group, known_scores, measured_groups, trials_by_method
from training.study_metrics import shown_metrics
from training.study_plots import draw_plots
from training.study_result import StudyResult
from training.study_tables import (
    cost_table,
    csv_text,
    quality_table,
    relative_table,
    trials_table,
    undone_table,
)

REPORT_MD: Final = "report.md"
REPORT_HTML: Final = "report.html"
RESULTS_JSON: Final = "results.json"
RESULTS_CSV: Final = "results.csv"


def write_study_report(result: StudyResult, folder: Path) -> None:
    """Writes all files of the report into a folder that is there and empty; nothing is synced to the disk.

    Names and values of data, base, machine and settings are shown as they are.
    """
    measured = [cell.measured for cell in result.cells if cell.measured is not None]
    metrics = shown_metrics([*map(known_scores, measured), result.base_scores])
    pictures = draw_plots(result, metrics, folder)
    document = Document(result.title, _blocks(result, metrics, pictures))
    _write(folder / REPORT_MD, markdown(document))
    _write(folder / REPORT_HTML, html_page(document, folder))
    _write(folder / RESULTS_JSON, json.dumps(result.to_mapping(), indent=1, ensure_ascii=False) + "\n")
    _write(folder / RESULTS_CSV, csv_text(result))


def _blocks(result: StudyResult, metrics: Sequence[Metric], pictures: Mapping[str, Picture]) -> list[Block]:
    groups = measured_groups(result.cells)
    blocks: list[Block] = [Paragraph(_about(result)), Items(_setting(result))]
    if groups:
        blocks += _findings(result, groups, metrics)
        blocks += _quality(result, groups, metrics, pictures)
        blocks += _costs(groups)
        blocks += _relative(groups, metrics)
        blocks += _memory(result, pictures)
        blocks += _learning(pictures)
    else:
        blocks.append(Paragraph("No run has been measured yet: there is nothing to compare."))
    blocks += _undone(result)
    blocks += _rates(result, pictures)
    settings = json.loads(json.dumps(dict(result.settings), default=str))
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return [*blocks, Heading("Settings"), Code(text, "yaml")]


def _about(result: StudyResult) -> str:
    methods = dict.fromkeys(cell.method for cell in result.cells)
    done = sum(cell.measured is not None for cell in result.cells)
    planned = len(result.cells) + len(result.missing)
    compared = f"{', '.join(methods) or 'No method'} on {result.base.get('name', 'one base')}"
    return f"{compared}: {done} of {planned} runs are done. {_equal_terms(result)}"


def _equal_terms(result: StudyResult) -> str:
    """What the runs have in common, as far as the results show it."""
    steps = {cell.measured.steps for cell in result.cells if cell.measured is not None}
    taken = f"{min(steps)} to {max(steps)}" if len(steps) > 1 else "".join(map(str, steps))
    said = [
        f"Every run learns the same rows{f' in {taken} optimizer steps' if taken else ''}, with the same "
        "epochs, batch size and other settings, and answers the same test rows; only method, rank, modules, "
        "seed and learning rate differ."
    ]
    searched = trials_by_method(result.cells)
    if searched:
        said.append(study_notes.SEARCHED)
    if given := dict.fromkeys(cell.method for cell in result.cells if cell.method not in searched):
        said.append(f"The learning rate of {', '.join(given)} was given.")
    return " ".join(said)


def _setting(result: StudyResult) -> list[tuple[str, str]]:
    shared = result.settings.get("recipe")
    given = {
        "base": result.base,
        "data": result.data,
        "settings of every run": shared,
        "machine": result.machine,
    }
    return [item for name, value in given.items() if value for item in _named_facts(name, value)]


def _named_facts(name: str, value: object) -> list[tuple[str, str]]:
    """What a mapping holds in one item, and each mapping within it in one of its own."""
    if not isinstance(value, Mapping):
        return [(name, str(value))]
    plain = {key: member for key, member in value.items() if not isinstance(member, Mapping)}
    nested = [(f"{name}, {key}", facts(member)) for key, member in value.items() if key not in plain]
    return [(name, facts(plain)), *nested] if plain else nested


def _findings(result: StudyResult, groups: Sequence[Group], metrics: Sequence[Metric]) -> list[Block]:
    seeds = any(len(group.measured) > 1 for group in groups)
    found = headline(groups, metrics, result.base_scores)
    return [
        Heading("What is best"),
        Items(found),
        Paragraph(f"{study_notes.SURE} {study_notes.SEEDS if seeds else study_notes.ONE_RUN}"),
    ]


def _quality(
    result: StudyResult, groups: Sequence[Group], metrics: Sequence[Metric], pictures: Mapping[str, Picture]
) -> list[Block]:
    engines = {cell.measured.engine for cell in result.cells if cell.measured is not None}
    blocks: list[Block] = [Heading("Quality"), quality_table(groups, metrics, result.base_scores)]
    if "reference" in engines:
        blocks.append(Paragraph(study_notes.ENGINES))
    return [*blocks, *_there(pictures, "quality", "quality-time", "quality-memory", "rank")]


def _costs(groups: Sequence[Group]) -> list[Block]:
    return [Heading("Time, memory and size"), cost_table(groups), Paragraph(study_notes.COSTS)]


def _relative(groups: Sequence[Group], metrics: Sequence[Metric]) -> list[Block]:
    if len(groups) < 2:
        return []
    reference = next((group for group in groups if group.method == "full"), groups[0])
    name = "full fine-tuning" if reference.method == "full" else reference.label
    return [
        Heading(f"Against {name}"), relative_table(groups, metrics, reference),
        Paragraph(study_notes.RELATIVE),
    ]  # fmt: skip


def _memory(result: StudyResult, pictures: Mapping[str, Picture]) -> list[Block]:
    measured = {cell.name: cell.measured for cell in result.cells if cell.measured is not None}
    return [
        Heading("Prediction of memory"), Paragraph(study_notes.PREDICTED), Items(memory_findings(measured)),
        *_there(pictures, "memory"),
    ]  # fmt: skip


def _learning(pictures: Mapping[str, Picture]) -> list[Block]:
    return [Heading("How the loss fell"), *_there(pictures, "losses")]


def _undone(result: StudyResult) -> list[Block]:
    table = undone_table(result)
    return [Heading("Failed and missing runs"), table] if table.rows else []


def _rates(result: StudyResult, pictures: Mapping[str, Picture]) -> list[Block]:
    if not trials_by_method(result.cells):
        return []
    blocks: list[Block] = [Heading("Learning rates"), trials_table(result.cells)]
    if edges := _at_edge(result):
        blocks.append(Paragraph(f"{study_notes.EDGE} {', '.join(edges)}."))
    return [*blocks, *_there(pictures, "rates")]


def _at_edge(result: StudyResult) -> list[str]:
    edges = []
    for method, trials in trials_by_method(result.cells).items():
        taken = dict.fromkeys(cell.learning_rate for cell in result.cells if cell.method == method)
        outer = {trials[0].learning_rate, trials[-1].learning_rate}
        edges += [
            f"{method} ({rate(one)})" for one in taken if any(math.isclose(one, edge) for edge in outer)
        ]
    return edges


def _there(pictures: Mapping[str, Picture], *names: str) -> list[Block]:
    return [pictures[name] for name in names if name in pictures]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")
