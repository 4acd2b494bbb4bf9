"""What a study's report says of given results: its tables, words, escapes, pictures and files."""

import base64
import csv
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tests.training.study_results import cell, failed, measured, score, study, trials
from training.document import Code, Document, Paragraph
from training.html_page import html_page
from training.labels import label_points
from training.markdown import cell as markdown_cell
from training.markdown import markdown
from training.metrics import JSON_EQUAL, LOSS
from training.study_costs import PEAK, TIME
from training.study_findings import best_quality, cheapest_good, least
from training.study_groups import groups_by_rank, groups_of
from training.study_report import write_study_report
from training.study_result import CellResult, StudyResult

ALWAYS = {"quality", "quality-time", "quality-memory", "memory", "losses"}


@dataclass
class Page(HTMLParser):
    """What a browser would find."""

    tags: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.images += [named["src"] or ""] if tag == "img" else []
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@dataclass
class Report:
    folder: Path
    markdown: str
    page: Page

    def section(self, title: str) -> str:
        """Markdown between this heading and the next."""
        assert f"\n## {title}\n" in self.markdown
        return self.markdown.split(f"\n## {title}\n")[1].split("\n## ")[0]

    def rows(self, title: str) -> dict[str, list[str]]:
        """The section's table, by first cell, without its header."""
        lines = [line for line in self.section(title).splitlines() if line.startswith("|")]
        cells = [[text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        assert all(len(row) == len(cells[0]) for row in cells)
        return {row[0]: row for row in (cells[0], *cells[2:])}

    def items(self, title: str) -> dict[str, str]:
        """The section's list."""
        return dict(re.findall(r"^- \*\*(.+?)\*\*: (.+)$", self.section(title), re.MULTILINE))


def report_of(result: StudyResult, folder: Path) -> Report:
    """Writes it, and checks what holds of every report."""
    write_study_report(result, folder)
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    text = (folder / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([\w-]+\.png)\)", text)
    assert sorted(linked) == sorted(path.name for path in folder.glob("*.png"))
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.images]
    assert embedded == [(folder / name).read_bytes() for name in linked]
    for image in embedded:
        with Image.open(BytesIO(image)) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.width >= 1000
            assert picture.height >= 150
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert len(colours) > 20  # not blank
    assert all(link.startswith(("#section-", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "b", "i", "iframe", "object"} & set(page.tags)
    return Report(folder, text, page)


def names(report: Report) -> set[str]:
    return {path.stem for path in report.folder.glob("*.png")}


def test_one_cell(tmp_path: Path) -> None:
    report = report_of(study(cell()), tmp_path)
    assert names(report) == ALWAYS
    header, row = report.rows("Quality").values()
    assert header == [
        "method", "rank", "modules", "learning rate", "answered by", "equal JSON, %", "chrF, of 100",
        "loss, nats per token",
    ]  # fmt: skip
    assert row == [
        "lora r16", "16", "all-linear", "2e-4", "server", "60.0 \\[55.0, 65.0\\]",
        "61.0 \\[60.0, 62.0\\]", "0.750",
    ]  # fmt: skip
    costs = report.rows("Time, memory and size")["lora r16"]
    assert costs[3:] == [
        "3.21 min", "412", "2.50 GB", "1.00 GB", "1.10 GB", "+10.0 %", "1.23 M", "4.90 MB",
    ]  # fmt: skip
    assert "no other has a figure" in report.items("What is best")["equal JSON, %"]
    assert "## Against" not in report.markdown
    assert "## Failed" not in report.markdown
    assert "Answered by:" not in report.markdown
    assert "The learning rate of lora was given." in report.markdown


def test_the_untrained_base_has_a_row_and_is_compared(tmp_path: Path) -> None:
    cells = [cell("lora"), cell("ia3", None, measured=measured(0.06))]
    report = report_of(study(*cells, base_scores={"json_equal": score(0.02, 0.01)}), tmp_path)
    assert report.rows("Quality")["untrained base"] == [
        "untrained base", "–", "–", "–", "–", "2.00 \\[1.00, 3.00\\]", "–", "–",
    ]  # fmt: skip
    said = report.items("What is best")["against the untrained base"]
    assert "2.00" in said
    assert "surely better: 1 of 2" in said  # ia3's interval begins at 0.01


def test_seeds_are_one_row_and_each_a_line_of_csv(tmp_path: Path) -> None:
    values = (0.58, 0.60, 0.65)
    cells = [cell(seed=seed, measured=measured(value)) for seed, value in enumerate(values)]
    report = report_of(study(*cells, failed("dora", "no memory")), tmp_path)
    row = report.rows("Quality")["lora r16"]
    assert row[4] == "3 of 3"
    deviation = 100 * statistics.stdev(values)
    half = math.hypot(5.0, 4.303 * deviation / math.sqrt(3))  # Student's t of two degrees of freedom
    assert row[6] == f"61.0 ± {deviation:.1f} \\[{61 - half:.1f}, {61 + half:.1f}\\]"
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["seed"] for line in lines] == ["0", "1", "2", "0"]
    assert [line["json_equal"] for line in lines] == ["0.58", "0.6", "0.65", ""]
    assert [line["state"] for line in lines] == ["done", "done", "done", "failed"]


def test_seeds_of_which_one_failed(tmp_path: Path) -> None:
    other = cell(seed=1, measured=None, error="killed")
    report = report_of(study(cell(), other), tmp_path)
    assert report.rows("Quality")["lora r16"][4] == "1 of 2"
    assert report.rows("Failed and missing runs")["lora-r16-s1"] == ["lora-r16-s1", "failed", "killed"]


def test_ranks_are_drawn_in_their_order(tmp_path: Path) -> None:
    cells = [cell(rank=rank) for rank in (32, 8, 16)]
    assert names(report_of(study(*cells, cell("dora")), tmp_path)) == ALWAYS | {"rank"}
    lines = groups_by_rank(groups_of([*cells, cell("dora")]))
    assert {label: [rank for rank, _ in line] for label, line in lines.items()} == {"lora": [8, 16, 32]}


def test_many_cells_are_named_in_a_legend(tmp_path: Path) -> None:
    cells = [cell(method, rank) for method in ("lora", "dora") for rank in range(4, 13)]
    report = report_of(study(*cells), tmp_path)
    assert len(report.rows("Quality")) == 1 + len(cells)


@pytest.mark.parametrize(("place", "count"), [(0.5, 8), (0.98, 4)])
def test_labels_of_points_in_one_place_do_not_overlap(place: float, count: int) -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_points(axes, [(place, place, f"name {number}") for number in range(count)])
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    assert len(boxes) == count
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent(renderer)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_against_full_fine_tuning(tmp_path: Path) -> None:
    full = measured(0.7, train_seconds=1926.0, peak_memory_bytes=10_000_000_000)
    cells = [
        cell("lora"),
        cell("qlora", measured=measured(0.5)),
        cell("full", None, targets=None, measured=full),
    ]
    rows = report_of(study(*cells), tmp_path).rows("Against full fine-tuning")
    header = rows["method"]
    assert rows.keys() == {"method", "lora r16", "qlora r16"}
    lora, qlora = rows["lora r16"], rows["qlora r16"]
    assert lora[header.index("training time")] == "0.100 ×"
    assert lora[header.index("peak memory")] == "0.250 ×"
    assert lora[header.index("equal JSON, %")] == "−10.0 ?"  # 65 meets 65
    assert qlora[header.index("equal JSON, %")] == "−20.0"


def test_without_full_fine_tuning_the_first_is_the_measure(tmp_path: Path) -> None:
    rows = report_of(study(cell("qlora"), cell("lora")), tmp_path).rows("Against qlora r16")
    assert rows.keys() == {"method", "lora r16"}


def test_full_fine_tuning_that_failed_is_no_measure(tmp_path: Path) -> None:
    report = report_of(study(failed("full", "no memory"), cell("qlora"), cell("lora")), tmp_path)
    assert report.rows("Against qlora r16").keys() == {"method", "lora r16"}
    assert "full r16" not in report.rows("Quality")


def test_failed_and_missing_cells(tmp_path: Path) -> None:
    result = study(cell(), failed("dora", "first line\nsecond line"), missing=("ia3-s0",))
    report = report_of(result, tmp_path)
    rows = report.rows("Failed and missing runs")
    assert rows["dora-r16-s0"] == ["dora-r16-s0", "failed", "first line<br>second line"]
    assert rows["ia3-s0"][1] == "missing"
    assert "1 of 3 runs are done" in report.markdown
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["state"] for line in lines] == ["done", "failed", "missing"]
    assert lines[1]["error"] == "first line\nsecond line"


@pytest.mark.parametrize("cells", [[], [failed("lora", "no memory")]])
def test_nothing_measured(tmp_path: Path, cells: list[CellResult]) -> None:
    report = report_of(study(*cells, missing=("qlora-r16-s0",)), tmp_path)
    assert names(report) == set()
    assert "nothing to compare" in report.markdown
    assert "qlora-r16-s0" in report.rows("Failed and missing runs")


def test_no_scores_at_all(tmp_path: Path) -> None:
    bare = measured(scores={}, test_loss=None)
    report = report_of(study(cell(measured=bare), cell("dora", measured=bare)), tmp_path)
    assert names(report) == {"memory", "losses"}
    assert report.rows("Quality")["lora r16"][-1] == "server"


def test_scores_without_numbers(tmp_path: Path) -> None:
    one = measured(scores={"exact": score(0.4, None), "json_equal": score(None)})
    other = measured(scores={"exact": score(0.5), "json_equal": score(None)}, test_loss=None)
    report = report_of(study(cell(measured=one), cell("dora", measured=other)), tmp_path)
    header = report.rows("Quality")["method"]
    assert "equal JSON, %" not in header  # none has a value of it
    assert report.rows("Quality")["lora r16"][header.index("exact match, %")] == "40.0"
    assert report.rows("Quality")["dora r16"][header.index("loss, nats per token")] == "–"
    assert "the difference is not sure" in report.items("What is best")["exact match, %"]


def test_hostile_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|*x*`y`[z](http://a)$\\frac{$"
    evil = cell(name, name=name, targets="<b>|</b>")
    result = study(
        evil, failed("dora", name), title=name, base={"name": name}, machine={name: name},
        settings={"a": f"```\n{name}"}, data={"train": {name: [name]}}, missing=(name,),
        base_scores={"json_equal": score(0.1)},
    )  # fmt: skip
    report = report_of(result, tmp_path)
    assert report.markdown.count("<script>") == 1  # in the fenced settings, where it is text
    assert f"`{name}" not in report.markdown.split("````yaml")[0]
    assert "".join(report.page.texts).count(name) >= 8
    row = next(row for first, row in report.rows("Quality").items() if first.startswith("&lt;script>"))
    assert row[0] == markdown_cell(f"{name} r16 <b>|</b>")
    assert row[2] == markdown_cell("<b>|</b>")
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)][::2] == [name, name]


def test_json_gives_the_cells_back(tmp_path: Path) -> None:
    cells = (cell(trials=trials(0.9, 0.8, None)), failed("dora", "ß|\n"))
    report_of(study(*cells, base_scores={"exact": score(None)}), tmp_path)
    values = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert tuple(CellResult.from_mapping(value) for value in values["cells"]) == cells
    assert values["base_scores"]["exact"]["value"] is None


def test_learning_rates(tmp_path: Path) -> None:
    tried = cell(trials=trials(0.9, 0.8, None), learning_rate=2e-4)
    edge = cell("dora", trials=trials(0.9, 0.8), learning_rate=2e-4)
    report = report_of(study(tried, edge, cell("ia3", None)), tmp_path)
    assert "rates" in names(report)
    section = report.section("Learning rates")
    assert (
        "| lora | – | 1e-4 | 0.900 |\n| lora | yes | 2e-4 | 0.800 |\n| lora | – | 4e-4 | diverged |"
        in section
    )
    assert "may be better: dora (2e-4)." in section
    assert "The learning rate of ia3 was given." in report.markdown


def test_prediction_of_memory(tmp_path: Path) -> None:
    cells = [cell(measured=measured(memory_error=0.1)), cell("dora", measured=measured(memory_error=-0.3))]
    assert report_of(study(*cells), tmp_path).items("Prediction of memory") == {
        "mean error": "20.0 %, without sign",
        "worst error": "−30.0 %, of dora-r16-s0",
        "aim": "at most 15.0 %: 1 of 2 runs are within it",
    }


def test_different_numbers_of_steps_are_said(tmp_path: Path) -> None:
    cells = [cell(), cell("dora", measured=measured(steps=18))]
    assert "in 18 to 20 optimizer steps" in report_of(study(*cells), tmp_path).markdown


def test_engines_are_explained(tmp_path: Path) -> None:
    report = report_of(study(cell("ia3", None, measured=measured(engine="reference"))), tmp_path)
    assert report.rows("Quality")["ia3"][4] == "reference"
    assert "Answered by:" in report.markdown


def test_what_is_best_is_sure_only_without_overlap() -> None:
    near, far = cell("dora", measured=measured(0.55)), cell("ia3", None, measured=measured(0.3))
    sure = groups_of([cell(), far])
    assert best_quality(sure, JSON_EQUAL).endswith("the difference from every other is sure")
    assert "not sure from any other (dora r16)" in best_quality(groups_of([near, cell()]), JSON_EQUAL)
    said = best_quality(groups_of([far, near, cell()]), JSON_EQUAL)
    assert said.startswith("lora r16 is best with 60.0")
    assert said.endswith("surely better than 1 of 2, but not than dora r16")
    assert best_quality(groups_of([cell(), cell("dora")]), JSON_EQUAL).startswith("all have 60.0")


def test_of_a_loss_the_lowest_is_best_and_without_intervals_nothing_is_sure() -> None:
    cells = [cell(), cell("dora", measured=measured(test_loss=0.5))]
    said = best_quality(groups_of(cells), LOSS)
    assert said.startswith("dora r16 is best with 0.500")
    assert "not sure from any other" in said


def test_cheapest_of_the_good() -> None:
    slow = cell("dora", measured=measured(0.62, train_seconds=300.0, peak_memory_bytes=1_000_000_000))
    bad = cell("ia3", None, measured=measured(0.1, train_seconds=1.0))
    good = cheapest_good(groups_of([cell(), slow, bad]), JSON_EQUAL)
    assert [text.split(" with ")[0] for _, text in good] == ["lora r16", "dora r16"]
    assert "2 that are not surely worse" in good[0][0]
    assert "time and memory decide" in cheapest_good(groups_of([cell(), slow]), JSON_EQUAL)[0][1]
    assert "lora r16 alone" in cheapest_good(groups_of([cell(), bad]), JSON_EQUAL)[0][1]


def test_times_of_seeds_that_overlap_are_not_surely_different() -> None:
    def runs(method: str, *seconds: float) -> list[CellResult]:
        return [
            cell(method, seed=seed, measured=measured(train_seconds=one)) for seed, one in enumerate(seconds)
        ]

    apart = groups_of([*runs("lora", 10.0, 11.0), *runs("dora", 20.0, 22.0)])
    assert least(apart, TIME) == "lora r16 with 10.5 s; the next, dora r16, takes 2.00 × as much"
    mixed = groups_of([*runs("lora", 10.0, 21.0), *runs("dora", 20.0, 22.0)])
    assert "overlap with dora r16, so that difference is not sure" in least(mixed, TIME)
    assert least(apart, PEAK) == "lora r16, dora r16 with 2.50 GB"


def test_labels_tell_modules_and_bases_apart_only_where_they_differ() -> None:
    cells = [cell(), cell(targets="attention"), cell("full", None, targets=None), cell(quantization="nf4")]
    labels = [group.label for group in groups_of(cells)]
    assert labels == ["lora r16 all-linear none", "lora r16 attention", "full", "lora r16 all-linear nf4"]
    assert [group.label for group in groups_of(cells[::2])] == ["lora r16", "full"]


def test_code_is_fenced_by_more_than_it_holds(tmp_path: Path) -> None:
    document = Document("#1", [Code("````\n</pre>\n", "yaml"), Paragraph("a\n# b")])
    assert markdown(document) == "# #1\n\n`````yaml\n````\n</pre>\n`````\n\na # b\n"
    assert "````\n&lt;/pre&gt;" in html_page(document, tmp_path)
