"""Owns the optimization itself: the Trainer, its arguments, and what it did. Writes no artefact."""

import math
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from adapters.base import Base
from training.curve import EvalPoint, LossPoint
from training.data import Collator, Examples, TrainingData
from training.qlora import optimizer_name, takes_logits_to_keep
from training.recipe import Recipe
from training.recorder import Recorder

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


def fit(
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
