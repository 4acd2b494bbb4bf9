"""Owns a training run from recipe to result. Knows no commands and no demo.

Afterwards there are two folders, each of which appears complete or not at all:

OUT            an adapter: adapter_config.json, adapter_model.safetensors, quickchange.json; of method full a
               model folder; and README.md, its model card
OUT.training   how it came about: training.json, TensorBoard's event files

At last, whether an upload succeeded or not, OUT.training gets loss.png.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import set_seed

from adapters.base import Base, load_base
from adapters.facts import AdapterFacts
from adapters.quantize import Scheme
from adapters.text import BaseText, load_text
from training.attaching import attached, check_attachable
from training.cases import Case
from training.data import TrainingData, prepare
from training.data_report import DataReport
from training.encoding import RowEncoder
from training.errors import RecipeError
from training.fitting import Fit, fit
from training.footprint import Footprint
from training.foresight import MemoryReport, compared, foresee
from training.notices import notices
from training.outcome import add_to_report, artefacts_folder, write_curve, write_outcome
from training.processes import Processes, joined
from training.products import name_of, products_dtype
from training.promotion import Promotion, promote, promotion_cases
from training.provenance import manifest_of
from training.publish import Resident, check_resident, publish_adapter, resident_at
from training.recipe import WITHOUT_EFFECT, Recipe
from training.recorder import check_trackers
from training.rehearsal import Rehearsal
from training.stopwatch import Stopwatch
from training.unfinished import Start, UnfinishedRun, opened_run

log = logging.getLogger(__name__)

_SLACK_TOKENS: Final = 16
"""An answer may be so much longer than the longest reference when versions are compared."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished run.

    Attributes:
        out: the result's folder.
        artefacts: the folder with training.json and loss.png.
        facts: of the adapter, as a server would find them; None of what no server applies.
        memory: what was predicted of the run, and what it took.
        published: "name@version" on the server; None if it was not uploaded.
        promotion: whether an alias moved to it, and why; None if that was not asked for.
    """

    out: Path
    artefacts: Path
    facts: AdapterFacts | None
    data: DataReport
    fit: Fit
    memory: MemoryReport
    published: str | None
    promotion: Promotion | None = None


def train(
    recipe: Recipe,
    base: Base | None = None,
    *,
    start: Start = "new",
    stop: threading.Event | None = None,
    progress: bool = True,
    on_data: Callable[[DataReport], None] = lambda _: None,
) -> TrainingResult:
    """Trains by the recipe's method and writes what comes of it to recipe.out.

    Called in each of the processes that `accelerate launch` started, they train together: every one computes
    its share, the main one writes, publishes and shows progress, and all return or raise alike. What only the
    main one knows is None in the others' results.

    Args:
        base: loaded with purpose="train", as the recipe wants it, so that several runs can share it; None
            loads recipe.base. It is given back as it was.
        start: what to do if an earlier run towards recipe.out left a checkpoint: "new" refuses, "resume" goes
            on from it, exactly as if it had never stopped, "restart" removes it. Without one all three begin.
        stop: ends the run after its step, with a checkpoint, once it is set.
        progress: whether there is a bar with the loss on standard error.
        on_data: is told of the data before the first step.

    Raises:
        TrainingError: recipe or data are wrong, the loss is no number, the run was stopped, or the server
            refuses the adapter.
        BaseModelError: the base cannot be loaded.
        FileExistsError: recipe.out exists.
    """
    processes = joined(recipe.device)
    progress = progress and processes.is_main
    resident, cases = processes.alone(lambda: _preflight(recipe)) or (None, [])
    with opened_run(recipe.out, start, processes) as run:
        loaded = processes.together(lambda: base or _load(recipe, progress))
        said = processes.together(lambda: _checked(recipe, loaded, resident))
        _tell(said if processes.is_main else [])
        since_step = Stopwatch()
        stop = stop or threading.Event()
        result = _run(recipe, loaded, run, processes, stop, said, since_step, progress, on_data)
        run.finished()
    published = processes.alone(lambda: _published(recipe, result, since_step, progress))
    result = replace(result, published=published)
    promotion = processes.alone(lambda: _promote(recipe, loaded, result, cases, progress))
    return replace(result, promotion=promotion)


def _preflight(recipe: Recipe) -> tuple[Resident | None, list[Case]]:
    """What can be refused before anything is loaded; the server to publish to, the rows that decide there."""
    _check_out(recipe)
    check_trackers(recipe.trackers)
    return resident_at(recipe), promotion_cases(recipe)


def _run(
    recipe: Recipe,
    base: Base,
    run: UnfinishedRun,
    processes: Processes,
    stop: threading.Event,
    said: list[str],
    since_step: Stopwatch,
    progress: bool,
    on_data: Callable[[DataReport], None],
) -> TrainingResult:
    """Everything from the first row to the result on disk."""
    data = processes.together(lambda: prepare(recipe, _encoder(recipe, base), processes.count))
    if processes.is_main:
        on_data(data.report)
    products = processes.from_main(_products(recipe, base, run))
    identity = _identity(recipe, base, data, products, processes)
    processes.together(lambda: _check_alike(processes.gathered(identity)))
    processes.alone(lambda: run.identify(identity))
    foreseen = processes.together(lambda: foresee(recipe, base, data, products, processes.count))
    footprint = Footprint.begin(base.device)
    set_seed(recipe.seed)
    rehearsal = Rehearsal(base, data, recipe, records=processes.is_main)
    with attached(base, recipe, products) as trainee:
        fitted = fit(
            trainee.model,
            base,
            data,
            recipe,
            products,
            run,
            processes,
            progress=progress,
            stop=stop,
            since_step=since_step,
            rehearsal=rehearsal,
        )
        memory = compared(foreseen, footprint, fitted.peak_memory_bytes)
        outcome = processes.alone(
            lambda: write_outcome(
                trainee.settled(), base, data, recipe, fitted, said, run.events, since_step, rehearsal
            )
        )
    processes.alone(lambda: add_to_report(artefacts_folder(recipe.out), {"memory": asdict(memory)}))
    return TrainingResult(
        out=recipe.out,
        artefacts=artefacts_folder(recipe.out),
        facts=None if outcome is None else outcome.facts,
        data=data.report,
        fit=fitted,
        memory=memory,
        published=None,
    )


def _checked(recipe: Recipe, base: Base, resident: Resident | None) -> list[str]:
    """Refuses, before a row is read, what cannot come to anything; returns what was said besides."""
    _check_fits(base, recipe)
    check_attachable(base, recipe)
    if recipe.kind.saved is not None:
        manifest_of(base)
    if resident is not None:
        check_resident(recipe, resident, base)
    return notices(recipe, base)


def _tell(said: Sequence[str]) -> None:
    for notice in said:
        log.warning(notice)


def _products(recipe: Recipe, base: Base, run: UnfinishedRun) -> torch.dtype:
    """As the run that goes on had them: measured anew, "auto" might choose the other type."""
    recorded = run.recorded().get("products") if run.checkpoint is not None else None
    return products_dtype(recipe, base) if recorded is None else getattr(torch, recorded)


def _identity(
    recipe: Recipe, base: Base, data: TrainingData, products: torch.dtype, processes: Processes
) -> dict[str, Any]:
    """What must be the same for a run to go on: all that its losses depend on."""
    settings = {name: value for name, value in recipe.to_mapping().items() if name not in WITHOUT_EFFECT}
    return settings | {
        "base": base.fingerprint,
        "data": data.sha256,
        "eval_data": data.eval_sha256,
        "products": name_of(products),
        "processes": processes.count,
    }


def _check_alike(identities: Sequence[dict[str, Any]]) -> None:
    """Raises RecipeError if the processes of a run would not learn the same from the same."""
    for rank, other in enumerate(identities):
        for name, value in identities[0].items():
            if other[name] != value:
                raise RecipeError(
                    f"process {rank} has {name} {other[name]!r}, process 0 {value!r}; launch all with the "
                    "same recipe and files"
                )


def examine(recipe: Recipe, progress: bool = True) -> DataReport:
    """What training would say of its data before the first step; no weights are loaded, nothing is written.

    Raises:
        TrainingError: recipe or data are wrong.
        BaseModelError: the base cannot be read.
        FileExistsError: recipe.out exists.
    """
    _check_out(recipe)
    return prepare(recipe, _encoder(recipe, load_text(recipe.base, progress=progress))).report


def _check_out(recipe: Recipe) -> None:
    if recipe.out.exists():
        raise FileExistsError(f"{recipe.out} exists already; remove it or choose another --out")


def _load(recipe: Recipe, progress: bool) -> Base:
    return load_base(
        recipe.base,
        purpose="train",
        quantization=recipe.base_quantization,
        double_quantization=recipe.quantizes_scales,
        dtype="float32" if recipe.kind.family == "own_weights" else "auto",
        device=recipe.device,
        progress=progress,
    )


def _check_fits(base: Base, recipe: Recipe) -> None:
    wanted = Scheme(recipe.base_quantization, recipe.quantizes_scales)
    if base.scheme.name != wanted.name:
        raise RecipeError(
            f"method {recipe.method} trains on quantization {wanted.name}, the base given has "
            f"{base.scheme.name}"
        )


def _encoder(recipe: Recipe, text: Base | BaseText) -> RowEncoder:
    learned = recipe.virtual_tokens if "virtual_tokens" in recipe.kind.settings else 0
    return RowEncoder(
        text.tokenizer,
        text.chat_template,
        text.eos_token_ids,
        min(recipe.max_length, text.max_context_tokens - learned),
        loss_on=recipe.loss_on,
        on_too_long=recipe.on_too_long,
    )


def _published(recipe: Recipe, result: TrainingResult, since_step: Stopwatch, progress: bool) -> str | None:
    """Publishes, if that is wanted, and only then draws the curve: whether the server took it or not."""
    try:
        return _publish(recipe, result.artefacts, since_step, progress)
    finally:
        write_curve(result.artefacts, recipe, result.data, result.fit)


def _publish(recipe: Recipe, artefacts: Path, since_step: Stopwatch, progress: bool) -> str | None:
    if recipe.publish is None or recipe.name is None:
        return None
    since_step.lap("tidy")
    reference = publish_adapter(recipe.out, recipe.publish, recipe.name, since_step, progress=progress)
    seconds = {"total": since_step.seconds, **since_step.parts}
    add_to_report(artefacts, {"seconds_to_first_token": seconds})
    return reference


def _promote(
    recipe: Recipe, base: Base, result: TrainingResult, cases: list[Case], progress: bool
) -> Promotion | None:
    if recipe.promote_if is None or result.published is None:
        return None
    return promote(
        recipe,
        result.published,
        cases,
        result.artefacts,
        max_new_tokens=_SLACK_TOKENS
        + max((len(base.tokenizer(case.reference)["input_ids"]) for case in cases), default=0),
        progress=progress,
    )
