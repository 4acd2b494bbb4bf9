"""Steps of a whole model in this process: native in both precisions, module by module, and plain torch.

`python -m tests.bench.steps` prints milliseconds and ratios within one run; steps of the forms take turns.
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
from kernels.precision import has_medium
from server.batch import Batch, Row
from server.request import Request, SamplingParams
from server.runner import ModelRunner
from server.sequence import Sequence

BLOCK_TOKENS = 16
DECODES = ((1, 0), (1, 1), (4, 4), (16, 0), (16, 16))
PROMPTS = (128, 256, 512)


@dataclass(frozen=True)
class Form:
    """One way to compute a step."""

    name: str
    kernels: str
    fused: bool
    precision: str = "auto"


FORMS = (
    *[Form("native, fused, bfloat16 products", "native", True, "medium")] * has_medium(),
    Form("native, fused", "native", True, "highest"),
    Form("native, module by module", "native", False, "highest"),
    Form("torch and bitsandbytes", "torch", False),
)


@dataclass(frozen=True)
class Case:
    """One step: so many sequences, with so many adapters in turn.

    Attributes:
        tokens: of each sequence's prompt, from its start; None: one token each, after the context.
    """

    streams: int
    adapters: int
    tokens: int | None = None

    def span(self, context: int) -> tuple[int, int]:
        """First position and number of tokens that a sequence computes."""
        return (context, 1) if self.tokens is None else (0, self.tokens)

    def blocks_each(self, context: int) -> int:
        return -(-sum(self.span(context)) // BLOCK_TOKENS)


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one step."""

    form: str
    case: Case
    context: int
    best_ms: float
    median_ms: float


def runner_of(form: Form, source: str, adapters: int, rank: int, blocks: int) -> ModelRunner:
    chosen: Any = {"kernels": form.kernels, "matmul_precision": form.precision}
    base = load_base(source, device="cpu", progress=False, **chosen)
    runner = ModelRunner(base, fuse_layers=form.fused, screen_head=form.fused)
    runner.allocate_cache(blocks, BLOCK_TOKENS)
    for cache in runner.cache.layers.values():  # pages that were never written are all one and the same
        cache.k_NSKE.normal_()
        cache.v_NSKE.normal_()
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


def batch_of(case: Case, context: int) -> Batch:
    (start, count), blocks, rows = case.span(context), case.blocks_each(context), []
    for index in range(case.streams):
        request = Request("bench", tuple([7] * (start + count)), SamplingParams())
        sequence = Sequence(request, start + count + 1, 0.0)
        sequence.blocks = list(range(index * blocks, (index + 1) * blocks))
        sequence.slot = index % case.adapters + 1 if case.adapters else 0
        rows.append(Row(sequence, start, count))
    return Batch(tuple(sorted(rows, key=lambda row: row.sequence.slot)))


def measure(options: argparse.Namespace) -> list[StepTime]:
    blocks = max(case.streams * case.blocks_each(options.context) for case in options.cases)
    adapters = max(case.adapters for case in options.cases)
    runners = [(form, runner_of(form, options.base, adapters, options.rank, blocks)) for form in FORMS]
    results = []
    for case in options.cases:
        batch = batch_of(case, options.context)
        times: dict[str, list[float]] = {form.name: [] for form in FORMS}
        for turn in range(options.turns + 1):
            for form, runner in runners:
                for _ in range(options.steps if case.tokens is None else 1):
                    began_s = time.perf_counter()
                    runner.scores(batch)
                    if turn:  # the first warms up
                        times[form.name].append((time.perf_counter() - began_s) * 1e3)
        results += [
            StepTime(name, case, options.context, min(each), statistics.median(each))
            for name, each in times.items()
        ]
    return results


def table_of(results: list[StepTime]) -> str:
    head = f"{'streams':>8}{'adapters':>9}{'tokens':>8}  {'form':<33}"
    lines = [f"{head}{'best ms':>9}{'median ms':>11}{'× torch':>9}"]
    for row in results:
        torch_ms = next(r.median_ms for r in results if (r.case, r.form) == (row.case, FORMS[-1].name))
        case, tokens = row.case, row.case.tokens or 1
        head = f"{case.streams:>8}{case.adapters:>9}{tokens:>8}  {row.form:<33}"
        lines.append(f"{head}{row.best_ms:>9.2f}{row.median_ms:>11.2f}{torch_ms / row.median_ms:>9.2f}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    def case(text: str) -> Case:
        return Case(*map(int, text.split(":")))

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
        metavar="STREAMS:ADAPTERS[:PROMPT]",
        default=[*(Case(*each) for each in DECODES), *(Case(1, 0, tokens) for tokens in PROMPTS)],
        help="PROMPT: that many tokens from the start, instead of one after the context",
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
