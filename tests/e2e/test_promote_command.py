"""`quickchange train --promote-if …`: from the flags over the recipe to the alias, and what is printed."""

import json
from pathlib import Path

import pytest

from quickchange import Client
from quickchange.cli import main
from tests.e2e.process import ServerProcess
from tests.e2e.test_evaluate import ANSWERS, write_rows

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def by_heart(base: Path, server: ServerProcess, tmp_path: Path) -> list[str]:
    """A command whose adapter knows every held-out answer, which the base does not."""
    data = write_rows(tmp_path / "rows.jsonl", ANSWERS, 16)
    held_out = write_rows(tmp_path / "held.jsonl", ANSWERS, 6)
    command = ["train", "--base", str(base), "--method", "lora", "--quantization", "none", "--rank", "8"]
    command += ["--epochs", "8", "--learning-rate", "0.01", "--batch-size", "8", "--data", str(data)]
    return [*command, "--eval-data", str(held_out), "--publish", server.grpc]


def test_better_moves_the_alias_once(
    by_heart: list[str], client: Client, tmp_path: Path, capsys: Printed
) -> None:
    command = [*by_heart, "--name", "typed", "--promote-if", "better", "--alias", "live"]
    assert main([*command, "--out", str(tmp_path / "first")]) == 0
    printed = capsys.readouterr().out
    assert "published as typed@1" in printed
    assert "typed:live is typed@1 now: better than base, chrf +" in printed
    assert client.adapters.get("typed:live").version == 1

    assert main([*command, "--seed", "1", "--out", str(tmp_path / "second")]) == 0
    printed = capsys.readouterr().out
    assert "published as typed@2" in printed
    assert "typed:live was not moved: not better than typed@1, chrf +0 [0, 0]" in printed
    assert client.adapters.get("typed:live").version == 1


def test_the_metric_and_the_margin_are_those_of_the_flags(
    by_heart: list[str], client: Client, tmp_path: Path, capsys: Printed
) -> None:
    rule = ["--promote-metric", "exact", "--promote-margin", "1"]  # more than every row is not possible
    command = [*by_heart, "--name", "strict", "--promote-if", "better", *rule, "--out", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    promotion = json.loads(capsys.readouterr().out)["promotion"]
    assert (promotion["promoted"], promotion["alias"]) == (False, "strict:prod")
    assert "not better than base, exact +1 [1, 1], better on 12 rows" in promotion["reason"]
    assert promotion["reason"].endswith("margin 1")
    assert client.adapters.get("strict@1").aliases == ()


def test_never_compares_and_always_moves(
    by_heart: list[str], client: Client, tmp_path: Path, capsys: Printed
) -> None:
    command = [*by_heart, "--name", "forced", "--promote-if"]
    assert main([*command, "never", "--out", str(tmp_path / "never")]) == 0
    assert "forced:prod was not moved: promote_if is never; against base, chrf +" in capsys.readouterr().out
    assert client.adapters.get("forced@1").aliases == ()
    assert main([*command, "always", "--max-steps", "1", "--out", str(tmp_path / "always")]) == 0
    assert "forced:prod is forced@2 now: promote_if is always; it had base" in capsys.readouterr().out
    assert client.adapters.get("forced:prod").version == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--promote-if", "sometimes"], "promote_if is 'sometimes', must be one of better, always, never"),
        (["--promote-if", "better", "--promote-metric", "loss"], "promote_metric is 'loss', must be one of"),
        (["--alias", "live"], "alias is live, but nothing moves it; set promote_if"),
    ],
)
def test_what_cannot_be_decided_is_said_before_training(
    arguments: list[str], message: str, by_heart: list[str], tmp_path: Path, capsys: Printed
) -> None:
    assert main([*by_heart, "--name", "refused", *arguments, "--out", str(tmp_path / "out")]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
