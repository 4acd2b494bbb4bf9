"""Everything that a run found: as a table for people, as JSON for programs."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.answers import Spread
from tests.bench.cold import ColdStart
from tests.bench.contender import Result
from tests.bench.interference import Interference
from tests.bench.memory import Footprint
from tests.bench.noise import QUIET_SHARE
from tests.bench.ratios import Ratio, ratio_of_residents, ratios_of, ratios_of_merged

MIB = 1024 * 1024


@dataclass(slots=True)
class Report:
    """Filled part by part; what was not run is empty."""

    machine: dict[str, object]
    options: dict[str, object]
    upload_to_first_token_s: float | None = None
    results: list[Result] = field(default_factory=list)
    residents: list[Result] = field(default_factory=list)
    merged: list[Result] = field(default_factory=list)
    cold_start: ColdStart | None = None
    interference: Interference | None = None
    footprints: list[Footprint] = field(default_factory=list)
    process_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def ratios(self) -> list[Ratio]:
        of_residents = ratio_of_residents(self.residents) if self.residents else []
        return ratios_of(self.results) + of_residents + ratios_of_merged(self.merged)

    def write(self, path: Path) -> None:
        content = {name: _plain(getattr(self, name)) for name in self.__slots__}
        content["ratios"] = _plain(self.ratios)
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")

    def text(self) -> str:
        parts = [
            _results_table(self.results),
            _results_table(self.residents),
            _results_table(self.merged),
            self._noise_lines(),
            self._sharing_lines(),
            _ratios_table(self.ratios),
            self._cold_lines(),
            _memory_table(self.footprints),
            [f"{name}: {size / MIB:.0f} MiB resident" for name, size in self.process_bytes.items()],
        ]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _noise_lines(self) -> list[str]:
        shares = [result.figures.foreign_share for result in [*self.results, *self.residents, *self.merged]]
        if max(shares, default=0.0) <= QUIET_SHARE:
            return []
        return [
            f"NOT A QUIET MACHINE: other programs had {statistics.mean(shares):.0%} of the processors on "
            f"average, {max(shares):.0%} in the worst cell;",
            "contenders whose threads wait for each other at every step suffer from it most.",
        ]

    def _sharing_lines(self) -> list[str]:
        lines = []
        steps = [result.figures.steps for result in self.results if result.figures.steps is not None]
        if steps:
            lines.append(f"most different adapters in one step: {max(each.most_adapters for each in steps)}")
        for result in self.results:
            if (cached := result.figures.cached_tokens) > 0:
                prompts = result.figures.requests * result.cell.prompt_tokens
                lines.append(
                    f"{result.cell.scenario}: {cached / prompts:.0%} of the prompts' tokens were cached"
                )
        return lines

    def _cold_lines(self) -> list[str]:
        lines = []
        if self.upload_to_first_token_s is not None:
            lines.append(f"upload to first token: {_ms(self.upload_to_first_token_s)} ms (median)")
        if (cold := self.cold_start) is not None:
            lines.append(
                f"first token, ms p50/p95/p99: adapter on disk {_spread(cold.cold_s)}, on the device "
                f"{_spread(cold.warm_s)}; difference {_ms(cold.extra_p50_s)} ({cold.requests} pairs)"
            )
        if (seen := self.interference) is not None:
            lines.append(
                f"inter-token, ms p50/p95/p99: streams alone {_spread(seen.alone_s)}, visitors with warm "
                f"adapters {_spread(seen.steady_s)}, {seen.adapters} adapters in a cycle "
                f"{_spread(seen.cycling_s)}; p99 × {seen.ratio:.2f} ({seen.visits} visits, {seen.loads} "
                f"loads, {seen.failures} failures)"
            )
        return lines


def _results_table(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    lines = [
        f"{'':<62}{'tokens/s':>10}{'':>15}{'milliseconds, p50/p95/p99':>28}",
        f"{'scenario':<30}{'load':<14}{'who':<18}{'median':>10}{'(passes)':>15}"
        f"{'first token':>18}{'inter-token':>17}{'whole answer':>20}{'adapters/step':>15}"
        f"{'failed':>8}{'noise':>7}",
    ]
    return lines + [_result_line(result) for result in results]


def _result_line(result: Result) -> str:
    cell, figures = result.cell, result.figures
    passes = f"({figures.lowest:.1f}–{figures.highest:.1f})"
    held = "" if figures.steps is None else f"{figures.steps.mean_adapters:.1f}"
    return (
        f"{cell.scenario:<30}{cell.load:<14}{result.contender:<18}{figures.tokens_per_second:>10.1f}{passes:>15}"
        f"{_spread(figures.first_token_s):>18}{_spread(figures.inter_token_s):>17}"
        f"{_spread(figures.total_s):>20}{held:>15}{sum(figures.failures.values()):>8}{figures.foreign_share:>7.0%}"
    )


def _ratios_table(ratios: Sequence[Ratio]) -> list[str]:
    if not ratios:
        return []
    lines = [f"{'ratio of tokens/s':<62}{'load':<14}{'median':>8}  passes"]
    return lines + [
        f"{ratio.what:<62}{ratio.load:<14}{ratio.value:>8.2f}  {ratio.lowest:.2f}–{ratio.highest:.2f}"
        for ratio in ratios
    ]


def _memory_table(footprints: Sequence[Footprint]) -> list[str]:
    if not footprints:
        return []
    columns = ("resident", "libraries", "base", "adapters", "the rest", "KV reserved")
    lines = [
        f"{'the serving process, MiB':<38}{'on device':>10}" + "".join(f"{name:>13}" for name in columns)
    ]
    for each in footprints:
        sizes = (each.resident, each.mapped, each.base, each.adapters, each.rest, each.kv_reserved)
        figures = "".join(f"{size / MIB:>13.1f}" for size in sizes)
        lines.append(f"{each.when:<38}{each.loaded:>10}{figures}")
    return lines


def _spread(spread: Spread) -> str:
    return "/".join(_ms(value) for value in (spread.p50, spread.p95, spread.p99))


def _ms(seconds: float) -> str:
    """Three digits, more of them only where they say something."""
    if math.isnan(seconds):
        return "–"
    milliseconds = seconds * 1e3
    return f"{milliseconds:.1f}" if milliseconds < 99.95 else f"{milliseconds:.0f}"


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, all the way down."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
