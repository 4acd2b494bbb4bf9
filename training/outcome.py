"""Owns what a run leaves behind: the adapter's folder, and the report and curve beside it. Trains nothing."""

import importlib.metadata
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Final

from peft import PeftModel

from adapters.base import Base
from adapters.bundle import Bundle
from adapters.cache import publish_folder
from adapters.facts import AdapterFacts
from adapters.files import ADAPTER_FILES, BUNDLE_FILE
from adapters.validate import validate_adapter
from training.canary import probe_prompts, record_canary
from training.curve import draw_loss_curve
from training.data import TrainingData
from training.fitting import Fit
from training.recipe import Recipe

REPORT_FILE: Final = "training.json"
CURVE_FILE: Final = "loss.png"

_PACKAGES: Final = ("quickchange", "torch", "transformers", "peft", "bitsandbytes")


def artefacts_folder(out: Path) -> Path:
    """Where the report and the curve of an adapter's training lie."""
    return out.with_name(f"{out.name}.training")


def write_outcome(
    model: PeftModel, base: Base, data: TrainingData, recipe: Recipe, fit: Fit, events: Path
) -> tuple[AdapterFacts, Path]:
    """Writes OUT.training and OUT; returns the adapter as a server would find it, and OUT.training.

    Args:
        events: a folder of event files that moves into OUT.training, if it is there.
    """
    facts: list[AdapterFacts] = []

    def report(staged: Path) -> None:
        _save_artefacts(staged, base, data, recipe, fit)
        if events.is_dir():
            shutil.copytree(events, staged / events.name)

    def adapter(staged: Path) -> None:
        _save_adapter(model, base, data, recipe, staged)
        facts.append(validate_adapter(staged, base.layout, max_rank=recipe.rank))

    artefacts = artefacts_folder(recipe.out)
    recipe.out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(artefacts, ignore_errors=True)  # of a run that ended before its adapter was there
    publish_folder(artefacts, report)
    publish_folder(recipe.out, adapter)
    return facts[0], artefacts


def _save_adapter(model: PeftModel, base: Base, data: TrainingData, recipe: Recipe, folder: Path) -> None:
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base.name  # not where it lies on this machine
    config.target_modules = sorted(config.target_modules)  # PEFT's set would come in another order each time
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    for path in folder.iterdir():
        if path.name not in ADAPTER_FILES:  # PEFT's model card, a form to be filled in
            path.unlink()
    prompts = probe_prompts(data.train, recipe.canary_probes, max_context_tokens=base.max_context_tokens)
    bundle = Bundle(
        base_fingerprint=base.fingerprint,
        chat_template=base.chat_template,
        data_sha256=data.sha256,
        seed=recipe.seed,
        canary=record_canary(model, base, prompts),
    )
    (folder / BUNDLE_FILE).write_text(bundle.to_json())


def _save_artefacts(folder: Path, base: Base, data: TrainingData, recipe: Recipe, fit: Fit) -> None:
    report = {
        "format": 1,
        "recipe": recipe.to_mapping(),
        "base": {"name": base.name, "fingerprint": base.fingerprint, "quantization": base.quantization},
        "data": asdict(data.report) | {"sha256": data.sha256, "eval_sha256": data.eval_sha256},
        "fit": asdict(fit) | {"tokens_per_s": fit.tokens_per_s, "final_loss": fit.final_loss},
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    learned = f"{data.report.train.rows} rows, {fit.steps} steps"
    title = f"{recipe.out.name}: {recipe.method} r={recipe.rank}, {learned}"
    draw_loss_curve(fit.losses, fit.evals, folder / CURVE_FILE, title=title)
