"""Decode steps of a whole model in this process: native and fused, native module by module, and plain torch.

`python -m tests.bench.steps` prints milliseconds and ratios within one run; steps of the three take turns.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quickchange.threads import spin_briefly

spin_briefly(os.environ)  # before torch is imported, as in the server

import torch
from torch import Tensor

from adapters.base import load_base
from adapters.layout import BaseLayout
from kernels.lora import LoraFactors
from server.batch import Batch, Row
from server.request import Request, SamplingParams
from server.runner import ModelRunner
from server.sequence import Sequence

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Form:
    """One way to compute a step."""

    name: str
    kernels: str
    fused: bool


FORMS = (
    Form("native, fused", "native", True),
    Form("native, module by module", "native", False),
    Form("torch and bitsandbytes", "torch", False),
)


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one decode step."""

    form: str
    streams: int
    adapters: int
    context: int
    best_ms: float
    median_ms: float


def runner_of(form: Form, source: str, adapters: int, rank: int, blocks: int) -> ModelRunner:
    base = load_base(source, device="cpu", kernels=form.kernels, progress=False)  # type: ignore[arg-type]
    runner = ModelRunner(base, fuse_layers=form.fused)
    runner.allocate_cache(blocks, BLOCK_TOKENS)
    for slot in range(1, adapters + 1):
        runner.slots.fill(slot, random_factors(base.layout, rank, slot, base.storage_dtype))
    return runner


def random_factors(
    layout: BaseLayout, rank: int, seed: int, dtype: torch.dtype, scale: float = 0.02
) -> dict[str, LoraFactors]:
    """An adapter on every linear layer but the head."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)

    return {
        name: LoraFactors(random(rank, shape.in_features), random(rank, shape.out_features), 2.0)
        for name, shape in layout.modules.items()
        if name != layout.head
    }


def decode_batch(streams: int, adapters: int, context: int) -> Batch:
    """One token each of so many sequences, with their adapters in turn."""
    per_sequence = -(-(context + 1) // BLOCK_TOKENS)
    rows = []
    for index in range(streams):
        sequence = Sequence(Request("bench", tuple([7] * (context + 1)), SamplingParams()), context + 2, 0.0)
        sequence.blocks = list(range(index * per_sequence, (index + 1) * per_sequence))
        sequence.slot = index % adapters + 1 if adapters else 0
        rows.append(Row(sequence, context, 1))
    return Batch(tuple(sorted(rows, key=lambda row: row.sequence.slot)))


def measure(options: argparse.Namespace) -> list[StepTime]:
    most = max(streams for streams, _ in options.cases)
    blocks = most * -(-(options.context + 1) // BLOCK_TOKENS)
    adapters = max(count for _, count in options.cases)
    runners = [(form, runner_of(form, options.base, adapters, options.rank, blocks)) for form in FORMS]
    results = []
    for streams, count in options.cases:
        batch = decode_batch(streams, count, options.context)
        times: dict[str, list[float]] = {form.name: [] for form in FORMS}
        for turn in range(options.turns + 1):
            for form, runner in runners:
                for _ in range(options.steps):
                    began_s = time.perf_counter()
                    runner.run(batch)
                    if turn:  # the first warms up
                        times[form.name].append((time.perf_counter() - began_s) * 1e3)
        results += [
            StepTime(name, streams, count, options.context, min(each), statistics.median(each))
            for name, each in times.items()
        ]
    return results


def table_of(results: list[StepTime]) -> str:
    lines = [f"{'streams':>8}{'adapters':>9}  {'form':<26}{'best ms':>9}{'median ms':>11}{'× torch':>9}"]
    for row in results:
        torch_ms = next(
            r.median_ms
            for r in results
            if (r.streams, r.adapters, r.form) == (row.streams, row.adapters, FORMS[-1].name)
        )
        lines.append(
            f"{row.streams:>8}{row.adapters:>9}  {row.form:<26}{row.best_ms:>9.2f}{row.median_ms:>11.2f}"
            f"{torch_ms / row.median_ms:>9.2f}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    def case(text: str) -> tuple[int, int]:
        streams, _, adapters = text.partition(":")
        return int(streams), int(adapters)

    parser = argparse.ArgumentParser(prog="python -m tests.bench.steps", description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (default: 16)")
    parser.add_argument("--context", type=int, default=160, help="tokens before the step (default: 160)")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn (default: 5)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each form (default: 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument(
        "--cases",
        type=case,
        nargs="+",
        metavar="STREAMS:ADAPTERS",
        default=[(1, 0), (1, 1), (16, 0), (16, 16)],
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    results = measure(options)
    print(table_of(results))
    options.out.mkdir(parents=True, exist_ok=True)
    report: list[dict[str, Any]] = [asdict(result) for result in results]
    (options.out / "steps.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
