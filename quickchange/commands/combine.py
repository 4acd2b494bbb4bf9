"""`quickchange combine`: one adapter of several, each with a weight."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.failure import MISUSED, CommandError, needs_extra
from quickchange.commands.options import (
    adapter_folder,
    add_command,
    add_json_option,
    add_progress_option,
    positive_int,
    progress_of,
)
from quickchange.commands.output import print_json

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange combine --base smollm2 --adapter ./sql --adapter ./polite=0.5 --out ./both
  quickchange combine --base smollm2 --adapter ./a --adapter ./b --combination ties --density 0.5 --out ./c

cat is the weighted sum itself, of all ranks together; svd is nearest to it of --rank; linear sums A and B of
adapters of one rank; ties and dare drop values"""

_COMBINATIONS = (
    *("linear", "cat", "svd", "ties", "ties_svd"),
    *("dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
)


def _weighted(text: str) -> tuple[Path, float]:
    folder, found, weight = text.rpartition("=")
    if not found:
        return adapter_folder(text), 1.0
    try:
        return adapter_folder(folder), float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{weight!r} is no weight; write DIR=0.5") from None


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "combine", "make one adapter of several", _EXAMPLES)
    parser.add_argument(
        "--base", required=True, metavar="SOURCE", help="folder, GGUF file, hub id, or smollm2"
    )
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        type=_weighted,
        metavar="DIR[=WEIGHT]",
        help="an adapter's folder; to be repeated (weight 1)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the adapter; must not exist")
    parser.add_argument(
        "--combination", choices=_COMBINATIONS, default="cat", help="how (default: %(default)s)"
    )
    parser.add_argument("--rank", type=positive_int, metavar="R", help="for svd (the largest of theirs)")
    parser.add_argument(
        "--density", type=float, metavar="P", help="part of the values that ties and dare keep"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what dare drops (0)")
    parser.add_argument(
        "--quantization",
        choices=("nf4", "none"),
        default="nf4",
        help="of the base that the adapters were trained on (default: %(default)s)",
    )
    add_progress_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    if args.rank is not None and not args.combination.endswith("svd"):
        raise CommandError(f"--rank is for svd; {args.combination} has the rank that it has", MISUSED)
    with needs_extra("train"):
        from adapters.errors import AdapterError, BaseModelError
        from training.combine import combine_adapters
    try:
        report = combine_adapters(
            args.base,
            args.adapter,
            args.out,
            combination=args.combination,
            rank=args.rank,
            density=args.density,
            seed=args.seed,
            quantization=args.quantization,
            progress=progress_of(args),
        )
    except (AdapterError, BaseModelError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        print_json(report)
    else:
        print(f"{report.folder}: {report.combination} of {len(report.weights)} adapters, rank {report.rank}")
    return 0
