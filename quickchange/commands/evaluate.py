"""`quickchange evaluate`: held-out rows asked of an adapter and of what it is compared with; a report."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.ask_reference import ask_reference
from quickchange.commands.ask_server import ask_server
from quickchange.commands.asked import BASE
from quickchange.commands.failure import MISUSED, CommandError, needs_extra
from quickchange.commands.options import (
    add_command,
    add_json_option,
    add_progress_option,
    positive_int,
)
from quickchange.commands.output import print_json, print_table
from quickchange.local_server import LocalServerError

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from training.cases import Case
    from training.evaluation import Evaluation

_EXAMPLES = """\
  quickchange evaluate --data held-out.jsonl --server 127.0.0.1:50051 --adapter sql@4 --against sql:prod
  quickchange evaluate --data held-out.jsonl --base smollm2 --adapter ./sql-lora --rows 100 --out ./report
  quickchange evaluate --data held-out.jsonl --base smollm2
  quickchange evaluate --data held-out.jsonl --base smollm2 --adapter ./qdora --engine reference

with --base alone a server is started for the time; with --server, --base adds the loss of the reference
answers, which is computed here, in float32; --engine reference asks no server, and measures what none
applies"""

_NOBODY = "none"


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "evaluate", "measure an adapter on held-out rows", _EXAMPLES)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="rows, as for training")
    parser.add_argument("--server", metavar="HOST:PORT", help="who answers (default: a server of its own)")
    parser.add_argument("--base", metavar="SOURCE", help="folder, GGUF file, hub id, or smollm2")
    parser.add_argument(
        "--quantization",
        choices=("nf4", "none", "fp4", "int8"),
        default="nf4",
        help="of the base given as --base (default: %(default)s); fp4, int8 with --engine reference",
    )
    parser.add_argument(
        "--double-quantization",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether that base's 4-bit scales are quantised again (yes); not without --engine reference",
    )
    parser.add_argument(
        "--engine",
        choices=("server", "reference"),
        default="server",
        help="who answers: a server, or transformers + PEFT in this process, slowly (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter", metavar="REF", help="with --server a reference, else a folder; the base without"
    )
    parser.add_argument(
        "--against",
        metavar="REF",
        help="compare with this adapter, with base, or with none (base, if there is --adapter)",
    )
    parser.add_argument("--rows", type=positive_int, metavar="N", help="so many rows, at random (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that choice (0)")
    parser.add_argument("--max-new-tokens", type=positive_int, metavar="N", help="longest answer (256)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="evaluation.json and evaluation.md; new")
    add_progress_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    args.against = _rival(args)
    with needs_extra("train"):
        from adapters.errors import AdapterError, BaseModelError
        from training.cases import cases_of, sample
        from training.errors import TrainingError
        from training.rows import read_rows
    try:
        if args.server is None:
            _check_folder(args.adapter)
            _check_folder(args.against)
        cases = sample(cases_of(read_rows(args.data), source=args.data), args.rows, args.seed)
        evaluation = _evaluation(args, cases)
    except (TrainingError, AdapterError, BaseModelError, LocalServerError) as error:
        raise CommandError(str(error)) from error
    if args.out is not None:
        _write(evaluation, args.out)
    _print(evaluation, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    _check_engine(args)
    if args.server is None and args.base is None:
        raise CommandError(
            "who answers? give --server HOST:PORT, or --base SOURCE to start a server here", MISUSED
        )
    if args.against is not None and args.adapter is None:
        raise CommandError("--against compares with --adapter; give one", MISUSED)
    if args.out is not None and args.out.exists():
        raise CommandError(f"--out {args.out} exists already; remove it or choose another", MISUSED)


def _rival(args: argparse.Namespace) -> str | None:
    """Whom the adapter is compared with; None for nobody."""
    if args.adapter is None or args.against == _NOBODY:
        return None
    return args.against or BASE


def _check_engine(args: argparse.Namespace) -> None:
    if args.engine == "server":
        if args.quantization not in ("nf4", "none"):
            raise CommandError(
                f"no server keeps a base in {args.quantization}; give nf4 or none, or add --engine reference",
                MISUSED,
            )
        if not args.double_quantization:
            raise CommandError(
                "no server keeps a base whose scales are not quantised again; add --engine reference", MISUSED
            )
        return
    if args.server is not None:
        raise CommandError(
            "--engine reference answers in this process and asks no server; leave --server out", MISUSED
        )
    if args.base is None:
        raise CommandError("--engine reference needs the base to answer with; give --base SOURCE", MISUSED)


def _check_folder(given: str | None) -> None:
    """A whole model is no adapter, whoever answers."""
    from adapters.files import CONFIG_FILE

    if given in (None, BASE):
        return
    folder = Path(str(given))
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        raise CommandError(
            f"{folder} is a whole model and no adapter; measure it by itself: --base {folder} "
            "--quantization none, without --adapter"
        )


def _evaluation(args: argparse.Namespace, cases: "list[Case]") -> "Evaluation":
    from training.evaluation import evaluate

    asked = ask_reference(args, cases) if args.engine == "reference" else ask_server(args, cases)
    about = {
        "data": {"file": args.data.name, "rows": len(cases), "seed": args.seed},
        "answers": asked.who,
        "loss": asked.loss,
    }
    return evaluate(cases, asked.ours, asked.theirs, about=about, base_answers=asked.base_answers)


def _write(evaluation: "Evaluation", out: Path) -> None:
    from adapters.cache import publish_folder
    from training.evaluation_page import page

    def write(folder: Path) -> None:
        text = json.dumps(evaluation.to_mapping(), indent=2, ensure_ascii=False)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        (folder / "evaluation.md").write_text(page(evaluation), encoding="utf-8")

    out.parent.mkdir(parents=True, exist_ok=True)
    publish_folder(out, write)


def _print(evaluation: "Evaluation", args: argparse.Namespace) -> None:
    from training.evaluation_page import source, table

    if args.json:
        print_json(evaluation.to_mapping())
        return
    print_table(*table(evaluation))
    print(source(evaluation))
    if args.out is not None:
        print(f"{args.out / 'evaluation.md'} has the answers side by side")
