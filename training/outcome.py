"""Owns what a run leaves behind: the result's folder, and the report and curve beside it. Trains nothing.

The curve comes last, when the adapter is served already: drawing takes long, and nobody waits for it. A run
that is killed before it has left all that it is drawn of in training.json.

Validation and canary are for servers: what no server applies goes without, and training.json says why.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from adapters.base import Base
from adapters.cache import publish_folder
from adapters.canary import Canary
from adapters.facts import AdapterFacts
from adapters.files import BUNDLE_FILE
from adapters.validate import validate_adapter
from training.canary import record_canary
from training.curve import draw_loss_curve
from training.data import TrainingData
from training.data_report import DataReport
from training.fitting import Fit
from training.model_card import Checked, write_model_card
from training.provenance import manifest_of, origin_of
from training.recipe import Recipe
from training.rehearsal import Rehearsal, why_no_canary
from training.saving import save_trained
from training.stopwatch import Stopwatch
from training.versions import installed_versions

REPORT_FILE: Final = "training.json"
CURVE_FILE: Final = "loss.png"


def artefacts_folder(out: Path) -> Path:
    """Where the report and the curve of an adapter's training lie."""
    return out.with_name(f"{out.name}.training")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written.

    Attributes:
        artefacts: the folder with training.json.
        facts: of the adapter, as a server would find them; None of what no server applies.
    """

    artefacts: Path
    facts: AdapterFacts | None


def write_outcome(
    model: Any,
    base: Base,
    data: TrainingData,
    recipe: Recipe,
    fit: Fit,
    said: Sequence[str],
    events: Path,
    since_step: Stopwatch,
    rehearsal: Rehearsal,
) -> Outcome:
    """Writes OUT.training, without the curve, and OUT.

    Args:
        model: settled, as it is to be saved.
        said: notices of this run.
        events: a folder of event files that moves into OUT.training, if it is there.
        since_step: is told what the time goes into.
        rehearsal: of the canary.
    """
    artefacts = artefacts_folder(recipe.out)
    checks: list[tuple[AdapterFacts | None, Checked]] = []

    def report(staged: Path) -> None:
        _save_report(staged, base, data, recipe, fit, said, checks[0][1])
        if events.is_dir():
            shutil.copytree(events, staged / events.name)

    def result(staged: Path) -> None:
        checks.append(_save(model, base, data, recipe, fit, staged, since_step, rehearsal))
        shutil.rmtree(artefacts, ignore_errors=True)  # of a run that ended before its result was there
        publish_folder(artefacts, report)
        since_step.lap("report")

    since_step.lap("finish")
    recipe.out.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(recipe.out, result)
    return Outcome(artefacts, checks[0][0])


def add_to_report(artefacts: Path, facts: Mapping[str, Any]) -> None:
    """Writes more members into training.json, which is whole at every moment."""
    path = artefacts / REPORT_FILE
    staged = path.with_name(f".{REPORT_FILE}")
    staged.write_text(json.dumps(json.loads(path.read_text()) | facts, indent=2) + "\n")
    os.replace(staged, path)


def write_curve(artefacts: Path, recipe: Recipe, learned: DataReport, fit: Fit) -> None:
    """Draws how the loss fell into OUT.training, whole or not at all."""
    rank = "" if recipe.saved_rank is None else f" r={recipe.rank}"
    title = f"{recipe.out.name}: {recipe.method}{rank}, {learned.train.rows} rows, {fit.steps} steps"
    staged = artefacts / f".{CURVE_FILE}"
    draw_loss_curve(fit.losses, fit.evals, staged, title=title)
    os.replace(staged, artefacts / CURVE_FILE)


def _save(
    model: Any,
    base: Base,
    data: TrainingData,
    recipe: Recipe,
    fit: Fit,
    folder: Path,
    since_step: Stopwatch,
    rehearsal: Rehearsal,
) -> tuple[AdapterFacts | None, Checked]:
    save_trained(model, base, recipe, folder)
    since_step.lap("save")
    origin = origin_of(recipe, base, data, fit)
    canary, said = _canary(model, base, recipe, rehearsal)
    if recipe.kind.saved is not None:
        bundle = replace(
            manifest_of(base), data_sha256=data.sha256, seed=recipe.seed, canary=canary, training=origin
        )
        (folder / BUNDLE_FILE).write_text(bundle.to_json())
    since_step.lap("canary")
    facts, checked = _checked(folder, base, recipe, said)
    since_step.lap("check")
    write_model_card(folder, recipe, base, data, origin, checked)
    return facts, checked


def _checked(folder: Path, base: Base, recipe: Recipe, canary: str) -> tuple[AdapterFacts | None, Checked]:
    """What a server would find; none looks at what none applies."""
    if recipe.kind.why_not_served is not None:
        return None, Checked(f"left out: {recipe.kind.why_not_served}", canary)
    assert recipe.saved_rank is not None, "all that is served so far has a rank"
    facts = validate_adapter(folder, base.layout, max_rank=recipe.saved_rank)
    return facts, Checked("passed", canary)


def _canary(model: Any, base: Base, recipe: Recipe, rehearsal: Rehearsal) -> tuple[Canary | None, str]:
    """The canary, and what became of it."""
    why = why_no_canary(base, recipe)
    if why is not None:
        return None, f"left out: {why}"
    canary = record_canary(model, base, rehearsal.prompts, rehearsal.draft)
    return (
        canary,
        "recorded" if canary is not None else "left out: its prompts or its noise leave nothing to compare",
    )


def _save_report(
    folder: Path,
    base: Base,
    data: TrainingData,
    recipe: Recipe,
    fit: Fit,
    said: Sequence[str],
    checks: Checked,
) -> None:
    report = {
        "format": 1,
        "recipe": recipe.to_mapping(),
        "processes": data.report.processes,
        "base": {"name": base.name, "fingerprint": base.fingerprint, "quantization": base.quantization},
        "data": asdict(data.report) | {"sha256": data.sha256, "eval_sha256": data.eval_sha256},
        "fit": asdict(fit) | {"tokens_per_s": fit.tokens_per_s, "final_loss": fit.final_loss},
        "checks": {"validation": checks.validation, "canary": checks.canary},
        "notices": list(said),
        "versions": installed_versions(),
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
