"""`quickchange evaluate`: held-out rows asked of an adapter and of what it is compared with, on a server."""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange.client import Client
from quickchange.commands.failure import MISUSED, CommandError, needs_extra
from quickchange.commands.options import (
    add_command,
    add_json_option,
    add_progress_option,
    positive_int,
    progress_of,
)
from quickchange.commands.output import print_json, print_table
from quickchange.local_server import LocalServer, LocalServerError

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from training.cases import Case
    from training.evaluation import Answered, Evaluation
    from training.metrics import RowLoss

_EXAMPLES = """\
  quickchange evaluate --data held-out.jsonl --server 127.0.0.1:50051 --adapter sql@4 --against sql:prod
  quickchange evaluate --data held-out.jsonl --base smollm2 --adapter ./sql-lora --rows 100 --out ./report
  quickchange evaluate --data held-out.jsonl --base smollm2

with --base alone a server is started for the time; with --server, --base adds the loss of the reference
answers, which is computed here, in float32"""

_BASE = "base"
_CANDIDATE = "candidate"
_RIVAL = "rival"


@dataclass(frozen=True, slots=True)
class _Contest:
    """Who is asked.

    Attributes:
        ours, theirs: references on the server, empty for its base; None if there is nobody to compare with.
    """

    client: Client
    ours: str
    theirs: str | None


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "evaluate", "measure an adapter on held-out rows", _EXAMPLES)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="rows, as for training")
    parser.add_argument("--server", metavar="HOST:PORT", help="who answers (default: a server of its own)")
    parser.add_argument("--base", metavar="SOURCE", help="folder, GGUF file, hub id, or smollm2")
    parser.add_argument(
        "--quantization",
        choices=("nf4", "none"),
        default="nf4",
        help="of the base given as --base (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter", metavar="REF", help="with --server a reference, else a folder; the base without"
    )
    parser.add_argument(
        "--against",
        metavar="REF",
        help="compare with this adapter, or with base (base, if there is --adapter)",
    )
    parser.add_argument("--rows", type=positive_int, metavar="N", help="so many rows, at random (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that choice (0)")
    parser.add_argument("--max-new-tokens", type=positive_int, metavar="N", help="longest answer (256)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="evaluation.json and evaluation.md; new")
    add_progress_option(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    with needs_extra("train"):
        from adapters.errors import AdapterError, BaseModelError
        from training.cases import cases_of, sample
        from training.errors import TrainingError
        from training.rows import read_rows
    try:
        cases = sample(cases_of(read_rows(args.data), source=args.data), args.rows, args.seed)
        evaluation = _evaluation(args, cases)
    except (TrainingError, AdapterError, BaseModelError, LocalServerError) as error:
        raise CommandError(str(error)) from error
    if args.out is not None:
        _write(evaluation, args.out)
    _print(evaluation, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.server is None and args.base is None:
        raise CommandError(
            "who answers? give --server HOST:PORT, or --base SOURCE to start a server here", MISUSED
        )
    if args.against is not None and args.adapter is None:
        raise CommandError("--against compares with --adapter; give one", MISUSED)
    if args.out is not None and args.out.exists():
        raise CommandError(f"--out {args.out} exists already; remove it or choose another", MISUSED)


def _evaluation(args: argparse.Namespace, cases: "list[Case]") -> "Evaluation":
    from training.evaluation import Answered, evaluate

    with tempfile.TemporaryDirectory(prefix="quickchange-evaluate-") as scratch:
        with _contest(args, Path(scratch)) as contest:
            ours = _answered(contest, contest.ours, args, cases)
            theirs = None if contest.theirs is None else _answered(contest, contest.theirs, args, cases)
            base_answers = _base_answers(contest, args, cases)
            about = _about(args, cases, contest)
            folders = _folders(args, contest, Path(scratch))
        losses = _losses(args, cases, folders, about)
    ours = Answered(ours.name, ours.answers, losses.get(contest.ours))
    if theirs is not None:
        theirs = Answered(theirs.name, theirs.answers, losses.get(contest.theirs or ""))
    return evaluate(cases, ours, theirs, about=about, base_answers=base_answers)


@contextmanager
def _contest(args: argparse.Namespace, scratch: Path) -> Iterator[_Contest]:
    """The adapters on a server: those named, or those pushed to one that runs for the time."""
    if args.server is not None:
        with Client(args.server) as client:
            ours = _reference(client, args.adapter)
            theirs = None if args.adapter is None else _reference(client, args.against)
            yield _Contest(client, ours, theirs)
        return
    flags = ("--quantization", args.quantization)
    with (
        LocalServer(args.base, scratch / "store", scratch / "server.log", flags) as server,
        Client(server.grpc) as client,
    ):
        ours = _pushed(client, args.adapter, _CANDIDATE)
        theirs = None if args.adapter is None else _pushed(client, args.against, _RIVAL)
        yield _Contest(client, ours, theirs)


def _reference(client: Client, adapter: str | None) -> str:
    """A fixed version, whatever an alias or a name does meanwhile."""
    return "" if adapter in (None, _BASE) else client.adapters.get(str(adapter)).reference


def _pushed(client: Client, folder: str | None, name: str) -> str:
    return "" if folder in (None, _BASE) else client.adapters.push(str(folder), name).adapter.reference


def _answered(contest: _Contest, adapter: str, args: argparse.Namespace, cases: "list[Case]") -> "Answered":
    from training.evaluation import Answered
    from training.live import LiveModel

    model = LiveModel(contest.client, adapter, args.max_new_tokens)
    return Answered(_shown(adapter, args), model.answers(cases, progress=progress_of(args)))


def _shown(reference: str, args: argparse.Namespace) -> str:
    """What people call it: a folder here has a made-up name on the server."""
    if not reference:
        return _BASE
    if args.server is not None:
        return reference
    return str(args.adapter if reference.startswith(_CANDIDATE) else args.against)


def _base_answers(contest: _Contest, args: argparse.Namespace, cases: "list[Case]") -> Any:
    """For the rows that are shown, where nobody compared is the base."""
    from training.evaluation_page import SHOWN_ROWS

    if not contest.theirs:
        return ()
    return _answered(contest, "", args, cases[:SHOWN_ROWS]).answers


def _about(args: argparse.Namespace, cases: "list[Case]", contest: _Contest) -> dict[str, Any]:
    info = contest.client.server_info()
    return {
        "data": {"file": args.data.name, "rows": len(cases), "seed": args.seed},
        "answers": {
            "base": info.base_model,
            "fingerprint": info.base_fingerprint,
            "quantization": info.quantization,
            "dtype": info.dtype,
            "decoding": "greedy",
            "max_new_tokens": args.max_new_tokens or "default",
        },
        "loss": "not measured: the wire has no log-probabilities of given tokens; --base computes it here",
    }


def _folders(args: argparse.Namespace, contest: _Contest, scratch: Path) -> dict[str, Path | None]:
    """Where each one's adapter lies, for the loss; None for the base."""
    folders: dict[str, Path | None] = {}
    if args.base is None:
        return folders
    for place, (reference, given) in enumerate(
        ((contest.ours, args.adapter), (contest.theirs, args.against))
    ):
        if reference is None:
            continue
        if not reference or args.server is None:
            folders[reference] = Path(given) if reference else None
        else:
            folders[reference] = contest.client.adapters.pull(reference, scratch / f"{place}").directory
    return folders


def _losses(
    args: argparse.Namespace,
    cases: "list[Case]",
    folders: Mapping[str, Path | None],
    about: dict[str, Any],
) -> "dict[str, list[RowLoss]]":
    """In float32 on the training base, after the answers: both would need the memory."""
    if not folders:
        return {}
    from adapters.base import load_base
    from training.reference_loss import reference_losses

    progress = progress_of(args)
    base = load_base(
        args.base, purpose="train", quantization=args.quantization, dtype="float32", progress=progress
    )
    served = about["answers"]["fingerprint"]
    if base.fingerprint != served:
        raise CommandError(
            f"--base {args.base} is {base.fingerprint} as {args.quantization}, the server has {served}; give "
            "its base and --quantization, or leave --base out"
        )
    about["loss"] = f"of the reference answers, in a float32 pass over {base.name} ({base.quantization})"
    return {
        reference: reference_losses(base, folder, cases, progress=progress)
        for reference, folder in folders.items()
    }


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
    from training.evaluation_page import table

    if args.json:
        print_json(evaluation.to_mapping())
        return
    print_table(*table(evaluation))
    if args.out is not None:
        print(f"{args.out / 'evaluation.md'} has the answers side by side")
