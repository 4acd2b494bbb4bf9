"""`quickchange study`: ways of training compared on equal terms, each run a process of its own."""

import argparse
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange.commands.failure import DIVERGED, MISUSED, STOPPED, CommandError, needs_extra
from quickchange.commands.interruptible import stop_on_signals
from quickchange.commands.options import add_command, add_json_option, positive_int
from quickchange.commands.output import print_json, print_table

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from training.study import Ending
    from training.study_plan import Study
    from training.study_result import StudyResult

_EXAMPLES = """\
  quickchange study --data rows.jsonl --test held-out.jsonl --methods qlora,lora,full --out ./study
  quickchange study --data rows.jsonl --test held-out.jsonl --methods qlora --ranks 4,16,64 --out ./ranks
  quickchange study --config study.yaml --out ./study
  quickchange study --config study.yaml --dry-run

the same command goes on with a study that was stopped, and adds cells to one that is done; a study's file
holds the flags' settings, and rates, recipe and overrides: docs/guides/study.md"""

_POLL_S = 0.2


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "study", "compare ways of training on equal terms", _EXAMPLES)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a study, as YAML; flags win over it")
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows to learn from")
    parser.add_argument("--test", type=Path, metavar="FILE", help="rows that are asked afterwards")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the study's folder")
    parser.add_argument("--base", metavar="SOURCE", help="folder, GGUF file, hub id, or smollm2 (smollm2)")
    parser.add_argument("--rows", type=positive_int, metavar="N", help="so many of --data, at random (all)")
    parser.add_argument(
        "--test-rows", type=positive_int, metavar="N", help="so many of --test, at random (all)"
    )
    parser.add_argument("--methods", type=_words, metavar="NAMES", help="with commas (qlora,lora,full)")
    parser.add_argument("--ranks", type=_numbers, metavar="RANKS", help="with commas (16)")
    parser.add_argument(
        "--targets", type=_words, metavar="PRESETS", help="all-linear, attention, qv, mlp (the method's own)"
    )
    parser.add_argument("--seeds", type=_numbers, metavar="SEEDS", help="with commas (0)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs; run and write nothing")
    parser.add_argument(
        "--report-only", action="store_true", help="write the report of what is done so far; run nothing"
    )
    add_json_option(parser)


_SETTINGS = (
    *("data", "test", "base", "rows", "test_rows"),
    *("methods", "ranks", "targets", "seeds"),
)


def run(args: argparse.Namespace) -> int:
    with needs_extra("train"):
        from adapters.errors import AdapterError, BaseModelError
        from training.errors import StoppedError, StudyError, TrainingError
        from training.study import report_study, run_study
    try:
        study = _study(args)
    except StudyError as error:
        raise CommandError(str(error), MISUSED) from error
    if args.dry_run:
        _print_cells(study, args)
        return 0
    if args.out is None:
        raise CommandError("--out is needed: the study's folder", MISUSED)
    try:
        if args.report_only:
            result = report_study(study, args.out, machine=_machine())
        else:
            with stop_on_signals() as stop:
                launch = _Launcher(stop)
                result = run_study(study, args.out, launch=launch, tell=_tell, machine=_machine())
    except StoppedError as error:
        raise CommandError(str(error), STOPPED) from error
    except (TrainingError, AdapterError, BaseModelError) as error:
        raise CommandError(str(error)) from error
    _print(result, args)
    return 0 if not result.failed else 1


def _study(args: argparse.Namespace) -> "Study":
    from training.study_plan import Study

    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.config is not None:
        return Study.from_file(args.config, given)
    return Study.from_mapping(given, source="the command line")


class _Launcher:
    """Runs `quickchange` as processes that end early, with a checkpoint, once `stop` is set.

    They are in sessions of their own: Ctrl-C reaches this process, which tells them once.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, arguments: Sequence[str], log: Path) -> "Ending":
        if self._stop.is_set():
            return "stopped"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "quickchange", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            code = self._wait(process)
        if self._stop.is_set() and code != 0:
            return "stopped"
        endings: dict[int, Ending] = {0: "done", STOPPED: "stopped", DIVERGED: "diverged"}
        return endings.get(code, "failed")

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        told = False
        while True:
            try:
                return process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if self._stop.is_set() and not told:
                    process.send_signal(signal.SIGINT)
                    told = True
            except BaseException:  # a second Ctrl-C: nothing of it may go on unseen
                process.kill()
                process.wait()
                raise


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _machine() -> dict[str, Any]:
    import torch

    from adapters import host_memory
    from server.doctor import this_processor

    processor = this_processor()
    return {
        "processor": processor.name,
        "cores": processor.count,
        "memory_bytes": host_memory.now().total_bytes,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _print_cells(study: "Study", args: argparse.Namespace) -> None:
    if args.json:
        print_json(
            [
                {"name": cell.name, **cell.settings(), "quantization": study.quantization_of(cell)}
                for cell in study.cells()
            ]
        )
        return
    print_table(
        ["CELL", "METHOD", "RANK", "MODULES", "SEED", "BASE IN"],
        [
            [
                cell.name,
                cell.method,
                "-" if cell.rank is None else str(cell.rank),
                cell.targets_text or "-",
                str(cell.seed),
                study.quantization_of(cell),
            ]
            for cell in study.cells()
        ],
    )


def _print(result: "StudyResult", args: argparse.Namespace) -> None:
    if args.json:
        print_json(result.to_mapping())
        return
    for cell in result.failed:
        print(f"{cell.name} failed: {cell.error}")
    print(f"{args.out / 'report' / 'report.md'} and report.html compare {len(result.cells)} runs")
