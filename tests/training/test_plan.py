"""Plans: what fits, what is proposed where nothing does, what the command says; without any weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quickchange.cli import main
from tests.models import build_tiny_model
from training.errors import RecipeError
from training.memory import predict_memory
from training.pace import CARDS, operations, seconds_per_batch
from training.plan import plan_run
from training.planning import plan
from training.published import SHAPES
from training.workload import Workload

WORK = Workload(
    method="lora", trains="lora", place="cuda", storage="none", batch_rows=8,
    targets=tuple(module.name for module in SHAPES["7B"].modules), row_tokens=1024, kept_tokens=256,
    activation_bytes=2, product_bytes=2,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = build_tiny_model(tmp_path / "tiny")
    for path in found.glob("*.safetensors"):
        path.unlink()  # a plan must not need them
    return found


def test_the_proposal_fits_and_nothing_cheaper_does() -> None:
    shape, device = SHAPES["7B"], CARDS["rtx4090"]
    planned = plan_run(shape, WORK, device, None)
    assert not planned.fits
    assert planned.proposal is not None
    assert planned.proposal.total_bytes <= device.memory_bytes
    assert "method" not in planned.proposal.settings  # another result, and something else is left
    smaller = replace(WORK, batch_rows=1, accumulates=True, checkpointing=True, optimizer="paged_adamw_8bit")
    assert predict_memory(shape, smaller).total_bytes <= device.memory_bytes


def test_four_bits_are_proposed_where_nothing_else_is_left() -> None:
    planned = plan_run(SHAPES["13B"], WORK, CARDS["rtx4090"], None)
    assert planned.proposal is not None
    assert planned.proposal.settings["method"] == "qlora"
    assert planned.proposal.total_bytes <= CARDS["rtx4090"].memory_bytes


def test_no_proposal_where_none_can_fit() -> None:
    assert plan_run(SHAPES["110B"], WORK, CARDS["t4"], None).proposal is None


def test_full_training_has_three_times_the_forwards_operations() -> None:
    full, frozen = replace(WORK, trains="all"), replace(WORK, trains="prefix", virtual_tokens=1)
    assert operations(SHAPES["7B"], full) / operations(SHAPES["7B"], frozen) == pytest.approx(1.5, rel=0.01)
    again = replace(full, checkpointing=True)
    assert operations(SHAPES["7B"], again) / operations(SHAPES["7B"], full) == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("trains", "storage", "measured"),
    [("full", "none", 1650), ("lora", "none", 3083), ("qlora", "nf4", 2413)],
)
def test_the_estimate_is_of_the_order_that_others_measured(trains: Any, storage: Any, measured: int) -> None:
    """torchtune's figures for Llama-3.1-8B on a 4090, in tokens a second."""
    llama = replace(SHAPES["7B"], kv_heads=8, inner=14336, vocabulary=128256)
    work = replace(WORK, trains=trains, storage=storage, batch_rows=2, row_tokens=512, kept_tokens=512)
    rate = work.tokens / seconds_per_batch(llama, work, CARDS["rtx4090"])
    assert 0.5 < rate / measured < 1.5


def test_rows_are_measured_and_the_time_follows(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "say", "completion": "x" * n}) + "\n" for n in (3, 40)))
    plans = plan({"base": str(folder), "data": data, "method": "qlora", "epochs": 2.0})
    assert plans.rows.count == 2
    assert not plans.rows.shares_prefixes or plans.rows.kept < 42
    assert plans.rows.tokens is not None
    assert plans.runs[0].seconds == pytest.approx(2 * plans.rows.tokens / plans.runs[0].tokens_per_s)


@pytest.mark.parametrize("setting", [{"method": "magic"}, {"base": "7B", "data": "rows.jsonl"}])
def test_what_cannot_be_planned_is_refused(folder: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        plan({"base": str(folder), "method": "qlora"} | setting)


def test_the_command_prints_every_method_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--base", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("full", "qlora", "qdora", "prefix", "ACTIVATIONS", "yes"))
    assert main(["plan", "--base", "70B", "--device", "h100", "--method", "qlora", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert not run["fits"]
    assert run["total_bytes"] == sum(run["memory"]["parts"].values())
    assert run["proposal"]["settings"]


def test_a_base_that_is_not_here_is_said_to_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--base", "nobody/nothing-here"]) == 1
    assert "is not on this machine" in capsys.readouterr().err


def test_the_published_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--published"]) == 0
    shown = capsys.readouterr().out
    assert "8x22B" in shown
    assert "weights alone" in shown
