"""Ratios compare what ran in the same pass; tables and JSON hold every figure."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.answers import Figures, Spread, Steps
from tests.bench.cells import Cell
from tests.bench.cold import ColdStart
from tests.bench.contender import Result
from tests.bench.interference import Interference
from tests.bench.memory import Footprint
from tests.bench.options import parse
from tests.bench.plots import plot_all
from tests.bench.ratios import OURS, SET_ADAPTER, Ratio, ratio_of_residents, ratios_of, ratios_of_merged
from tests.bench.report import MIB, Report
from tests.bench.scenarios import throughput_cells

SPREAD = Spread(0.012, 0.034, 0.56)
CELL = Cell(16, 16, 32, prompt_tokens=128, new_tokens=64)
ALONE = replace(CELL, concurrency=1)
BASE = replace(CELL, adapters=0)


def result(who: str, cell: Cell, *rates: float) -> Result:
    middle = sorted(rates)[len(rates) // 2]
    steps = Steps(15.5, 0.9, 16) if who == OURS else None
    figures = Figures(
        32, {}, middle, min(rates), max(rates), rates, SPREAD, SPREAD, SPREAD, cached_tokens=0, steps=steps
    )
    return Result(who, cell, figures)


RESULTS = [
    result(OURS, BASE, 100.0, 50.0, 110.0),
    result(OURS, CELL, 90.0, 45.0, 99.0),
    result("llama-server", CELL, 30.0, 15.0, 33.0),
    result(SET_ADAPTER, ALONE, 10.0, 5.0, 11.0),
]


def ratios() -> dict[str, Ratio]:
    return {ratio.what: ratio for ratio in ratios_of(RESULTS)}


def test_a_ratio_is_the_median_of_the_passes_own_ratios() -> None:
    drifting = result(OURS, CELL, 100.0, 50.0, 20.0), result("slow", CELL, 50.0, 20.0, 10.0)
    ratio = Ratio.of("one / other", *drifting)
    assert (ratio.value, ratio.lowest, ratio.highest) == (2.0, 2.0, 2.5)


def test_everybody_is_compared_in_the_same_cell_and_set_adapter_in_all() -> None:
    found = ratios()
    assert found["16 adapters in turn / llama-server"].value == pytest.approx(3.0)
    assert found["16 adapters in turn / PEFT set_adapter"].value == pytest.approx(9.0)
    assert found["16 adapters in turn / base only"].value == pytest.approx(0.9)
    assert found["base only / PEFT set_adapter"].value == pytest.approx(10.0)
    assert "base only / llama-server" not in found, "it was not measured there"


def test_residents_are_compared_with_none() -> None:
    holding, empty = result("16 residents", BASE, 99.0, 97.0), result("no resident", BASE, 100.0, 100.0)
    (ratio,) = ratio_of_residents([holding, empty])
    assert (ratio.what, ratio.value) == ("base only, 16 residents / no resident", 0.98)


def test_places_of_an_adapter_are_compared_with_the_bare_base_at_the_same_load() -> None:
    both, alone = replace(BASE, concurrency=2), replace(BASE, concurrency=1)
    results = [result("bare", alone, 50.0), result("bare", both, 80.0)]
    results += [result("merged", alone, 49.0), result("merged", both, 40.0)]
    found = {(ratio.what, ratio.load): ratio.value for ratio in ratios_of_merged(results)}
    assert found == {("merged / bare", "1 at once"): 0.98, ("merged / bare", "2 at once"): 0.5}


def test_a_rate_of_nothing_has_no_ratio() -> None:
    assert math.isnan(Ratio.of("x", result(OURS, CELL, 1.0), result("dead", CELL, 0.0)).value)


def full_report() -> Report:
    report = Report({"cores": 2}, {"rank": "16"}, upload_to_first_token_s=0.308, results=RESULTS)
    report.cold_start = ColdStart(100, SPREAD, SPREAD, 0.021)
    report.interference = Interference(100, 300, 288, 0, SPREAD, SPREAD, SPREAD, (1.5, 1.25, 1.0))
    report.footprints = [Footprint("started", 10, 3, 800 * MIB, 100 * MIB, 165 * MIB, 4096 * MIB, 75 * MIB)]
    report.process_bytes = {"llama-server": 500 * MIB}
    return report


def test_the_table_holds_every_figure() -> None:
    text = full_report().text()
    (line,) = [line for line in text.splitlines() if "llama-server " in line and "at once" in line][:1]
    assert line.split()[-5:] == ["12.0/34.0/560", "12.0/34.0/560", "12.0/34.0/560", "0", "0%"]
    assert "(15.0–33.0)" in line
    for figure in ("308 ms", "difference 21.0", "p99 × 1.25", "288 loads", "460.0", "500 MiB"):
        assert figure in text, figure


def test_columns_line_up() -> None:
    header, *rows = full_report().text().split("\n\n")[0].splitlines()[1:]
    assert {len(row) for row in rows} == {len(header)}


def test_a_noisy_machine_is_told_of() -> None:
    quiet, noisy = full_report(), full_report()
    noisy.results = [replace(r, figures=replace(r.figures, foreign_share=0.3)) for r in RESULTS]
    assert "NOT A QUIET MACHINE" not in quiet.text()
    assert "NOT A QUIET MACHINE: other programs had 30%" in noisy.text()


def test_what_requests_shared_is_told() -> None:
    report = full_report()
    cell = replace(CELL, kind="shared prefix", prefix_tokens=96)
    figures = replace(RESULTS[1].figures, cached_tokens=32 * 64)
    report.results = [*RESULTS, Result(OURS, cell, figures)]
    assert "most different adapters in one step: 16" in report.text()
    assert "shared prefix: 50% of the prompts' tokens were cached" in report.text()


def test_an_empty_report_prints_nothing() -> None:
    assert Report({}, {}).text() == ""


def test_json_holds_results_and_ratios(tmp_path: Path) -> None:
    full_report().write(tmp_path / "bench.json")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["results"][2]["figures"]["rates"] == [30.0, 15.0, 33.0]
    assert content["ratios"][0]["value"] > 1
    assert content["interference"]["ratios"] == [1.5, 1.25, 1.0]


def test_plots_are_pictures(tmp_path: Path) -> None:
    written = plot_all(full_report(), tmp_path, at=16)
    assert {path.name for path in written} >= {"throughput-clients.png", "latency.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_what_is_given_wins_over_quick() -> None:
    options = parse(["--quick", "--concurrency", "4", "2", "4"])
    assert (options.concurrency, options.passes) == ([2, 4], 1)
    assert parse([]).concurrency == [1, 8, 16, 32]


def test_every_cell_is_measured_once() -> None:
    cells = throughput_cells(parse([]))
    assert len(set(cells)) == len(cells)
    prefix = next(cell for cell in cells if cell.kind == "shared prefix")
    assert (prefix.prefix_tokens, prefix.prompt_tokens) == (96, 128)


def test_llama_server_needs_its_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--llama-server", "llama-server"])
    assert "--llama-cpp" in capsys.readouterr().err
