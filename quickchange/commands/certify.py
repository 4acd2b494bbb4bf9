"""`quickchange certify`: a merged model, reloaded from its folder, beside the live adapter."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.failure import CommandError, needs_extra
from quickchange.commands.options import (
    adapter_folder,
    add_command,
    add_json_option,
    add_progress_option,
    positive_int,
    progress_of,
)
from quickchange.commands.output import print_json, print_table

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from training.certificate import Certificate

CERTIFICATE_FILE = "merge_certificate.json"
PAGE_FILE = "merge_certificate.md"
DEFAULT_ROWS = 50

_EXAMPLES = """\
  quickchange certify --base smollm2 --adapter ./sql-lora --merged ./sql-model --data held-out.jsonl

writes merge_certificate.json and .md into the merged model's folder; exit status 1 says that it won't do"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "certify", "measure a merged model beside its live adapter", _EXAMPLES)
    parser.add_argument(
        "--base", required=True, metavar="SOURCE", help="folder, GGUF file, hub id, or smollm2"
    )
    parser.add_argument(
        "--adapter", required=True, type=adapter_folder, metavar="DIR", help="the adapter's folder"
    )
    parser.add_argument("--merged", required=True, type=Path, metavar="DIR", help="the merged model")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="rows that the adapter did not learn"
    )
    add_quantization_options(parser)
    add_rows_option(parser)
    _add_thresholds(parser)
    add_progress_option(parser)
    add_json_option(parser)


def add_quantization_options(parser: argparse.ArgumentParser) -> None:
    """How the base was quantised that the adapter was trained on."""
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


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows",
        type=positive_int,
        default=DEFAULT_ROWS,
        metavar="N",
        help="so many rows of --data, at random (%(default)s)",
    )


def _add_thresholds(parser: argparse.ArgumentParser) -> None:
    for name, default, what in (
        ("kl-over-noise", "10", "mean KL allowed, in terms of the measured noise"),
        ("recovered", "0.98", "share of the adapter's gain in loss that is needed"),
        ("agreement", "0.995", "share of tokens with the same likeliest one that is needed"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="X", help=f"{what} ({default})")


def run(args: argparse.Namespace) -> int:
    with needs_extra("train"):
        from adapters.errors import AdapterError, BaseModelError
        from training.errors import TrainingError
    try:
        certificate = _certified(args)
    except (AdapterError, BaseModelError, TrainingError) as error:
        raise CommandError(str(error)) from error
    _write(certificate, args.merged)
    _print(certificate, args)
    return 0 if certificate.passed else 1


def _certified(args: argparse.Namespace) -> "Certificate":
    from training.cases import cases_of, sample
    from training.certificate import Thresholds
    from training.certify import certify
    from training.rows import read_rows

    names = ("kl_over_noise", "recovered", "agreement")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return certify(
        args.base,
        args.adapter,
        args.merged,
        sample(cases_of(read_rows(args.data), source=args.data), args.rows, seed=0),
        quantization=args.quantization,
        double_quantization=args.double_quantization,
        thresholds=Thresholds(**given),
        progress=progress_of(args),
    )


def _write(certificate: "Certificate", folder: Path) -> None:
    from adapters.durable import replace_text
    from training.certificate import certificate_document
    from training.markdown import markdown

    replace_text(folder / CERTIFICATE_FILE, json.dumps(certificate.to_mapping(), indent=2) + "\n")
    replace_text(folder / PAGE_FILE, markdown(certificate_document(certificate)))


def _print(certificate: "Certificate", args: argparse.Namespace) -> None:
    from training.certificate import summary

    if args.json:
        print_json(certificate.to_mapping())
        return
    print_table(
        ["CERTIFICATE", "passed" if certificate.passed else "FAILED"], [list(f) for f in summary(certificate)]
    )
    for failure in certificate.failures:
        print(f"failed: {failure}")
