"""`quickchange merge`: an adapter folded into its base, as a plain model. Imports torch only to run."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.certify import add_quantization_options, add_rows_option
from quickchange.commands.failure import CommandError, needs_extra
from quickchange.commands.options import (
    adapter_folder,
    add_command,
    add_json_option,
    add_progress_option,
    progress_of,
    size_bytes,
)
from quickchange.commands.output import print_json

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange merge --base smollm2 --adapter ./sql-lora --out ./sql-model
  quickchange merge --base smollm2 --adapter ./sql-lora --out ./sql-model --data held-out.jsonl
  quickchange merge --base ./model --quantization none --adapter ./lora --out ./merged --dtype float32"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "merge", "fold an adapter into its base, as a plain model", _EXAMPLES)
    parser.add_argument(
        "--base", required=True, metavar="SOURCE", help="folder, GGUF file, hub id, or smollm2"
    )
    parser.add_argument(
        "--adapter", required=True, type=adapter_folder, metavar="DIR", help="the adapter's folder"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the new model; must not exist"
    )
    add_quantization_options(parser)
    parser.add_argument(
        "--into",
        choices=("dequantized", "requantized", "original"),
        default="dequantized",
        help="the base as the adapter knows it; the source's own weights, quantised again or not "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the new model's weights (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-size",
        type=size_bytes,
        default="2GB",
        metavar="SIZE",
        help="what a file of weights holds at most (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="rows that the adapter did not learn: certifies what was written, in a fresh process",
    )
    add_rows_option(parser)
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
            into=args.into,
            dtype=args.dtype,
            shard_bytes=args.shard_size,
            progress=progress_of(args),
        )
    except (AdapterError, BaseModelError) as error:
        raise CommandError(str(error)) from error
    if not args.json:
        print(
            f"{report.folder}: {report.modules} layers changed, |ΔW| {report.delta_norm:.4g}, {report.dtype}"
        )
        return 0 if args.data is None else _certify(args).returncode
    if args.data is None:
        print_json(report)
        return 0
    certified = _certify(args)
    print_json(
        dataclasses.asdict(report)
        | {"certificate": json.loads(certified.stdout) if certified.stdout else None}
    )
    return certified.returncode


def _certify(args: argparse.Namespace) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, so that nothing is measured but what is on the disk."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "quickchange", "certify"]
    command += ["--base", args.base, "--adapter", str(args.adapter), "--merged", str(args.out)]
    command += ["--data", str(args.data), "--rows", str(args.rows), "--quantization", args.quantization]
    command += ["--double-quantization" if args.double_quantization else "--no-double-quantization"]
    command += ["--progress"] if args.progress else []
    if not args.json:
        return subprocess.run(command, check=False, text=True)
    return subprocess.run([*command, "--json"], check=False, text=True, stdout=subprocess.PIPE)
