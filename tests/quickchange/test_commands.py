"""The commands that hand over to the server and to training: what they pass on, and how they fail."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import training.fitting
import training.merge
import training.train
from adapters.errors import UnsupportedBaseError
from quickchange.cli import main
from quickchange.commands import train
from quickchange.commands.failure import CommandError, needs_extra
from server.config import ServerSettings
from server.setting_sources import all_settings
from tests.adapters.builders import hollow_adapter
from tests.models import build_tiny_model
from training.curve import LossPoint
from training.errors import DivergedError
from training.foresight import MemoryReport
from training.memory import MIB
from training.recipe import Recipe

WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder

EXTRAS = ("torch", "transformers", "prometheus_client", "yaml", "grpc_reflection")

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from quickchange.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("argv", "extra"),
    [
        (("serve", "--base", "x"), "server"),
        (("merge", "--base", "x", "--adapter", "y", "--out", "z"), "server"),
        (("train", "--data", "x", "--out", "y"), "train"),
        (("export", "--format", "gguf", "--model", "x", "--out", "y"), "train"),
    ],
)
def test_without_the_extra_the_command_says_what_to_install(
    argv: tuple[str, ...], extra: str, tmp_path: Path
) -> None:
    hollow_adapter(tmp_path / "y")
    command = [sys.executable, "-c", WITHOUT_TORCH, *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: this command needs the package ")
    assert result.stderr.endswith(f"pip install 'quickchange[{extra}]'\n")
    assert result.stderr.count("\n") == 1


def test_a_missing_module_of_ours_is_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError), needs_extra("server"):
        import server.nonsense  # type: ignore[import-not-found]  # noqa: F401 - its absence is the test
    with pytest.raises(CommandError), needs_extra("server"):
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401 - its absence is the test


# serve


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """What the server would have been started with."""
    import server.app

    seen: list[ServerSettings] = []

    def record(settings: ServerSettings) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(server.app, "serve", record)
    return seen


def test_serve_passes_flags_over_environment_over_file(
    served: list[ServerSettings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "server.toml"
    config.write_text("[engine]\nmax_running_requests = 3\nblock_tokens = 8\n[grpc]\nport = 1\n")
    monkeypatch.setenv("QUICKCHANGE_ENGINE_MAX_RUNNING_REQUESTS", "4")
    monkeypatch.setenv("QUICKCHANGE_GRPC_PORT", "2")
    argv = ("serve", "--config", str(config), "--base", "b", "--store", str(tmp_path), "--port", "0")
    assert main((*argv, "--metrics-port", "0", "--adapter-device-bytes", "64MiB")) == 0
    settings = served[0]
    assert (settings.base.source, settings.store.root) == ("b", tmp_path)
    assert (settings.grpc.port, settings.metrics.port) == (0, 0)
    assert (settings.engine.block_tokens, settings.engine.max_running_requests) == (8, 4)
    assert settings.engine.adapter_device_bytes == 64 * 1024 * 1024


def test_every_setting_has_a_flag_of_its_own(
    served: list[ServerSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    flags = {word.strip("[") for word in shown.split() if word.startswith(("--", "[--"))}
    assert len(flags - {"--help", "--config"}) == len(list(all_settings()))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "--base"),
        (("--base", "b", "--port", "70000"), "70000"),
        (("--base", "b", "--device", "tpu"), "tpu"),
        (("--base", "b", "--config", "/nowhere.toml"), "/nowhere.toml"),
    ],
)
def test_serve_refuses_bad_settings_in_one_line(
    served: list[ServerSettings], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    assert main(("serve", *argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert served == []


def test_threads_are_set_only_if_asked(served: list[ServerSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert main(["serve", "--base", "b"]) == 0
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert main(["serve", "--base", "b", "--threads", "3"]) == 0
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert served[1].engine.threads == 3


# train

MEMORY = "memory: 2.0 MiB more than before training, 2.0 MiB predicted (+0%)"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """What would have been trained."""
    seen: list[Recipe] = []

    def record(recipe: Recipe, **_: Any) -> training.train.TrainingResult:
        seen.append(recipe)
        if recipe.seed == 13:
            raise DivergedError("the loss is nan at step 3; lower the rate")
        fit = training.fitting.Fit(5, 100, 1.0, 10, "adamw", "float32", 0, (LossPoint(1, 0.5, 0.0),), ())
        facts: Any = None
        report: Any = None
        memory = MemoryReport("step", {}, 4 * MIB, 4 * MIB, 2 * MIB, 2 * MIB, 0.0, "by nobody")
        return training.train.TrainingResult(
            recipe.out, recipe.out, facts, report, fit, memory, recipe.publish
        )

    monkeypatch.setattr(training.train, "train", record)
    return seen


def test_every_setting_of_a_recipe_has_a_flag() -> None:
    flags = {flag.name for flag in train._FLAGS}
    flags |= {"gradient_checkpointing", "share_prefixes", "packing", "double_quantization", "exceed_memory"}
    assert flags == {field.name for field in dataclasses.fields(Recipe)}


def test_defaults_in_the_help_are_the_recipe_s() -> None:
    shown = {flag.name: flag.help.rpartition("(")[2].rstrip(")") for flag in train._FLAGS if "(" in flag.help}
    kinds = {flag.name: flag.kind for flag in train._FLAGS}
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    for name, text in shown.items():
        if name not in ("alpha", "learning_rate", "alias"):  # which depend on others
            assert kinds[name](text) == defaults[name], name


def test_train_passes_the_recipe_on(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("train", "--data", "d.jsonl", "--out", str(tmp_path / "o"), "--rank", "4", "--epochs", "0.5")
    more = ("--target-modules", "q_proj,v_proj", "--gradient-checkpointing", "--learning-rate", "1e-3")
    assert main((*argv, *more, "--publish", "h:1", "--name", "sql")) == 0
    recipe = trained[0]
    assert (recipe.rank, recipe.epochs, recipe.learning_rate) == (4, 0.5, 1e-3)
    assert recipe.target_modules == ("q_proj", "v_proj")
    assert recipe.gradient_checkpointing
    assert (recipe.method, recipe.publish) == ("qlora", "h:1")
    out = capsys.readouterr().out
    assert out == f"{tmp_path}/o: loss 0.5000 after 5 steps\n{MEMORY}\npublished as h:1\n"


def test_train_flags_win_over_the_file(trained: list[Recipe], tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("data: d.jsonl\nrank: 4\nseed: 5\n")
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "o"), "--seed", "6"]) == 0
    assert (trained[0].rank, trained[0].seed) == (4, 6)
    assert main(["train", "--target-modules", "all-linear", "--config", str(config), "--out", "o"]) == 0
    assert trained[1].target_modules == "all-linear"


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ((), 2, "data"),
        (("--data", "d", "--rank", "0"), 2, "rank"),
        (("--config", "/nowhere.yaml"), 2, "/nowhere.yaml"),
        (("--data", "d", "--seed", "13"), 3, "lower the rate"),
    ],
)
def test_train_fails_in_one_line(
    trained: list[Recipe], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, words: str
) -> None:
    assert main(("train", "--out", "o", *argv)) == code
    err = capsys.readouterr().err
    assert words in err
    assert (err[:7], err.count("\n")) == ("error: ", 1)


@pytest.fixture
def real(tmp_path: Path, base_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that really trains: a tiny base and twelve rows, one of them too long."""
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(base_cache))
    folder = build_tiny_model(tmp_path / "base")
    rows = [*(f"say {n},{n * 7 % 10} ok" for n in range(11)), "say," + "x" * 60]
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "".join(f"{row}\n" for row in rows))
    files = ["--base", str(folder), "--data", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "out")]
    return ["train", *files, "--max-length", "40", "--max-steps", "1", "--packing", "--device", "cpu"]


def test_a_dry_run_says_what_there_is_to_learn(
    real: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*real, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("learned   12 rows, 12 examples, ")
    assert lines[-1] == "cut       1 row (line 13), longer than max_length 40: their end is not learned"
    assert main([*real, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["train"]["cut"], report["packing"]) == (12, [13], True)
    assert main([*real, "--dry-run", "--on-too-long", "fail"]) == 1
    assert "rows.csv line 13: longer than max_length 40" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_says_the_same_to_whoever_watches(
    real: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*real, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert main([*real, "--progress"]) == 0
    assert told in capsys.readouterr().err
    for more in (["--progress", "--json"], []):
        shutil.rmtree(tmp_path / "out")
        assert main([*real, *more]) == 0
        assert "longer than max_length" not in capsys.readouterr().err


# merge


def test_merge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def merged(base: str, adapter: Path, out: Path, **options: Any) -> training.merge.MergeReport:
        if base == "odd":
            raise UnsupportedBaseError("odd cannot be quantised")
        if out == tmp_path:
            raise FileExistsError(f"{out} exists already")
        shard_sizes.append(options["shard_bytes"])
        return training.merge.MergeReport(out, base, "f", "d", options["into"], options["dtype"], 7, 1.25)

    shard_sizes: list[int] = []

    monkeypatch.setattr(training.merge, "merge_adapter", merged)
    argv = ("merge", "--adapter", str(hollow_adapter(tmp_path / "a")), "--dtype", "float32")
    assert main((*argv, "--base", "b", "--out", "o")) == 0
    assert capsys.readouterr().out == "o: 7 layers changed, |ΔW| 1.25, float32\n"
    assert main((*argv, "--base", "odd", "--out", "o")) == 1
    assert main((*argv, "--base", "b", "--out", str(tmp_path))) == 1
    assert capsys.readouterr().err == f"error: odd cannot be quantised\nerror: {tmp_path} exists already\n"
    for size in ("16MB", "1GiB", "4096"):
        assert main((*argv, "--base", "b", "--out", "o", "--shard-size", size)) == 0
    assert shard_sizes == [2_000_000_000, 16_000_000, 2**30, 4096]
    with pytest.raises(SystemExit):
        main((*argv, "--base", "b", "--out", "o", "--shard-size", "0GB"))
    assert "'0GB' is no size such as 5GB or 500MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "--base", "x", "--out", "z"),
        ("certify", "--base", "x", "--merged", "z", "--data", "rows"),
        ("combine", "--base", "x", "--out", "z"),
        ("export", "--format", "peft", "--out", "z"),
        ("export", "--format", "gguf-lora", "--base", "x", "--out", "z"),
    ],
)
def test_a_folder_without_an_adapter_is_named(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, complaint in ((tmp_path / "none", "is not a folder"), (tmp_path, "has no adapter_config")):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--adapter", str(folder)])
        assert ended.value.code == 2
        assert f"argument --adapter: {folder} {complaint}" in capsys.readouterr().err


def test_a_weight_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hollow_adapter(tmp_path / "a")
    with pytest.raises(SystemExit):
        main(["combine", "--base", "x", "--out", "z", "--adapter", f"{folder}=much"])
    assert "'much' is no weight; write DIR=0.5" in capsys.readouterr().err
