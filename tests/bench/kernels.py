"""`make bench-kernels`: each native operation beside bitsandbytes and torch, and the measured peaks.

Competitors take turns within one run; what counts is their ratio. Prints tables, writes JSON and a
roofline plot.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from quickchange.threads import spin_briefly

spin_briefly(os.environ)  # before torch is imported, as in the server

import matplotlib
import torch
from torch.nn.functional import linear

from adapters.bnb import functional
from adapters.nf4 import PackedNF4Linear, fused_kernel_works
from kernels import rowwise
from kernels.library import native, status
from kernels.linear import dequantize_nf4, packed_dense, packed_nf4
from kernels.lora import LoraFactors, Segment, Segments, add_lora_delta
from kernels.paged_attention import (
    AttentionPlan,
    AttentionRule,
    LayerCache,
    paged_attention,
)
from kernels.paging import PagedRows, cache_record, native_paged_attention
from kernels.precision import has_medium
from kernels.structs import Activation, Precision

matplotlib.use("Agg")

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (896, 4864))
"""In- and out-features: SmolLM2-135M's layers, and one of a 0.4 B model."""
ROWS = (1, 4, 8, 16, 64, 256)
OURS, MEDIUM, BITSANDBYTES, TORCH = "ours", "ours, bfloat16 products", "bitsandbytes", "torch"


@dataclass(frozen=True)
class Point:
    """One operation at one size.

    Attributes:
        best_ms, median_ms: by who computed it.
        macs: multiply-adds; bytes: least memory traffic of our form, weights and rows once.
    """

    operation: str
    size: str
    macs: int
    bytes: int
    best_ms: dict[str, float]
    median_ms: dict[str, float]

    def rate(self, who: str = OURS) -> float:
        """1e9 multiply-adds per second."""
        return self.macs / self.best_ms[who] / 1e6

    def ratio(self, who: str) -> float:
        """How many times as fast as somebody we are."""
        return self.best_ms[who] / self.best_ms[OURS]


def take_turns(contenders: dict[str, Callable[[], object]], turns: int) -> tuple[dict[str, float], ...]:
    """Best and median milliseconds of a call, each turn long enough to be timed."""
    counts: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, call in contenders.items():
        call()
        began_s = time.perf_counter()
        call()
        counts[name] = max(1, min(2000, int(0.01 / max(time.perf_counter() - began_s, 1e-7))))
    for _ in range(turns):
        for name, call in contenders.items():
            began_s = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - began_s) / counts[name] * 1e3)
    best = {name: min(each) for name, each in times.items()}
    return best, {name: statistics.median(each) for name, each in times.items()}


def nf4_points(turns: int) -> list[Point]:
    points = []
    for ins, outs in SHAPES:
        codes, state = functional.quantize_4bit(torch.randn(outs, ins), blocksize=64, quant_type="nf4")
        ours, medium = (packed_nf4(codes, state.absmax, (outs, ins), 64, None, each) for each in Precision)
        weight_OD = dequantize_nf4(codes, state.absmax, (outs, ins), 64)
        theirs = PackedNF4Linear(codes, state, None) if fused_kernel_works() else None
        for rows in ROWS:
            x = torch.randn(rows, ins)
            contenders: dict[str, Callable[[], object]] = {
                OURS: partial(ours, x),
                TORCH: partial(linear, x, weight_OD),
            }
            if has_medium():
                contenders[MEDIUM] = partial(medium, x)
            if theirs is not None:
                contenders[BITSANDBYTES] = partial(theirs, x)
            traffic = ours.weight_bytes + rows * (ins + outs) * 4
            size = f"{ins}→{outs}, {rows} rows"
            points.append(
                Point("NF4 linear", size, ins * outs * rows, traffic, *take_turns(contenders, turns))
            )
    return points


def dense_points(turns: int) -> list[Point]:
    """The output head of SmolLM2-135M."""
    ins, outs, points = 576, 49152, []
    weight_OD = torch.randn(outs, ins)
    bf16_OD = weight_OD.bfloat16()
    ours, medium = (packed_dense(bf16_OD, None, each) for each in Precision)
    for rows in (1, 4, 16):
        x = torch.randn(rows, ins)
        contenders: dict[str, Callable[[], object]] = {
            OURS: partial(ours, x),
            TORCH: partial(linear, x, weight_OD),
            "torch bfloat16": partial(linear, x.bfloat16(), bf16_OD),
        }
        if has_medium():
            contenders[MEDIUM] = partial(medium, x)
        traffic = ours.weight_bytes + rows * (ins + outs) * 4
        size = f"{ins}→{outs}, {rows} rows"
        points.append(
            Point("bfloat16 linear", size, ins * outs * rows, traffic, *take_turns(contenders, turns))
        )
    return points


def delta_points(turns: int, rank: int = 16) -> list[Point]:
    """So many rows with as many different adapters, beside a loop of torch products and the base product."""
    points = []
    for ins, outs in SHAPES[:4]:
        for rows in (1, 16):
            factors = {
                slot: LoraFactors(torch.randn(rank, ins), torch.randn(rank, outs), 2.0)
                for slot in range(1, rows + 1)
            }
            codes, state = functional.quantize_4bit(torch.randn(outs, ins), blocksize=64, quant_type="nf4")
            layer = packed_nf4(codes, state.absmax, (outs, ins), 64, None)
            for slot, pair in factors.items():
                layer.set_slot(slot, LoraFactors(pair.a_RD.bfloat16(), pair.b_RO.bfloat16(), pair.scaling))
            segments = Segments([Segment(row, row + 1, row + 1) for row in range(rows)])
            x, y = torch.randn(rows, ins), torch.zeros(rows, outs)
            contenders: dict[str, Callable[[], object]] = {
                OURS: partial(layer.add_delta, y, x, segments),
                TORCH: partial(add_lora_delta, y, x, segments, factors),
                "the base product": partial(layer, x),
                "both in one call": partial(layer, x, segments),
            }
            macs, traffic = rows * rank * (ins + outs), rows * rank * (ins + outs) * 2
            size = f"{ins}→{outs}, {rows} rows, {rows} adapters"
            points.append(Point("adapters, rank 16", size, macs, traffic, *take_turns(contenders, turns)))
    return points


def attention_points(turns: int) -> list[Point]:
    """SmolLM2's 9 query and 3 key heads of 64, beside gathering blocks for torch's attention."""
    points = []
    for sequences, length in ((1, 256), (16, 256), (1, 4096)):
        blocks_each = length // 16
        order = torch.randperm(sequences * blocks_each).view(sequences, blocks_each)
        cache = LayerCache(*(torch.randn(sequences * blocks_each, 16, 3, 64) for _ in range(2)))
        stored = LayerCache(cache.k_NSKE.bfloat16(), cache.v_NSKE.bfloat16())
        q, k, v = torch.randn(sequences, 9, 64), torch.randn(sequences, 3, 64), torch.randn(sequences, 3, 64)
        paged = PagedRows([length - 1] * sequences, range(sequences), order.tolist(), 16)
        plan = AttentionPlan(
            order[:, -1] * 16 + 15, sequences, order, torch.full((sequences,), length), prefills=()
        )
        rule, exact, halved = AttentionRule(0.125), cache_record(cache), cache_record(stored)
        heads = q, k, v
        contenders: dict[str, Callable[[], object]] = {
            OURS: partial(native_paged_attention, *heads, exact, paged, rule),
            "ours, bfloat16 cache": partial(native_paged_attention, *heads, halved, paged, rule),
            TORCH: partial(paged_attention, *heads, cache, plan, rule),
        }
        macs, traffic = sequences * length * 9 * 64 * 2, sequences * length * 3 * 64 * 2 * 4
        points.append(
            Point(
                "paged attention",
                f"{sequences} sequences of {length}",
                macs,
                traffic,
                *take_turns(contenders, turns),
            )
        )
    return points


def row_points(turns: int) -> list[Point]:
    points = []
    for rows in (1, 16, 256):
        x, weight, wide = torch.randn(rows, 576), torch.randn(576), torch.randn(rows, 3072)
        norm: dict[str, Callable[[], object]] = {
            OURS: partial(rowwise.rms_norm, x, weight, 1e-5),
            TORCH: partial(rowwise.rms_norm_reference, x, weight, 1e-5),
        }
        gate: dict[str, Callable[[], object]] = {
            OURS: partial(rowwise.gated, wide, Activation.SILU),
            TORCH: partial(rowwise.gated_reference, wide, Activation.SILU),
        }
        points.append(
            Point("norm", f"{rows} × 576", rows * 576 * 2, rows * 576 * 8, *take_turns(norm, turns))
        )
        points.append(
            Point("SwiGLU", f"{rows} × 1536", rows * 1536 * 12, rows * 1536 * 12, *take_turns(gate, turns))
        )
    logits = torch.randn(16, 49152)
    greedy: dict[str, Callable[[], object]] = {
        OURS: partial(rowwise.argmax, logits),
        TORCH: partial(rowwise.argmax_reference, logits),
    }
    points.append(Point("argmax", "16 × 49152", 16 * 49152, 16 * 49152 * 4, *take_turns(greedy, turns)))
    return points


def peaks(turns: int) -> dict[str, float]:
    """Largest rates seen: 1e9 multiply-adds per second, and 1e9 bytes per second from memory."""
    a = torch.randn(1024, 1024)
    half, large = a.bfloat16(), torch.ones(100_000_000)
    best, _ = take_turns(
        {"float32": lambda: a @ a, "bfloat16": lambda: half @ half, "read": lambda: large.sum()}, turns
    )
    return {
        "float32 GEMM": 1024**3 / best["float32"] / 1e6,
        "bfloat16 GEMM": 1024**3 / best["bfloat16"] / 1e6,
        "memory read": large.nbytes / best["read"] / 1e6,
    }


def table_of(points: list[Point], measured: dict[str, float]) -> str:
    lines = [", ".join(f"{name} {value:.0f} G/s" for name, value in measured.items()), ""]
    lines.append(f"{'operation':<18}{'size':<32}{'ours ms':>9}{'G/s':>7}  others: ms (× ours)")
    for point in points:
        others = "  ".join(
            f"{name} {ms:.4f} ({point.ratio(name):.2f})" for name, ms in point.best_ms.items() if name != OURS
        )
        lines.append(
            f"{point.operation:<18}{point.size:<32}{point.best_ms[OURS]:>9.4f}{point.rate():>7.1f}  {others}"
        )
    return "\n".join(lines)


def plot(points: list[Point], measured: dict[str, float], path: Path) -> None:
    """Rates over intensity, under the two roofs."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    compute, bandwidth = measured["float32 GEMM"], measured["memory read"]
    intensities = torch.logspace(-2, 3, 200)
    roof = torch.minimum(intensities * bandwidth, torch.tensor(compute))
    axes.loglog(intensities, roof, color="black", label="torch's float32 GEMM, memory")
    for operation in dict.fromkeys(point.operation for point in points):
        chosen = [point for point in points if point.operation == operation]
        axes.loglog(
            [p.macs / p.bytes for p in chosen], [p.rate() for p in chosen], "o", label=operation, alpha=0.7
        )
    axes.set_xlabel("multiply-adds per byte")
    axes.set_ylabel("10⁹ multiply-adds per second")
    axes.set_title(f"{status().isa}, {torch.get_num_threads()} threads; points above the roof run from cache")
    axes.legend(fontsize=8)
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernels", description=__doc__)
    parser.add_argument("--turns", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", help="instruction set (default: the best there is)")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    library = native()
    if library is None:
        raise SystemExit(f"error: {status().reason}; `quickchange doctor` says what to do")
    if options.isa:
        library.use_isa(options.isa)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measured = peaks(options.turns)
    measures = (nf4_points, dense_points, delta_points, attention_points, row_points)
    points = [point for measure in measures for point in measure(options.turns)]
    print(table_of(points, measured))
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"isa": library.isa, "threads": options.threads, "peaks": measured}
    report |= {"points": [asdict(point) for point in points]}
    (options.out / "kernels.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(points, measured, options.out / "roofline.png")
    print(f"\nwrote {options.out / 'kernels.json'} and {options.out / 'roofline.png'}")


if __name__ == "__main__":
    main()
