"""`quickchange plan`: what a training run will take, before anything is spent. Trains nothing."""

import argparse
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange.commands.failure import CommandError, needs_extra
from quickchange.commands.options import add_command, add_json_option
from quickchange.commands.output import print_json, print_table, size

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from training.plan import PlannedRun
    from training.planning import Plans

_EXAMPLES = """\
  quickchange plan --base smollm2 --data rows.jsonl
  quickchange plan --base ./llama-8b --method all --device rtx4090 --batch-size 4 --max-length 2048
  quickchange plan --base 70B --method qlora --device h100 --gradient-checkpointing
  quickchange plan --published

--base may also be a published shape: 7B, 13B, 30B, 70B, 110B, 8x7B, 8x22B"""

_PARTS = (
    "base",
    "trained",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
    "dequantising",
    "heap",
    "process",
)


_PUBLISHED_LEGEND = """
GB published: predicted with checkpointing and paged 8-bit AdamW – with neither (× the latter over
the published); one row of 512 tokens, rank 16
* predicted are the weights alone: nothing here trains on 2 bits"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "plan", "predict memory and time of a training run", _EXAMPLES)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a recipe, as YAML; flags win over it")
    parser.add_argument("--base", metavar="SOURCE", help="whose config.json is read (smollm2)")
    parser.add_argument("--method", metavar="NAME", help="a method, or all (all)")
    parser.add_argument(
        "--quantization", metavar="NAME", help="of the base: nf4, fp4, int8, none (the method's own)"
    )
    parser.add_argument(
        "--device", metavar="NAME", default="auto", help="auto, cpu, or a card such as h100 (auto)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows, whose lengths are measured")
    for name, what in _NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=what)
    parser.add_argument("--epochs", type=float, metavar="N", help="passes over the data, for the time (3)")
    parser.add_argument("--optimizer", metavar="NAME", help="auto, adamw, adamw_8bit, paged_… (auto)")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--published", action="store_true", help="print others' figures beside the formula's")
    add_json_option(parser)


_NUMBERS = {
    "rank": "width of the update (16)",
    "virtual_tokens": "of prefix and prompt tuning (20)",
    "batch_size": "rows in one forward pass (8)",
    "gradient_accumulation": "forward passes of one step (1)",
    "max_length": "tokens of a row (1024)",
    "max_steps": "optimizer steps, for the time",
}


def run(args: argparse.Namespace) -> int:
    with needs_extra("train"):
        from adapters.errors import BaseModelError
        from training.errors import TrainingError
        from training.planning import plan
        from training.recipe_file import read_recipe_file
    if args.published:
        return _published(args)
    try:
        settings: dict[str, Any] = {} if args.config is None else read_recipe_file(args.config)
        plans = plan({"method": "all"} | settings | _given(args), device=args.device)
    except (TrainingError, BaseModelError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        print_json(plans)
    else:
        _print(plans)
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "base",
        "method",
        "quantization",
        "data",
        "epochs",
        "optimizer",
        "gradient_checkpointing",
        *_NUMBERS,
    )
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _print(plans: "Plans") -> None:
    device, rows = plans.device, plans.rows
    source = "rates from its data sheet, an estimate" if device.estimated else "rates measured just now"
    print(f"{plans.base.name}: {plans.base.parameters / 1e6:,.1f} million parameters")
    print(f"{device.name}: {size(device.memory_bytes)} for a run, {source}")
    known = "measured" if rows.tokens is not None else "assumed, since no --data is given"
    print(f"rows of up to {rows.longest} tokens, {rows.kept} of them with logits, {known}\n")
    shown = [part for part in _PARTS if any(run.memory.parts.get(part) for run in plans.runs)]
    print_table(
        ["METHOD", "BASE IN", *(part.upper() for part in shown), "PEAK", "FITS", "TOKENS/S", "TIME"],
        [[*_cells(run, shown)] for run in plans.runs],
    )
    for name, reason in plans.left_out.items():
        print(f"{name}: left out; {reason}")
    for run in plans.runs:
        if not run.fits:
            print(f"{run.method}: {_advice(run)}")


def _cells(run: "PlannedRun", shown: list[str]) -> Iterator[str]:
    yield run.method
    yield run.storage
    yield from (size(run.memory.parts[part]) if run.memory.parts.get(part) else "-" for part in shown)
    yield size(run.total_bytes)
    yield "yes" if run.fits else "no"
    yield f"{run.tokens_per_s:,.0f}"
    yield "-" if run.seconds is None else _duration(run.seconds)


def _advice(run: "PlannedRun") -> str:
    from training.plan import proposal_text

    if run.proposal is None:
        return "no change makes it fit; take a larger device or shorter rows"
    return f"fits with {proposal_text(run.proposal)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _published(args: argparse.Namespace) -> int:
    from training.published import comparisons

    found = list(comparisons())
    if args.json:
        print_json(found)
        return 0
    rows = []
    for (method, bits), figures in groupby(found, key=lambda one: (one.method, one.bits)):
        cells = [
            f"{c.published_gb:.0f}: {c.smallest_gb:.0f}–{c.predicted_gb:.0f} (×{c.ratio:.2f})"
            for c in figures
        ]
        rows.append([method + (" *" if bits == "2" else ""), bits, *cells])
    print_table(["METHOD", "BITS", *dict.fromkeys(one.model for one in found)], rows)
    print(_PUBLISHED_LEGEND)
    return 0
