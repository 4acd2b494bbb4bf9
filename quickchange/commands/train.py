"""`quickchange train`: a recipe from the command line, then the run. Imports torch only to run."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from quickchange.commands.failure import DIVERGED, MISUSED, STOPPED, CommandError, needs_extra
from quickchange.commands.interruptible import stop_on_signals
from quickchange.commands.options import add_command, add_json_option, add_progress_option, progress_of
from quickchange.commands.output import print_json, size
from training.processes import let_main_speak, speaks

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from training.data_report import DataReport
    from training.foresight import MemoryReport
    from training.recipe import Recipe
    from training.train import TrainingResult
    from training.unfinished import Start

_EXAMPLES = """\
  quickchange train --data rows.jsonl --out ./sql-lora
  quickchange train --base ./model --data rows.jsonl --out ./lora --rank 8 --epochs 1 --eval-fraction 0.1
  quickchange train --config recipe.yaml --out ./lora --resume
  quickchange train --config recipe.yaml --out ./lora --publish 127.0.0.1:50051 --name sql
  quickchange train --data rows.csv --eval-data held_out.csv --out ./lora --dry-run
  quickchange train --data rows.jsonl --eval-fraction 0.1 --out ./lora --publish 127.0.0.1:50051 --name sql \
      --promote-if better --alias prod

a row of data is {"prompt", "completion"}, {"messages": […]}, {"instruction", "input", "output"} or {"text"};
whatever is left out is the file's, else the default"""


class _Flag(NamedTuple):
    """A field of the recipe; its range and its default are the recipe's own."""

    name: str
    kind: Callable[[str], Any]
    metavar: str
    help: str


def _modules(text: str) -> str | tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    return text if names in (("all-linear",), ("attention",), ("qv",), ("mlp",)) else names


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name for name in text.split(",") if name)


_FLAGS = (
    _Flag("data", Path, "FILE", "rows to learn from: JSON lines, CSV or Parquet"),
    _Flag("out", Path, "DIR", "the result's folder; must not exist"),
    _Flag("base", str, "SOURCE", "folder, GGUF file, hub id, or smollm2 (smollm2)"),
    _Flag(
        "method", str, "NAME", "qlora, lora, dora, ia3, full, …; docs/guides/training.md lists them (qlora)"
    ),
    _Flag("quantization", str, "NAME", "of the base: auto, nf4, fp4, int8 or none (auto)"),
    _Flag("rank", int, "R", "width of the update (16)"),
    _Flag("alpha", float, "A", "weight of the update (twice the rank)"),
    _Flag("dropout", float, "P", "of the adapter's input (0)"),
    _Flag("target_modules", _modules, "NAMES", "all-linear, attention, qv, mlp, or module names with commas"),
    _Flag("lora_plus_ratio", float, "X", "of B's learning rate to A's, for lora_plus (16)"),
    _Flag("virtual_tokens", int, "N", "learned before the prompt, for prefix and prompt (20)"),
    _Flag("epochs", float, "N", "passes over the data (3)"),
    _Flag("max_steps", int, "N", "stop after so many optimizer steps"),
    _Flag("learning_rate", float, "X", "at the end of the warm-up (the method's own)"),
    _Flag("schedule", str, "NAME", "cosine, linear or constant (cosine)"),
    _Flag("warmup_ratio", float, "P", "part of the steps in which the rate rises (0.05)"),
    _Flag("batch_size", int, "N", "rows in one forward pass (8)"),
    _Flag("gradient_accumulation", int, "N", "forward passes of one step (1)"),
    _Flag("max_length", int, "N", "tokens of a row, or of several with --packing (1024)"),
    _Flag("on_too_long", str, "WHAT", "to do with longer rows: cut, drop or fail (cut)"),
    _Flag("loss_on", str, "WHAT", "is learned: completions, or all (completions)"),
    _Flag("weight_decay", float, "X", "of the adapter's weights (0)"),
    _Flag("max_gradient_norm", float, "X", "longer gradients are shortened (1)"),
    _Flag("optimizer", str, "NAME", "auto, adamw, adamw_8bit, paged_adamw or paged_adamw_8bit (auto)"),
    _Flag("products", str, "TYPE", "with the base's weights: auto, bfloat16 or float32 (auto)"),
    _Flag("eval_fraction", float, "P", "part of the rows that is held out (0)"),
    _Flag("eval_data", Path, "FILE", "rows to hold out, in place of a part of the data"),
    _Flag("evals_per_epoch", int, "N", "how often their loss is measured (1)"),
    _Flag("early_stopping", int, "N", "end after N evaluations without a lower held-out loss; keep the best"),
    _Flag("neftune_alpha", float, "X", "noise on embedded tokens (0)"),
    _Flag("checkpoint_every_s", float, "S", "seconds between checkpoints; 0 for none (300)"),
    _Flag("trackers", _names, "NAMES", "tensorboard, wandb, … with commas, or none (tensorboard)"),
    _Flag("canary_probes", int, "N", "prompts of the data that travel with the adapter (3)"),
    _Flag("seed", int, "N", "of weights, split and order (0)"),
    _Flag("device", str, "NAME", "auto, cpu or cuda (auto)"),
    _Flag("publish", str, "HOST:PORT", "upload the adapter to this server"),
    _Flag("name", str, "NAME", "what it is called there"),
    _Flag("promote_if", str, "WHEN", "move an alias to it: better, always, or never, which only compares"),
    _Flag("alias", str, "ALIAS", "which alias that is (prod)"),
    _Flag("promote_metric", str, "NAME", "what decides: chrf, bleu, exact, json_valid or json_equal (chrf)"),
    _Flag("promote_margin", float, "X", "by more than this, surely (0)"),
    _Flag("license", str, "NAME", "of the result, for its model card: apache-2.0, other, …; unknown without"),
)

_SWITCHES = {
    "gradient_checkpointing": "compute activations twice to keep fewer (no)",
    "share_prefixes": "compute what all rows of a batch begin with once (yes)",
    "packing": "put several rows into one sequence of --max-length tokens (no)",
    "double_quantization": "quantise a 4-bit base's scales again, as servers do (yes)",
    "exceed_memory": "go on although more memory is predicted than is free (no)",
}


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "train", "train an adapter, or a model", _EXAMPLES)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a recipe, as YAML; flags win over it")
    for flag in _FLAGS:
        parser.add_argument(
            f"--{flag.name.replace('_', '-')}", type=flag.kind, metavar=flag.metavar, help=flag.help
        )
    for name, help_text in _SWITCHES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=None, help=help_text
        )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint of a run that stopped"
    )
    start.add_argument("--restart", action="store_true", help="begin anew, whatever checkpoint there is")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what there is to learn, load no weights, write nothing"
    )
    parser.add_argument(
        "--print-schema", action="store_true", help="print the JSON schema of recipe files, and stop"
    )
    add_progress_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    if speaks():
        return _run(args)
    try:
        return 0 if args.dry_run or args.print_schema else _run(args)
    except CommandError as error:
        let_main_speak()
        return error.exit_code


def _run(args: argparse.Namespace) -> int:
    if args.print_schema:
        return _print_schema()
    with needs_extra("train"):
        recipe = _recipe(args)  # before torch is there, so that a typo shows at once
        from adapters.errors import AdapterError, BaseModelError
        from training.errors import DivergedError, StoppedError, TrainingError
        from training.train import examine, train
    start: Start = "resume" if args.resume else "restart" if args.restart else "new"
    progress = progress_of(args)
    told = _show if progress and not args.json else _tell_nobody
    try:
        if args.dry_run:
            _print_report(examine(recipe, progress=progress), args)
            return 0
        with stop_on_signals() as stop:
            result = train(recipe, start=start, stop=stop, progress=progress, on_data=told)
    except StoppedError as error:
        raise CommandError(str(error), STOPPED) from error
    except DivergedError as error:
        raise CommandError(str(error), DIVERGED) from error
    except (TrainingError, AdapterError, BaseModelError) as error:
        raise CommandError(str(error)) from error
    if speaks():
        _print_result(result, args)
    return 0


def _print_result(result: "TrainingResult", args: argparse.Namespace) -> None:
    if args.json:
        print_json(result)
        return
    print(f"{result.out}: loss {result.fit.final_loss:.4f} after {result.fit.steps} steps")
    print(_memory_line(result.memory))
    if result.published is not None:
        print(f"published as {result.published}")
    if result.promotion is not None:
        print(result.promotion)


def _print_schema() -> int:
    with needs_extra("train"):
        from training.recipe_schema import schema_text
    print(schema_text(), end="")
    return 0


def _memory_line(memory: "MemoryReport") -> str:
    return (
        f"memory: {size(memory.measured_added)} more than before training, {size(memory.predicted_added)} "
        f"predicted ({memory.error:+.0%})"
    )


def _show(report: "DataReport", file: TextIO | None = None) -> None:
    from training.data_report import report_lines

    for line in report_lines(report):
        print(line, file=file or sys.stderr)


def _tell_nobody(_: "DataReport") -> None:
    """The report is in training.json."""


def _print_report(report: "DataReport", args: argparse.Namespace) -> None:
    if args.json:
        print_json(report)
    else:
        _show(report, sys.stdout)


def _recipe(args: argparse.Namespace) -> "Recipe":
    from training.errors import RecipeError
    from training.recipe import Recipe

    names = [*(flag.name for flag in _FLAGS), *_SWITCHES]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        if args.config is not None:
            return Recipe.from_file(args.config, given)
        return Recipe.from_mapping(given, source="the command line")
    except RecipeError as error:
        raise CommandError(str(error), MISUSED) from error
