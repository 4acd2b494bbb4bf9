"""`quickchange extract`: a LoRA adapter of a fully fine-tuned model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.failure import CommandError, needs_extra
from quickchange.commands.options import (
    add_command,
    add_json_option,
    add_progress_option,
    positive_int,
    progress_of,
)
from quickchange.commands.output import print_json

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from training.extract import ExtractReport

_EXAMPLES = """\
  quickchange extract --base smollm2 --model ./sql-model --rank 64 --out ./sql-lora

of each linear layer's change it keeps the largest singular values; how much is lost is printed"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "extract", "make an adapter of a fine-tuned model", _EXAMPLES)
    parser.add_argument("--base", required=True, metavar="SOURCE", help="what the model was trained from")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="the fine-tuned model")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the adapter; must not exist")
    parser.add_argument(
        "--rank", type=positive_int, default=64, metavar="R", help="of the adapter (%(default)s)"
    )
    parser.add_argument(
        "--quantization",
        choices=("none", "nf4"),
        default="none",
        help="of the base that will serve the adapter (default: %(default)s)",
    )
    add_progress_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    with needs_extra("train"):
        from adapters.errors import AdapterError, BaseModelError
        from training.extract import extract_adapter
    try:
        report = extract_adapter(
            args.base,
            args.model,
            args.out,
            rank=args.rank,
            quantization=args.quantization,
            progress=progress_of(args),
        )
    except (AdapterError, BaseModelError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0


def _print(report: "ExtractReport") -> None:
    name, error = report.worst
    print(
        f"{report.folder}: rank {report.rank}, {report.modules} layers, |ΔW| {report.delta_norm:.4g}; "
        f"{report.error:.1%} of it is lost, at worst {error:.1%} in {name}"
    )
    if report.left_out:
        name, change = max(report.left_out.items(), key=lambda pair: pair[1])
        print(
            f"left out: {len(report.left_out)} weights that no adapter of linear layers holds, at worst "
            f"{change:.2%} of {name}"
        )
