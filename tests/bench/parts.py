"""The parts of a run; each starts its own servers and fills its part of the report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.arrivals import Prompts
from tests.bench.cold import measure_cold_start
from tests.bench.contender import Contender, Progress, Tournament
from tests.bench.interference import Household
from tests.bench.lineup import peers
from tests.bench.memory import footprint, measure_registering
from tests.bench.merged import adapter_in_three_places
from tests.bench.options import Options
from tests.bench.ours import OurServer, our_server
from tests.bench.report import Report
from tests.bench.scenarios import closed_cell, merged_cells, open_cells, resident_cells, throughput_cells
from tests.bench.subject import Pool, Subject

DEVICE_SLOTS = 8
"""Adapters that the device of the cold scenarios holds."""
DEFAULT_CLIENTS = 32
"""Of the server's own settings."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The parts of a run; each starts its own servers and fills its part of the report."""

    options: Options
    report: Report
    scratch: Path
    tell: Progress
    subject: Subject
    pool: Pool
    prompts: Prompts
    cache: Path

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        """Those that were asked for, in order; open loops are part of the first, on the same servers."""
        asked = set(self.options.only)
        parts = {
            "cold": self.cold,
            "residents": self.residents,
            "merged": self.merged,
            "memory": self.memory,
        }
        chosen = {name: part for name, part in parts.items() if name in asked}
        return {"throughput": self.throughput} | chosen if {"throughput", "open-loop"} & asked else chosen

    @classmethod
    def prepare(cls, options: Options, report: Report, scratch: Path, tell: Progress) -> "Bench":
        tell("loading the base, writing adapters")
        subject = Subject.load(options.base, options.device)
        count = max(options.adapters, options.many, options.cycle)
        cache = options.cache / subject.layout.fingerprint.removeprefix("sha256:")[:16] / f"r{options.rank}"
        pool = Pool.write(cache / "adapters", subject.layout, count=count, rank=options.rank)
        prompts = Prompts(subject.prompt_ids, options.seed)
        return cls(options, report, scratch, tell, subject, pool, prompts, cache)

    def throughput(self) -> None:
        options = self.options
        closed = throughput_cells(options) if "throughput" in options.only else []
        pool = self.pool.first(max([options.adapters, *(cell.adapters for cell in closed)]))
        others = self.pool.first(options.adapters)
        with (
            our_server(self.subject, self.scratch, *self._flags(pool), pool=pool) as ours,
            peers(options, self.subject, others, self.scratch, self.cache, self.tell) as known,
        ):
            contenders: list[Contender] = [ours, *known]
            self.report.upload_to_first_token_s = ours.upload_to_first_token_s
            tournament = Tournament(self.pool.names, self.prompts, self.tell)
            self.report.results += tournament.play(contenders, closed, options.passes)
            if "open-loop" in options.only:
                cells = open_cells(options, self._capacity(tournament, ours))
                self.report.results += tournament.play(contenders, cells, options.passes)
            self.report.footprints.append(footprint(ours, self.subject, "after the throughput scenarios"))
            sizes = {each.name: each.process.resident_bytes() for each in contenders}
            self.report.process_bytes = sizes

    def cold(self) -> None:
        options, size = self.options, self.subject.adapter_device_bytes(self.options.rank)
        flags = ("--adapter-device-bytes", str(DEVICE_SLOTS * size))
        pool = self.pool.first(options.cycle)
        with our_server(self.subject, self.scratch, *flags, pool=pool, name="cold") as server:
            self.tell(f"{options.cycle} adapters, room for {DEVICE_SLOTS}")
            self.report.cold_start = measure_cold_start(
                server, pool.names, self.prompts, prompt_tokens=options.prompt_tokens, count=options.cycle
            )
            household = Household(
                server, pool.names, self.prompts, options.prompt_tokens, 8 * options.new_tokens, self.tell
            )
            self.report.interference = household.measure(options.cycle, options.passes)

    def residents(self) -> None:
        held = self.pool.first(self.options.adapters)
        with (
            our_server(
                self.subject, self.scratch, pool=held, name=f"{len(held.folders)} residents"
            ) as holding,
            our_server(self.subject, self.scratch, name="no resident") as empty,
        ):
            assert holding.info().capacity.adapter_device_bytes_used > 0
            assert empty.info().capacity.adapter_device_bytes_used == 0
            tournament = Tournament((), self.prompts, self.tell)
            cells = resident_cells(self.options)
            passes = 2 * self.options.passes  # differences are small
            self.report.residents = tournament.play([holding, empty], cells, passes)

    def merged(self) -> None:
        one = self.pool.first(1)
        with adapter_in_three_places(self.subject, one, self.scratch, self.cache, self.tell) as contenders:
            tournament = Tournament((), self.prompts, self.tell)
            passes = 2 * self.options.passes  # differences are small
            self.report.merged = tournament.play(contenders, merged_cells(self.options), passes)

    def memory(self) -> None:
        with our_server(self.subject, self.scratch, name="memory") as server:
            self.report.footprints += measure_registering(
                server, self.subject, self.scratch, count=self.options.registered, tell=self.tell
            )

    def _capacity(self, tournament: Tournament, ours: OurServer) -> float:
        """Our tokens per second with different adapters, measured already or now."""
        cell = closed_cell(self.options, self.options.adapters, self.options.at)
        known = [r for r in self.report.results if (r.contender, r.cell) == (ours.name, cell)]
        (result, *_) = known or tournament.play([ours], [cell], 1)
        return result.figures.tokens_per_second

    def _flags(self, pool: Pool) -> list[str]:
        """Room for every client and every adapter; the defaults are made for fewer, or for a small base."""
        size, clients = self.subject.adapter_device_bytes(self.options.rank), self.options.most_clients
        flags = ["--adapter-device-bytes", str(size * len(pool.folders))]
        if clients > DEFAULT_CLIENTS:
            flags += ["--max-running-requests", str(clients), "--max-batch-tokens", str(16 * clients)]
        return flags
