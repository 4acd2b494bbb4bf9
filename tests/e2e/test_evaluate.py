"""Evaluation and promotion on a real server: what was learned by heart, and who gets the alias."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quickchange import Client
from quickchange.cli import main
from tests.e2e.process import ServerProcess
from training.errors import PublishError, RecipeError
from training.live import LiveModel
from training.recipe import Recipe
from training.train import TrainingResult, train

ANSWERS = {"What is it?": "a cat", "Who is it?": "me"}


def write_rows(path: Path, answers: dict[str, str], times: int) -> Path:
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in answers.items()] * times
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def learned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that knows both answers by heart."""
    folder = tmp_path_factory.mktemp("learned")
    data = write_rows(folder / "rows.jsonl", ANSWERS, 16)
    return train(recipe(base, data, folder / "by-heart"), progress=False).out


def recipe(base: Path, data: Path, out: Path, **changes: Any) -> Recipe:
    values = {"method": "lora", "rank": 8, "epochs": 8.0, "learning_rate": 0.01, "batch_size": 8}
    return Recipe(data=data, out=out, base=str(base), **(values | changes))


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "held-out.jsonl", ANSWERS, 6)


# evaluate


def test_an_adapter_of_a_server_against_the_base(
    learned: Path,
    held_out: Path,
    server: ServerProcess,
    client: Client,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client.adapters.push(learned, "known")
    out = tmp_path / "report"
    command = ["evaluate", "--data", str(held_out), "--server", server.grpc, "--adapter", "known"]
    command += ["--base", str(base), "--quantization", "none", "--max-new-tokens", "20", "--out", str(out)]
    assert main(command) == 0
    assert "exact match" in capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    ours, theirs = found["model"]["metrics"], found["against"]["metrics"]
    assert (found["model"]["name"], found["against"]["name"]) == ("known@1", "base")
    assert ours["exact"]["value"] == ours["ended"]["value"] == 1.0
    assert ours["exact"]["interval"][0] == pytest.approx(0.7575, abs=1e-3)  # Wilson: 12 of 12
    assert theirs["exact"]["value"] == 0.0
    assert ours["loss"]["value"] < 0.1 < theirs["loss"]["value"]
    assert found["loss"].startswith("of the reference answers, in a float32 pass")
    difference = found["differences"]["chrf"]
    assert difference["wins"] == 12
    assert difference["interval"][0] > 0
    page = (out / "evaluation.md").read_text()
    assert "| known@1 | a cat |" in page
    assert "### line 1" in page


def test_a_folder_on_a_server_of_its_own(
    learned: Path, held_out: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--data", str(held_out), "--base", str(base), "--quantization", "none"]
    command += ["--adapter", str(learned), "--rows", "5", "--seed", "3", "--max-new-tokens", "20", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["name"] == str(learned)
    assert (found["data"]["rows"], len(found["rows"])) == (5, 5)
    assert found["model"]["metrics"]["exact"]["value"] == 1.0
    assert found["differences"]["loss"]["value"] < 0
    assert main([*command, "--against", "none"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["model"]["metrics"] == found["model"]["metrics"]
    assert not {"against", "differences"} & alone.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "who answers?"),
        (["--server", "127.0.0.1:1", "--against", "base"], "--against compares with --adapter"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--data", str(held_out), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_malformed_row_is_named_before_anybody_is_asked(
    held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out.write_text(held_out.read_text() + "{}\n")
    assert main(["evaluate", "--data", str(held_out), "--server", "127.0.0.1:1"]) == 1
    assert "line 13" in capsys.readouterr().err


# promotion


def promoted(base: Path, server: ServerProcess, folder: Path, name: str, **changes: Any) -> TrainingResult:
    data = write_rows(folder / "rows.jsonl", changes.pop("answers", ANSWERS), 16)
    held_out = write_rows(folder / "held.jsonl", ANSWERS, 6)
    values = {"publish": server.grpc, "name": name, "promote_if": "better", "eval_data": held_out}
    return train(recipe(base, data, folder / changes.pop("out", "out"), **(values | changes)), progress=False)


def record_of(result: TrainingResult) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((result.artefacts / "promotion.json").read_text())
    return loaded


def test_what_is_better_gets_the_alias_and_what_is_not_does_not(
    base: Path, server: ServerProcess, client: Client, tmp_path: Path
) -> None:
    first = promoted(base, server, tmp_path, "promo", out="first")
    assert first.promotion is not None
    assert first.promotion.promoted
    assert first.promotion.against == "base"
    assert client.adapters.get("promo:prod").version == 1
    labels = client.adapters.get("promo@1").labels
    assert (labels["promotion"], labels["promotion/against"]) == ("promoted", "base")
    assert "chrf" in labels["promotion/reason"]
    seconds = json.loads((first.artefacts / "training.json").read_text())["seconds_to_first_token"]
    parts = ["finish", "save", "canary", "check", "report", "tidy", "upload", "first_token"]
    assert list(seconds) == ["total", *parts]
    assert seconds["total"] == pytest.approx(sum(seconds[part] for part in parts))

    again = promoted(base, server, tmp_path, "promo", out="tie", seed=1)  # other weights, the same answers
    assert again.promotion is not None
    assert (again.published, again.promotion.promoted) == ("promo@2", False)
    assert again.promotion.difference is not None
    assert again.promotion.difference.value == 0.0

    worse = promoted(base, server, tmp_path, "promo", out="worse", answers={"What is it?": "nothing at all"})
    assert worse.promotion is not None
    assert str(worse.promotion).startswith("promo:prod was not moved: not better than promo@1, chrf -")
    record = record_of(worse)
    assert (record["promoted"], record["against"], record["reference"]) == (False, "promo@1", "promo@3")
    assert record["difference"]["losses"] == 12
    assert client.adapters.get("promo:prod").version == 1
    assert client.adapters.get("promo@3").labels["promotion"] == "not-promoted"


def test_always_moves_without_a_comparison_and_never_compares_without_a_move(
    base: Path, server: ServerProcess, client: Client, tmp_path: Path
) -> None:
    never = promoted(base, server, tmp_path, "modes", out="never", promote_if="never", alias="shadow")
    assert never.promotion is not None
    assert not never.promotion.promoted
    assert never.promotion.difference is not None
    assert never.promotion.difference.interval.low > 0
    assert client.adapters.get("modes@1").aliases == ()
    always = promoted(base, server, tmp_path, "modes", out="always", promote_if="always", max_steps=1)
    assert always.promotion is not None
    assert always.promotion.promoted
    assert always.promotion.difference is None
    assert client.adapters.get("modes:prod").version == 2


def test_an_alias_that_moved_meanwhile_stays_there(
    base: Path,
    server: ServerProcess,
    client: Client,
    learned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client.adapters.push(learned, "raced")
    ask = LiveModel.answers

    def somebody_is_faster(model: LiveModel, *args: Any, **options: Any) -> Any:
        client.adapters.alias("raced", "prod", 1)
        return ask(model, *args, **options)

    monkeypatch.setattr(LiveModel, "answers", somebody_is_faster)
    result = promoted(base, server, tmp_path, "raced", seed=1)
    assert result.promotion is not None
    assert (result.published, result.promotion.promoted) == ("raced@2", False)
    assert "somebody else moved it meanwhile" in result.promotion.reason
    assert client.adapters.get("raced:prod").version == 1


def test_a_server_that_goes_away_leaves_what_is_published(
    base: Path, own_server: Callable[..., ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = own_server()
    ask = LiveModel.answers

    def killed(model: LiveModel, *args: Any, **options: Any) -> Any:
        server.process.kill()
        server.process.wait()
        return ask(model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LiveModel, "answers", killed)
        with pytest.raises(
            PublishError,
            match=r"lost@1 is published .* and stays, but .* not compared.*prod is where it was",
        ):
            promoted(base, server, tmp_path, "lost")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with own_server(server.store).client() as client:
        assert client.adapters.get("lost@1").aliases == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"publish": None}, "nothing is published"),
        ({"eval_data": None}, "needs held-out rows"),
        ({"promote_metric": "json_equal"}, "no held-out answer is JSON"),
        ({"promote_metric": "loss"}, "promote_metric is 'loss', must be one of chrf"),
    ],
)
def test_a_promotion_that_cannot_be_decided_is_refused_before_training(
    changes: dict[str, Any], message: str, base: Path, server: ServerProcess, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        promoted(base, server, tmp_path, "refused", **changes)
    assert not (tmp_path / "out").exists()
