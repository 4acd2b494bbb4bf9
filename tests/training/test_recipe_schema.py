"""The schema says what recipes are, the copy is what the code makes, and the examples are recipes."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from adapters.base import load_base
from adapters.bundle import read_bundle
from quickchange.cli import main
from tests.models import build_tiny_model
from training.errors import RecipeError
from training.methods import METHODS
from training.recipe import Recipe
from training.recipe_checks import RANGES, LossOn
from training.recipe_schema import recipe_schema, schema_text

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/recipes"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
SCHEMA = recipe_schema()
PROPERTIES: dict[str, Any] = SCHEMA["properties"]


def method_with(setting: str) -> str:
    return next((name for name, method in METHODS.items() if setting in method.settings), "qlora")


def recipe(**changes: object) -> Recipe:
    return Recipe.from_mapping({"data": "rows.jsonl", "out": "out"} | changes, source="test")


# The schema


def test_the_copy_is_what_the_code_makes() -> None:
    assert (FOLDER / "recipe.schema.json").read_text() == schema_text()


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA


def test_it_is_a_schema_and_every_example_is_valid_by_it() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    validator = Draft202012Validator(SCHEMA)
    for example in EXAMPLES:
        validator.validate(yaml.safe_load(example.read_text()))


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"rank": "8"}, {"method": "qlor"}, {"rnak": 8}, {"trackers": "none"}, {"data": None}],
)
def test_it_refuses_what_the_recipe_refuses(wrong: dict[str, object]) -> None:
    values = {"data": "rows.jsonl", "out": "out"} | wrong
    with pytest.raises(ValidationError):
        Draft202012Validator(SCHEMA).validate(values)
    with pytest.raises(RecipeError):
        recipe(**values)


def test_it_knows_every_setting_and_no_other() -> None:
    assert PROPERTIES.keys() == set(Recipe.__dataclass_fields__)
    assert SCHEMA["additionalProperties"] is False
    assert all(values["description"] for values in PROPERTIES.values())
    assert not any("Attributes" in values["description"] for values in PROPERTIES.values())


def test_types_and_choices() -> None:
    assert PROPERTIES["seed"]["type"] == "integer"
    assert PROPERTIES["alpha"]["type"] == ["number", "null"]
    assert PROPERTIES["data"]["type"] == "string"
    assert PROPERTIES["eval_data"]["type"] == ["string", "null"]
    assert PROPERTIES["packing"]["type"] == "boolean"
    assert PROPERTIES["loss_on"]["enum"] == list(get_args(LossOn))
    assert PROPERTIES["promote_if"]["enum"] == ["better", "always", "never", None]
    assert set(PROPERTIES["method"]["enum"]) == set(METHODS)
    assert PROPERTIES["trackers"] == {
        "description": PROPERTIES["trackers"]["description"],
        "type": "array", "items": {"type": "string", "minLength": 1}, "default": ["tensorboard"],
    }  # fmt: skip
    assert PROPERTIES["target_modules"]["anyOf"][0]["enum"] == ["all-linear", "attention", "qv", "mlp"]


def test_defaults_are_those_of_a_recipe() -> None:
    made = recipe().to_mapping() | recipe(method="prefix").to_mapping() | {"method": "qlora"}
    for name, values in PROPERTIES.items():
        if "default" in values and name != "lora_plus_ratio":
            assert values["default"] == made[name], name
    assert PROPERTIES["lora_plus_ratio"]["default"] == recipe(method="lora_plus").lora_plus_ratio


@pytest.mark.parametrize("name", RANGES)
def test_what_the_schema_calls_the_limits_the_recipe_takes_and_no_more(name: str) -> None:
    low, high = PROPERTIES[name]["minimum"], PROPERTIES[name]["maximum"]
    base: dict[str, Any] = {"method": method_with(name)}
    if name == "early_stopping":
        base["eval_fraction"] = 0.1
    for value in (low, high):
        assert getattr(recipe(**(base | {name: value})), name) is not None
    for value in (low - 1, high + 1):
        with pytest.raises(RecipeError, match=name):
            recipe(**(base | {name: value}))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_rule_that_forbids_what_it_does_not_know(method: str) -> None:
    (rule,) = (rule for rule in SCHEMA["allOf"] if rule["if"]["properties"]["method"]["const"] == method)
    assert ("required" in rule["if"]) == (method != recipe().method)
    then = rule["then"]["properties"]
    for name in (name for name, allowed in then.items() if allowed is False):
        with pytest.raises(RecipeError, match=f"sets {name}"):
            recipe(method=method, **{name: 8})
    for choice in then["quantization"]["enum"]:
        assert recipe(method=method, quantization=choice).quantization == choice
    for choice in set(PROPERTIES["quantization"]["enum"]) - set(then["quantization"]["enum"]):
        with pytest.raises(RecipeError, match="takes"):
            recipe(method=method, quantization=choice)


@pytest.mark.parametrize("value", ["Apache 2.0", "", "x" * 65, 2])
def test_a_licence_is_a_name(value: object) -> None:
    assert recipe(license="apache-2.0").license == "apache-2.0"
    with pytest.raises(RecipeError, match="license is"):
        recipe(license=value)


# The examples


def test_there_is_an_example_of_everything() -> None:
    assert {path.stem for path in EXAMPLES} == {
        "dora", "exercise", "full", "lora-ranks", "prefix", "publish-and-promote", "qlora", "small-memory",
    }  # fmt: skip
    listed = (FOLDER / "README.md").read_text()
    assert all(f"({path.name})" in listed for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_recipe(path: Path) -> None:
    assert Recipe.from_file(path).out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_names_the_schema_and_sets_what_it_knows(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert (path.parent / first.partition("$schema=")[2]).is_file()
    for name, value in yaml.safe_load(path.read_text()).items():
        allowed = PROPERTIES[name]
        if "enum" in allowed:
            assert value in allowed["enum"]
        if "minimum" in allowed:
            assert allowed["minimum"] <= value <= allowed["maximum"]


@pytest.mark.slow
def test_the_exercise_runs(tmp_path: Path, base_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its page says, on a tiny model and with few steps: prepare, train, compare ranks, merge, load."""
    page = (ROOT / "docs/guides/exercise.md").read_text()
    script = page.split("```python\n", 1)[1].split("```", 1)[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(base_cache))
    exec(compile(script, "exercise.md", "exec"), {})
    assert len(Path("learned.jsonl").read_text().splitlines()) >= 1000
    assert len(Path("held-out.jsonl").read_text().splitlines()) == 200
    base = str(build_tiny_model(tmp_path / "tiny"))
    shutil.copyfile(FOLDER / "exercise.yaml", "exercise.yaml")
    for rank in (4, 8):
        arguments = ["--base", base, "--rank", str(rank), "--out", f"ranks/r{rank}", "--max-steps", "6"]
        assert main(["train", "--config", "exercise.yaml", *arguments]) == 0
        bundle = read_bundle(Path(f"ranks/r{rank}"))
        assert bundle is not None
        assert bundle.training is not None
        assert bundle.training.recipe["rank"] == rank
        assert bundle.training.metrics["held_out_rows"] == 200
        assert (Path(f"ranks/r{rank}") / "README.md").is_file()
    merged = ["--base", base, "--adapter", "ranks/r8", "--out", "merged"]
    assert main(["merge", *merged]) == 0
    served = load_base("merged", device="cpu", progress=False)
    assert served.chat_template == load_base(base, device="cpu", progress=False).chat_template
