"""`quickchange train` beside a plain PEFT + Trainer script: time, memory and quality with the same budget.

`python -m tests.bench.training --data train.jsonl --test test.jsonl` trains on the same rows with both, each
in a process of its own, and asks what comes of it the same questions through the server. Prints a table,
writes JSON. Both get the same rows, epochs, batches, rank and learning rate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from adapters.cache import default_cache_dir
from adapters.sources import local_source
from quickchange.commands.output import print_table
from tests.bench.machine import machine
from training.study_cell import scores_in

PLAIN = "PEFT + Trainer, float32"
SHOWN = ("json_equal", "exact", "bleu", "chrf")


@dataclass(frozen=True)
class Trained:
    """One run.

    Attributes:
        wall_seconds: of the whole process; `seconds` are of its optimizer steps.
        scores: by metric, its value over the test rows.
    """

    name: str
    seconds: float
    wall_seconds: float
    tokens: float
    peak_memory_bytes: int
    scores: Mapping[str, float | None]


class _Ended(NamedTuple):
    stdout: str
    wall_seconds: float
    peak_memory_bytes: int


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="quickchange-bench.") as scratch:
        runs = [_plain(args, Path(scratch)), *(_ours(method, args, Path(scratch)) for method in args.methods)]
    plain = runs[0]
    print_table(
        [
            "TRAINER",
            "TRAINING",
            "PROCESS",
            "TOKENS/S",
            "PEAK",
            *(name.upper() for name in SHOWN),
            "AS FAST AS PLAIN",
        ],
        [
            [
                run.name,
                f"{run.seconds:.0f} s",
                f"{run.wall_seconds:.0f} s",
                f"{run.tokens / run.seconds:.0f}",
                f"{run.peak_memory_bytes / 1e9:.2f} GB",
                *(_number(run.scores.get(name)) for name in SHOWN),
                f"{plain.seconds / run.seconds:.2f} x",
            ]
            for run in runs
        ],
    )
    report = {"machine": machine(), "budget": vars(args), "runs": [asdict(run) for run in runs]}
    args.out.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"{args.out} has the figures")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="rows of prompt and completion")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=["qlora", "lora"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("training-bench.json"))
    return parser.parse_args()


def _budget(args: argparse.Namespace) -> list[str]:
    return [
        *("--data", str(args.data), "--rank", str(args.rank), "--epochs", str(args.epochs)),
        *("--learning-rate", str(args.learning_rate), "--batch-size", str(args.batch_size)),
    ]


def _plain(args: argparse.Namespace, scratch: Path) -> Trained:
    out = scratch / "plain"
    folder = local_source(args.base, default_cache_dir()).folder
    ended = _run(
        ["tests.bench.peers.plain_trainer", "--base", str(folder), "--out", str(out), *_budget(args)]
    )
    figures = json.loads(ended.stdout.splitlines()[-1])
    scores = _scores(args, scratch / "plain.eval", out, "none")
    return Trained(
        PLAIN, figures["seconds"], ended.wall_seconds, figures["tokens"], ended.peak_memory_bytes, scores
    )


def _ours(method: str, args: argparse.Namespace, scratch: Path) -> Trained:
    out = scratch / method
    command = ["quickchange", "train", "--json", "--base", args.base, "--method", method, "--out", str(out)]
    ended = _run([*command, *_budget(args)])
    fit: dict[str, Any] = json.loads(ended.stdout)["fit"]
    quantization = "nf4" if method.startswith("q") else "none"
    scores = _scores(args, scratch / f"{method}.eval", out, quantization)
    return Trained(
        f"quickchange {method}",
        fit["seconds"],
        ended.wall_seconds,
        fit["tokens"],
        ended.peak_memory_bytes,
        scores,
    )


def _scores(args: argparse.Namespace, out: Path, adapter: Path, quantization: str) -> dict[str, float | None]:
    _run(
        [
            *("quickchange", "evaluate", "--data", str(args.test), "--out", str(out), "--against", "none"),
            *("--base", args.base, "--quantization", quantization, "--adapter", str(adapter)),
        ]
    )
    return {name: score.value for name, score in scores_in(out).items()}


def _run(module: Sequence[str]) -> _Ended:
    """A Python module as a process, with what it took."""
    began_s = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", *module], stdout=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(module)} failed ({process.returncode})")
        said.seek(0)
        return _Ended(said.read(), time.perf_counter() - began_s, usage.ru_maxrss * 1024)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
