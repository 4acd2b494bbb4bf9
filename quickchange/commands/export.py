"""`quickchange export`: an adapter or a model in the form that others load."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.failure import MISUSED, CommandError, needs_extra
from quickchange.commands.options import (
    adapter_folder,
    add_command,
    add_json_option,
    add_progress_option,
    progress_of,
    size_bytes,
)
from quickchange.commands.output import print_json, size

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from training.export_adapter import AdapterExport
    from training.export_model import ModelExport
    from training.gguf_lora import GgufLoraReport
    from training.gguf_model import GgufReport

_EXAMPLES = """\
  quickchange export --format peft --adapter ./sql-lora --base-name ORG/MODEL --out ./sql-peft
  quickchange export --format peft --for vllm --adapter ./sql-lora --out ./sql-vllm
  quickchange export --format hf --model ./sql-model --shard-size 2GB --out ./sql-hf
  quickchange export --format gguf --model ./sql-model --type q8_0 --out ./sql.gguf
  quickchange export --format gguf-lora --adapter ./sql-lora --base smollm2 --out ./sql-lora.gguf"""

_TAKES = {
    "peft": ("adapter",),
    "hf": ("model",),
    "gguf": ("model",),
    "gguf-lora": ("adapter", "base"),
}
"""What each format is made of; the others have no such option."""
_ONLY = {
    "type": ("gguf", "gguf-lora"),
    "quantization": ("gguf",),
    "shard_size": ("hf",),
    "reader": ("peft",),
    "base_name": ("peft",),
    "with_manifest": ("peft",),
    "license": ("peft", "hf"),
}


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "export", "write an adapter or a model as others load it", _EXAMPLES)
    parser.add_argument("--format", required=True, choices=tuple(_TAKES), help="what it is to be")
    parser.add_argument(
        "--adapter", type=adapter_folder, metavar="DIR", help="peft, gguf-lora: the adapter's folder"
    )
    parser.add_argument(
        "--model", metavar="SOURCE", help="hf, gguf: a merged or any plain model: folder, hub id, or smollm2"
    )
    parser.add_argument("--base", metavar="SOURCE", help="gguf-lora: what the adapter was trained on")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="folder, or GGUF file; must not exist"
    )
    parser.add_argument(
        "--type",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="gguf: of the weights (bf16); gguf-lora: of the factors (f32)",
    )
    parser.add_argument(
        "--quantization",
        choices=("none", "nf4"),
        help="gguf: nf4 for the weights that a base in NF4 stands for, on which adapters are trained (none)",
    )
    parser.add_argument(
        "--shard-size", type=size_bytes, metavar="SIZE", help="hf: of weights in one file at most (5GB)"
    )
    parser.add_argument(
        "--for", choices=("peft", "vllm"), dest="reader", help="peft: who is to load the adapter (peft)"
    )
    parser.add_argument("--base-name", metavar="NAME", help="peft: what others call the base, as its hub id")
    parser.add_argument(
        "--with-manifest",
        action="store_true",
        default=None,
        help="peft: quickchange.json goes along, prompts of the training data in it",
    )
    parser.add_argument("--license", metavar="NAME", help="peft, hf: for the model card, as hubs spell it")
    add_progress_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    with needs_extra("train"):  # each writer imports its own
        from adapters.errors import AdapterError, BaseModelError

        try:
            report = _WRITERS[args.format](args)
        except (AdapterError, BaseModelError) as error:
            raise CommandError(str(error)) from error
    if args.json:
        print_json(report)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What is missing, and what the format has no use for."""
    takes = _TAKES[args.format]
    for name in ("adapter", "model", "base"):
        given = getattr(args, name) is not None
        if given != (name in takes):
            said = "is made of" if not given else "has no use for"
            raise CommandError(f"--format {args.format} {said} --{name}", MISUSED)
    for name, formats in _ONLY.items():
        if getattr(args, name) is not None and args.format not in formats:
            option = {"reader": "for"}.get(name, name.replace("_", "-"))
            raise CommandError(f"--{option} is for --format {' and '.join(formats)}", MISUSED)


def _peft(args: argparse.Namespace) -> "AdapterExport":
    from training.export_adapter import export_adapter

    report = export_adapter(
        args.adapter,
        args.out,
        reader=args.reader or "peft",
        base_name=args.base_name,
        with_manifest=bool(args.with_manifest),
        licence=args.license,
    )
    if not args.json:
        rank = "" if report.rank is None else f", rank {report.rank}"
        rewritten = ", ranks and scalings made one" if report.rewritten else ""
        print(f"{report.folder}: for {report.reader}{rank}{rewritten}")
        if report.serve is not None:
            print(report.serve)
    return report


def _hf(args: argparse.Namespace) -> "ModelExport":
    from training.export_model import export_model

    report = export_model(
        args.model,
        args.out,
        shard_bytes=args.shard_size or 5 * 10**9,
        licence=args.license,
        progress=progress_of(args),
    )
    if not args.json:
        print(
            f"{report.folder}: {report.architecture}, {report.dtype}, {size(report.weight_bytes)} in "
            f"{report.files} file{'' if report.files == 1 else 's'}"
        )
    return report


def _gguf(args: argparse.Namespace) -> "GgufReport":
    from training.gguf_model import export_gguf

    report = export_gguf(
        args.model,
        args.out,
        to=args.type or "bf16",
        quantization=args.quantization or "none",
        progress=progress_of(args),
    )
    if not args.json:
        print(
            f"{report.file}: {report.architecture}, {report.tensors} tensors, {report.type}, "
            f"{size(report.size_bytes)}"
        )
    return report


def _gguf_lora(args: argparse.Namespace) -> "GgufLoraReport":
    from training.gguf_lora import export_gguf_lora

    report = export_gguf_lora(
        args.adapter, args.base, args.out, to=args.type or "f32", progress=progress_of(args)
    )
    if not args.json:
        print(
            f"{report.file}: {report.architecture}, {report.modules} layers, {report.type}, "
            f"{size(report.size_bytes)}"
        )
        if report.trained_on not in (None, "none"):
            print(
                f"it was trained on the base in {report.trained_on}; beside a GGUF file of the base's own "
                "weights it answers otherwise (--format gguf --quantization nf4)"
            )
    return report


_WRITERS = {"peft": _peft, "hf": _hf, "gguf": _gguf, "gguf-lora": _gguf_lora}
