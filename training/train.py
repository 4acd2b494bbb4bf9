"""Owns a training run from recipe to adapter folder. Knows no commands and no demo.

Afterwards there are two folders, each of which appears complete or not at all:

OUT            exactly an adapter: adapter_config.json, adapter_model.safetensors, quickchange.json
OUT.training   how it came about: training.json, loss.png
"""

import importlib.metadata
import json
import math
import resource
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from adapters.base import Base, load_base
from adapters.bundle import Bundle
from adapters.cache import publish_folder
from adapters.facts import AdapterFacts
from adapters.files import ADAPTER_FILES, BUNDLE_FILE
from adapters.validate import validate_adapter
from training.canary import probe_prompts, record_canary
from training.curve import EvalPoint, LossPoint, draw_loss_curve
from training.data import Collator, DataReport, Examples, RowEncoder, TrainingData, prepare
from training.errors import RecipeError
from training.publish import check_server, publish_adapter
from training.qlora import attached, optimizer_name, products_dtype, takes_logits_to_keep
from training.recipe import Recipe
from training.recorder import Recorder

REPORT_FILE: Final = "training.json"
CURVE_FILE: Final = "loss.png"

_PACKAGES: Final = ("quickchange", "torch", "transformers", "peft", "bitsandbytes")
_SCHEDULES: Final = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True, slots=True)
class Fit:
    """What the optimizer did.

    Attributes:
        tokens: that went through the model, padding not counted.
        seconds: of optimization alone, without loading and saving.
        peak_memory_bytes: on CUDA of its allocator, on a CPU of the whole process so far.
    """

    steps: int
    tokens: int
    seconds: float
    trained_parameters: int
    optimizer: str
    products: str
    peak_memory_bytes: int
    losses: tuple[LossPoint, ...]
    evals: tuple[EvalPoint, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(point.loss for point in last) / len(last)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished run.

    Attributes:
        out: the adapter's folder.
        artefacts: the folder with training.json and loss.png.
        facts: of the adapter, as a server would find them.
        published: "name@version" on the server; None if it was not uploaded.
    """

    out: Path
    artefacts: Path
    facts: AdapterFacts
    data: DataReport
    fit: Fit
    published: str | None


def train(recipe: Recipe, base: Base | None = None, progress: bool = True) -> TrainingResult:
    """Trains an adapter and writes it to recipe.out.

    Args:
        base: loaded with purpose="train", as the recipe wants it, so that several runs can share it; None
            loads recipe.base. It is given back without the adapter.
        progress: whether there is a bar with the loss on standard error.

    Raises:
        TrainingError: recipe or data are wrong, the loss is no number, or the server refuses the adapter.
        BaseModelError: the base cannot be loaded.
        FileExistsError: recipe.out exists.
    """
    if recipe.out.exists():
        raise FileExistsError(f"{recipe.out} exists already; remove it or choose another --out")
    base = base or _load(recipe, progress)
    _check_fits(base, recipe)
    if recipe.publish is not None:
        check_server(recipe.publish, base.fingerprint)
    encoder = RowEncoder(base.tokenizer, base.chat_template, base.eos_token_ids, _max_length(base, recipe))
    data = prepare(recipe.data, encoder, held_out_fraction=recipe.eval_fraction, seed=recipe.seed)
    products = products_dtype(recipe, base.device)
    set_seed(recipe.seed)
    with attached(base, recipe, products) as model:
        fit = _fit(model, base, data, recipe, products, progress)
        facts, artefacts = _write(model, base, data, recipe, fit)
    published = _publish(recipe, progress)
    return TrainingResult(recipe.out, artefacts, facts, data.report, fit, published)


def artefacts_folder(out: Path) -> Path:
    """Where the report and the curve of an adapter's training lie."""
    return out.with_name(f"{out.name}.training")


def _load(recipe: Recipe, progress: bool) -> Base:
    return load_base(
        recipe.base,
        purpose="train",
        quantization=recipe.quantization,
        device=recipe.device,
        progress=progress,
    )


def _check_fits(base: Base, recipe: Recipe) -> None:
    if base.quantization != recipe.quantization:
        raise RecipeError(
            f"method {recipe.method} trains on quantization {recipe.quantization}, the base given has "
            f"{base.quantization}"
        )


def _max_length(base: Base, recipe: Recipe) -> int:
    return min(recipe.max_length, base.max_context_tokens)


def _publish(recipe: Recipe, progress: bool) -> str | None:
    if recipe.publish is None or recipe.name is None:
        return None
    return publish_adapter(recipe.out, recipe.publish, recipe.name, progress=progress)


# Fitting


def _fit(
    model: PeftModel,
    base: Base,
    data: TrainingData,
    recipe: Recipe,
    products: torch.dtype,
    progress: bool,
) -> Fit:
    with tempfile.TemporaryDirectory(prefix="quickchange-train-") as scratch:
        recorder = Recorder(progress)
        trainer = Trainer(
            model=model,
            args=_arguments(recipe, base, data, Path(scratch)),
            train_dataset=Examples(data.train),
            eval_dataset=Examples(data.held_out) if data.held_out else None,
            data_collator=Collator(_pad_id(base), answers_only=takes_logits_to_keep(base.model)),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        began_s = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began_s
    return Fit(
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        optimizer=optimizer_name(recipe, base.device),
        products=str(products).removeprefix("torch."),
        peak_memory_bytes=_peak_memory_bytes(base.device),
        losses=tuple(recorder.losses),
        evals=tuple(recorder.evals),
    )


def _arguments(recipe: Recipe, base: Base, data: TrainingData, scratch: Path) -> TrainingArguments:
    on_cpu = base.device.type == "cpu"
    steps_per_epoch = math.ceil(math.ceil(len(data.train) / recipe.batch_size) / recipe.gradient_accumulation)
    steps = recipe.max_steps or math.ceil(recipe.epochs * steps_per_epoch)
    return TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        warmup_steps=math.floor(steps * recipe.warmup_ratio),  # its first step learns nothing: not of so few
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_gradient_norm,
        optim=optimizer_name(recipe, base.device),
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        train_sampling_strategy="group_by_length",
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if data.held_out else "no",
        eval_steps=max(1, steps_per_epoch // recipe.evals_per_epoch),
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )


def _pad_id(base: Base) -> int:
    pad = base.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Writing


def _write(
    model: PeftModel, base: Base, data: TrainingData, recipe: Recipe, fit: Fit
) -> tuple[AdapterFacts, Path]:
    facts: list[AdapterFacts] = []

    def adapter(staged: Path) -> None:
        _save_adapter(model, base, data, recipe, staged)
        facts.append(validate_adapter(staged, base.layout, max_rank=recipe.rank))

    artefacts = artefacts_folder(recipe.out)
    recipe.out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(artefacts, ignore_errors=True)  # of a run that ended before its adapter was there
    publish_folder(artefacts, lambda staged: _save_artefacts(staged, base, data, recipe, fit))
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
        "data": asdict(data.report) | {"sha256": data.sha256},
        "fit": asdict(fit) | {"tokens_per_s": fit.tokens_per_s, "final_loss": fit.final_loss},
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    title = (
        f"{recipe.out.name}: {recipe.method} r={recipe.rank}, {data.report.examples} rows, {fit.steps} steps"
    )
    draw_loss_curve(fit.losses, fit.evals, folder / CURVE_FILE, title=title)
