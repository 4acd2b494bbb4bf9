"""From rows to answers: train, publish through the client, ask the server that holds the same base."""

import json
from pathlib import Path

import pytest

from adapters.base import load_base
from quickchange import Client
from quickchange.cli import main
from tests.e2e.process import ServerProcess
from training.errors import PublishError
from training.recipe import Recipe
from training.train import train

ROWS = [("What is it?", "a cat"), ("Who is it?", "me")]


@pytest.fixture
def recipe_file(tmp_path: Path, base: Path) -> Path:
    """A recipe that learns two answers by heart on the base that the test servers hold."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS * 16]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base": str(base), "data": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / "out"),
        "method": "lora", "rank": 8, "epochs": 8.0, "learning_rate": 0.01, "batch_size": 8,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return tmp_path / "recipe.yaml"


def test_the_command_trains_and_publishes_what_then_answers(
    recipe_file: Path, server: ServerProcess, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["train", "--config", str(recipe_file), "--publish", server.grpc, "--name", "by-heart"])
    assert code == 0
    assert "published as by-heart@1" in capsys.readouterr().out
    for prompt, completion in ROWS:
        chat = [{"role": "user", "content": prompt}]
        answer = client.generate(chat, adapter="by-heart", max_new_tokens=20)
        assert (answer.text, answer.finish_reason) == (completion, "stop")
        assert client.generate(chat, max_new_tokens=20).text != completion
    report = client.adapters.push(recipe_file.with_name("out"), "again", validate_only=True).report
    canary = report.check("canary")  # which training recorded, and the upload above passed too
    assert canary is not None
    assert canary.outcome == "passed"
    assert canary.detail.startswith("36 tokens of 3 prompts: ")
    adapter = client.adapters.get("by-heart")
    assert adapter.base_fingerprint == client.server_info().base_fingerprint


def test_a_server_with_another_base_is_noticed_before_training(
    recipe_file: Path, base: Path, server: ServerProcess, base_cache: Path
) -> None:
    """The same model in NF4 is another base: its adapters were trained against other weights."""
    nf4 = load_base(str(base), purpose="train", device="cpu", cache_dir=base_cache, progress=False)
    recipe = Recipe.from_file(recipe_file, {"method": "qlora", "publish": server.grpc, "name": "wrong"})
    with pytest.raises(
        PublishError, match="give its base as --base, and method qlora for nf4 or lora for none"
    ):
        train(recipe, nf4, progress=False)
    assert not recipe.out.exists()


def test_a_refused_upload_keeps_the_adapter(recipe_file: Path, server: ServerProcess) -> None:
    recipe = Recipe.from_file(recipe_file, {"publish": server.grpc, "name": "bad name!", "max_steps": 2})
    with pytest.raises(
        PublishError, match=r"is trained, but .* upload it later with `quickchange adapters push"
    ):
        train(recipe, progress=False)
    assert (recipe.out / "adapter_model.safetensors").is_file()
