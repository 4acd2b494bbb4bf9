"""Owns the optimization itself: the Trainer, its arguments, and what it did. Writes no artefact."""

import math
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils.generic import is_flash_attention_requested

from adapters.base import Base
from training.attaching import takes_logits_to_keep
from training.batches import Collator, PackCollator, Sequences, SequenceTrainer
from training.curve import EvalPoint, LossPoint
from training.data import TrainingData
from training.errors import RecipeError, StoppedError
from training.footprint import peak_bytes
from training.keeping import BestKeeper, CheckpointKeeper
from training.noise import noisy_embeddings
from training.optimizers import optimizer_name, own_optimizer
from training.order import EpochCounter, RowOrder
from training.processes import Processes
from training.products import is_autocast, name_of
from training.prompts import TrailingPads
from training.recipe import Recipe
from training.recorder import TENSORBOARD, Recorder, evals, event_writer, losses
from training.rehearsal import Rehearsal
from training.shared_prefix import SharedPrefixCollator, can_share
from training.sharing import shares_of
from training.stopwatch import Stopwatch
from training.unfinished import CHECKPOINTS_KEPT, UnfinishedRun

_SCHEDULES: Final = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True, slots=True)
class Fit:
    """What the optimizer did.

    Attributes:
        tokens: that went through the model, padding not counted.
        seconds: of optimization alone, without loading and saving; those before a kill count too.
        peak_memory_bytes: of the main process; on CUDA of its allocator, on a CPU of the whole process;
            training/footprint.py.
        best_step: whose weights the adapter has, with early stopping; None: the last step's.
        resumed_at: the step of the checkpoint that the run went on from; None if it ran through.
        peak_memory_bytes_by_process: peak_memory_bytes of every process of the run, by rank.
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
    peak_memory_bytes_by_process: tuple[int, ...] = ()

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
    processes: Processes,
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
        StoppedError: `stop` was set, in this process or another.
        ProcessLostError: another process is gone.
        RecipeError: the model's loss cannot be divided among processes.
    """
    keeper = CheckpointKeeper(run, recipe.checkpoint_every_s, stop, processes)
    best = None
    if recipe.early_stopping is not None:
        best = BestKeeper(recipe.early_stopping, run.checkpoint)
    collator = _collator(base, data, recipe)
    order = RowOrder(
        [sum(len(example.token_ids) for example in pack) for pack in data.sequences],
        rows_per_step=recipe.batch_size * recipe.gradient_accumulation * processes.count,
        seed=recipe.seed,
        padded=isinstance(collator, Collator | TrailingPads),
    )
    with _tracked(recipe, run, processes) as trackers, noisy_embeddings(base.model, recipe.neftune_alpha):
        arguments = _arguments(recipe, base, data, products, run.folder, processes)
        trainer = _OrderedTrainer(
            model=model,
            args=arguments,
            train_dataset=Sequences(data.sequences),
            eval_dataset=Sequences(data.held_out) if data.held_out else None,
            data_collator=collator,
            optimizers=(own_optimizer(model, arguments, recipe), None),
            callbacks=[
                EpochCounter(order, _steps_per_epoch(recipe, data, processes)),
                Recorder(progress, since_step),
                rehearsal,
                *trackers,
                *([] if best is None else [best]), keeper,
            ],
        )  # fmt: skip
        trainer.order, trainer.processes = order, processes
        trainer.tokens_per_step = _learned_per_step(order, data)
        trainer.remove_callback(PrinterCallback)
        _check_divisible(trainer, base)
        if not processes.is_main:
            set_seed(recipe.seed + processes.rank)  # noise of its own; the weights are there, and the same
        with processes.connected():
            trainer.train(resume_from_checkpoint=str(run.checkpoint.folder) if run.checkpoint else None)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast was for training alone
    if keeper.stopped and not (best and best.stopped_early):
        raise StoppedError(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; --resume goes on "
            "from there"
        )
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
        peak_memory_bytes_by_process=tuple(processes.gathered(peak_bytes(base.device))),
    )


class _OrderedTrainer(SequenceTrainer):
    """Learns rows in the order given: a Trainer's own depends on what the process drew before.

    Of several processes each computes its share of a batch, and no row twice: transformers would fill the
    last batch with rows of the first.
    """

    order: RowOrder
    processes: Processes
    tokens_per_step: float

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        return self.order

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Where like lengths share a step its loss is divided by the tokens that a step learns on average.

        Divided by its own tokens, as the Trainer does and as is right for random steps, each token of a step
        of short answers would weigh more than one of long answers, in every epoch.
        """
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        if tokens is not None and self.order.padded:
            tokens = torch.full_like(tokens, self.tokens_per_step, dtype=torch.float32)
        return batches, tokens

    def get_train_dataloader(self) -> Any:
        if self.processes.count == 1:
            return super().get_train_dataloader()
        return self._shares(self.train_dataset, self.order, self.args.per_device_train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if self.processes.count == 1:
            return super().get_eval_dataloader(eval_dataset)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._shares(rows, range(len(rows)), self.args.per_device_eval_batch_size)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """The loss is that of the batch of all, so that each process has it for each of its rows."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if self.processes.count > 1:
            loss = self.accelerator.reduce(loss, reduction="mean")
        return loss, logits, labels

    def _shares(self, rows: Any, order: RowOrder | range, batch_size: int) -> Any:
        return shares_of(
            rows,
            order,
            self.data_collator,
            batch_size,
            self.processes,
            pin_memory=self.args.dataloader_pin_memory,
        )


def _learned_per_step(order: RowOrder, data: TrainingData) -> float:
    """Tokens that are learned in a full step of all processes, on average."""
    learned = sum(example.learned_tokens for pack in data.sequences for example in pack)
    return learned / len(data.sequences) * min(order.rows_per_step, len(data.sequences))


def _check_divisible(trainer: _OrderedTrainer, base: Base) -> None:
    """A mean over each process' tokens would weigh a token by how many others its process has."""
    if trainer.processes.count > 1 and not trainer.model_accepts_loss_kwargs:
        raise RecipeError(
            f"the loss of {base.name} ({base.model.config.model_type}) is a mean over a batch, which several "
            "processes cannot divide; train with one"
        )


@contextmanager
def _tracked(recipe: Recipe, run: UnfinishedRun, processes: Processes) -> Iterator[list[TrainerCallback]]:
    """The callbacks of TensorBoard; other trackers are made by the Trainer from their names."""
    if TENSORBOARD not in recipe.trackers or not processes.is_main:
        yield []
        return
    with closing(event_writer(run.events, 1 + (run.checkpoint.step if run.checkpoint else 0))) as writer:
        yield [TensorBoardCallback(writer)]


def _arguments(
    recipe: Recipe,
    base: Base,
    data: TrainingData,
    products: torch.dtype,
    folder: Path,
    processes: Processes,
) -> TrainingArguments:
    on_cpu = base.device.type == "cpu"
    steps_per_epoch = _steps_per_epoch(recipe, data, processes)
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
        ddp_find_unused_parameters=False,  # each batch goes through all that is trained
    )


def _steps_per_epoch(recipe: Recipe, data: TrainingData, processes: Processes) -> int:
    batches = math.ceil(len(data.sequences) / (recipe.batch_size * processes.count))
    return math.ceil(batches / recipe.gradient_accumulation)


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
