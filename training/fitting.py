"""Owns the optimization itself: the Trainer, its arguments, and what it did. Writes no artefact."""

import math
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils.generic import is_flash_attention_requested

from adapters.base import Base
from training.attaching import takes_logits_to_keep
from training.batches import Collator, PackCollator, Sequences, SequenceTrainer
from training.curve import EvalPoint, LossPoint
from training.data import TrainingData
from training.errors import StoppedError
from training.footprint import peak_bytes
from training.keeping import BestKeeper, CheckpointKeeper
from training.noise import noisy_embeddings
from training.optimizers import optimizer_name, own_optimizer
from training.order import EpochCounter, LengthBuckets
from training.products import is_autocast, name_of
from training.prompts import TrailingPads
from training.recipe import Recipe
from training.recorder import TENSORBOARD, Recorder, evals, event_writer, losses
from training.rehearsal import Rehearsal
from training.shared_prefix import SharedPrefixCollator, can_share
from training.stopwatch import Stopwatch
from training.unfinished import CHECKPOINTS_KEPT, UnfinishedRun

_SCHEDULES: Final = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True, slots=True)
class Fit:
    """What the optimizer did.

    Attributes:
        tokens: that went through the model, padding not counted.
        seconds: of optimization alone, without loading and saving; over all processes of the run.
        peak_memory_bytes: on CUDA of its allocator, on a CPU of the whole process; training/footprint.py.
        best_step: whose weights the adapter has, with early stopping; None: the last step's.
        resumed_at: the step of the checkpoint that the run went on from; None if it ran through.
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
    best_step: int | None = None
    resumed_at: int | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(point.loss for point in last) / len(last)


def fit(
    model: Any,
    base: Base,
    data: TrainingData,
    recipe: Recipe,
    products: torch.dtype,
    run: UnfinishedRun,
    *,
    progress: bool,
    stop: threading.Event,
    since_step: Stopwatch,
    rehearsal: Rehearsal,
) -> Fit:
    """Trains what requires gradients, from the run's checkpoint on if it has one.

    Args:
        stop: set by whoever wants the run to end after its step, with a checkpoint.
        since_step: restarted after every step.
        rehearsal: of the canary, before the last step.

    Raises:
        DivergedError: the loss is no number any more.
        StoppedError: `stop` was set.
    """
    keeper = CheckpointKeeper(run, recipe.checkpoint_every_s, stop)
    best = None
    if recipe.early_stopping is not None:
        best = BestKeeper(recipe.early_stopping, run.checkpoint)
    order = LengthBuckets(
        [sum(len(example.token_ids) for example in pack) for pack in data.sequences],
        rows_per_step=recipe.batch_size * recipe.gradient_accumulation,
        seed=recipe.seed,
    )
    with _tracked(recipe, run) as trackers, noisy_embeddings(base.model, recipe.neftune_alpha):
        arguments = _arguments(recipe, base, data, products, run.folder)
        trainer = _OrderedTrainer(
            model=model,
            args=arguments,
            train_dataset=Sequences(data.sequences),
            eval_dataset=Sequences(data.held_out) if data.held_out else None,
            data_collator=_collator(base, data, recipe),
            optimizers=(own_optimizer(model, arguments, recipe), None),
            callbacks=[
                EpochCounter(order, _steps_per_epoch(recipe, data)), Recorder(progress, since_step),
                rehearsal,
                *trackers,
                *([] if best is None else [best]), keeper,
            ],
        )  # fmt: skip
        trainer.order = order
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(run.checkpoint.folder) if run.checkpoint else None)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast was for training alone
    _check_not_stopped(trainer, stop, best)
    best_step = None if best is None else best.restore(model)
    history = trainer.state.log_history
    return Fit(
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=keeper.seconds,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        optimizer=optimizer_name(recipe, base.device),
        products=name_of(products),
        peak_memory_bytes=peak_bytes(base.device),
        losses=losses(history),
        evals=evals(history),
        best_step=best_step,
        resumed_at=None if run.checkpoint is None else run.checkpoint.step,
    )


class _OrderedTrainer(SequenceTrainer):
    """Learns rows in the order given: a Trainer's own depends on what the process drew before."""

    order: LengthBuckets

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
        return self.order


@contextmanager
def _tracked(recipe: Recipe, run: UnfinishedRun) -> Iterator[list[TrainerCallback]]:
    """The callbacks of TensorBoard; other trackers are made by the Trainer from their names."""
    if TENSORBOARD not in recipe.trackers:
        yield []
        return
    with closing(event_writer(run.events, 1 + (run.checkpoint.step if run.checkpoint else 0))) as writer:
        yield [TensorBoardCallback(writer)]


def _check_not_stopped(trainer: SequenceTrainer, stop: threading.Event, best: BestKeeper | None) -> None:
    state = trainer.state
    if stop.is_set() and state.global_step < state.max_steps and not (best and best.stopped_early):
        raise StoppedError(
            f"stopped after step {state.global_step} of {state.max_steps}; --resume goes on from there"
        )


def _arguments(
    recipe: Recipe, base: Base, data: TrainingData, products: torch.dtype, folder: Path
) -> TrainingArguments:
    on_cpu = base.device.type == "cpu"
    steps_per_epoch = _steps_per_epoch(recipe, data)
    steps = recipe.max_steps or math.ceil(recipe.epochs * steps_per_epoch)
    return TrainingArguments(
        output_dir=str(folder),
        run_name=recipe.out.name,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.effective_learning_rate,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        warmup_steps=math.floor(steps * recipe.warmup_ratio),  # its first step learns nothing: not of so few
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_gradient_norm,
        optim=optimizer_name(recipe, base.device),
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=on_cpu,
        bf16=is_autocast(base, products),
        dataloader_pin_memory=not on_cpu,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if data.held_out else "no",
        eval_steps=max(1, steps_per_epoch // recipe.evals_per_epoch),
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # but when CheckpointKeeper says so
        save_total_limit=CHECKPOINTS_KEPT,
        report_to=[name for name in recipe.trackers if name != TENSORBOARD] or "none",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )


def _steps_per_epoch(recipe: Recipe, data: TrainingData) -> int:
    return math.ceil(math.ceil(len(data.sequences) / recipe.batch_size) / recipe.gradient_accumulation)


def _collator(
    base: Base, data: TrainingData, recipe: Recipe
) -> Collator | PackCollator | SharedPrefixCollator | TrailingPads:
    if recipe.kind.family in ("prefix", "prompt"):
        return TrailingPads(_pad_id(base))
    answers_only = takes_logits_to_keep(base.model)
    if not recipe.packing:
        padded = Collator(_pad_id(base), answers_only=answers_only)
        # Noise on embeddings differs from row to row, and so then does what they begin with.
        if not recipe.share_prefixes or recipe.neftune_alpha or not can_share(base, data.train):
            return padded
        return SharedPrefixCollator(base, padded, answers_only=answers_only)
    flat = is_flash_attention_requested(base.model.config)
    return PackCollator(_pad_id(base), answers_only=answers_only, flat=flat)


def _pad_id(base: Base) -> int:
    pad = base.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)
