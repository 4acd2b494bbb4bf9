"""`quickchange study` as a user runs it: real processes, a real server, interruptions, kills."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quickchange.cli import main
from tests.e2e.process import environment, eventually
from tests.training.bases import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAINING = "  training, learning rate"


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(
        f"data: {write_rows(tmp_path / 'rows.jsonl')}\n"
        f"test: {write_rows(tmp_path / 'test.jsonl')}\n"
        f"base: {base}\n"
        "test_rows: 6\n"
        "methods: [lora, prefix, full]\n"
        "ranks: [2]\n"
        "rates: {factors: [1, 10], steps: 2, given: {full: 1.0e-4, prefix: 1.0e-2}}\n"
        "recipe: {epochs: 30, batch_size: 4, checkpoint_every_s: 0.1}\n"
        "max_new_tokens: 8\n"
    )
    return path


class Study:
    """The command as a process, and what it said on standard error."""

    def __init__(self, config: Path, out: Path, said: Path) -> None:
        self.said = said
        with said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "quickchange", "study", "--config", str(config), "--out", str(out)],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment({}),
            )

    def wait_for_checkpoint(self, out: Path) -> None:
        """Until the run of the first cell could go on from one."""
        eventually(
            lambda: list((out / "cells").glob("lora-*/result.unfinished/checkpoint-*/whole.json")), 300
        )


@pytest.fixture
def started() -> Iterator[list[Study]]:
    studies: list[Study] = []
    yield studies
    for study in studies:
        study.process.kill()
        study.process.communicate()


def test_a_study_is_interrupted_killed_and_ends(
    config: Path, tmp_path: Path, started: list[Study], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    first = Study(config, out, tmp_path / "first")
    started.append(first)
    first.wait_for_checkpoint(out)
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(120) == 130
    assert first.said.read_text().splitlines()[-1] == f"error: {out}: stopped; the same command goes on"
    assert not (out / "cells" / "lora-r2-s0" / "cell.json").exists()

    second = Study(config, out, tmp_path / "second")
    started.append(second)
    eventually(lambda: TRAINING in second.said.read_text(), 120)
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait()
    eventually(lambda: not _trainers(out), 300)  # what it had started ends by itself

    assert main(["study", "--config", str(config), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [cell["name"] for cell in result["cells"]] == ["lora-r2-s0", "prefix-s0", "full-s0"]
    assert [cell["measured"]["engine"] for cell in result["cells"]] == ["server", "reference", "server"]
    assert all(cell["measured"]["steps"] == 30 * 12 for cell in result["cells"])
    page = (out / "report" / "report.html").read_text()
    assert all(name in page for name in ("lora", "prefix", "full"))

    before = _times(out / "cells")
    assert main(["study", "--config", str(config), "--out", str(out)]) == 0
    assert _times(out / "cells") == before  # only the report is written anew
    assert "compare 3 runs" in capsys.readouterr().out


def test_a_dry_run_lists_the_cells(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--config", str(config), "--dry-run"]) == 0
    assert re.findall(r"^(\S+-s0)", capsys.readouterr().out, re.MULTILINE) == [
        "lora-r2-s0",
        "prefix-s0",
        "full-s0",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "study.yaml", "test.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--out is needed"),
        (["--out", "x", "--ranks", "0"], 2, "rank is 0"),
        (["--out", "x", "--report-only"], 1, "x does not exist; run the study first"),
    ],
)
def test_misuse(
    config: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "--config", str(config), *arguments]) == code
    assert message in capsys.readouterr().err


def _times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def _trainers(out: Path) -> str:
    """Processes that train for a study."""
    found = subprocess.run(
        ["pgrep", "-f", f"train --config {out}"], capture_output=True, text=True, check=False
    )
    return found.stdout
