"""`quickchange merge`: an adapter folded into its base, as a plain model. Imports torch only to run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.failure import CommandError, needs_extra
from quickchange.commands.options import add_command, add_json_option, add_progress_option, progress_of
from quickchange.commands.output import print_json

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange merge --base smollm2 --adapter ./sql-lora --out ./sql-model
  quickchange merge --base ./model --quantization none --adapter ./lora --out ./merged --dtype float32"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "merge", "fold an adapter into its base, as a plain model", _EXAMPLES)
    parser.add_argument(
        "--base", required=True, metavar="SOURCE", help="folder, GGUF file, hub id, or smollm2"
    )
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="the adapter's folder")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the new model; must not exist"
    )
    parser.add_argument(
        "--quantization",
        choices=("nf4", "fp4", "int8", "none"),
        default="nf4",
        help="of the base that the adapter was trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--double-quantization",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether that base's 4-bit scales were quantised again (yes)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the new model's weights (default: %(default)s)",
    )
    add_progress_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    with needs_extra("server"):
        from adapters.errors import AdapterError, BaseModelError
        from training.merge import merge_adapter
    try:
        report = merge_adapter(
            args.base,
            args.adapter,
            args.out,
            quantization=args.quantization,
            double_quantization=args.double_quantization,
            dtype=args.dtype,
            progress=progress_of(args),
        )
    except (AdapterError, BaseModelError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        print_json(report)
    else:
        print(
            f"{report.folder}: {report.modules} layers changed, |ΔW| {report.delta_norm:.4g}, {report.dtype}"
        )
    return 0
