"""Recipes: where values come from, and what is refused."""

from pathlib import Path

import pytest

from training.errors import RecipeError
from training.recipe import Recipe

DATA, OUT = Path("rows.jsonl"), Path("out")


def recipe(**changes: object) -> Recipe:
    return Recipe.from_mapping({"data": DATA, "out": OUT} | changes, source="test")


def test_defaults_train_the_served_base() -> None:
    made = recipe()
    assert (made.method, made.quantization, made.target_modules) == ("qlora", "nf4", "all-linear")
    assert made.effective_alpha == 2 * made.rank
    assert recipe(alpha=4).effective_alpha == 4


@pytest.mark.parametrize(("method", "quantization"), [("qlora", "nf4"), ("rslora", "nf4"), ("lora", "none")])
def test_method_decides_the_base(method: str, quantization: str) -> None:
    assert recipe(method=method).quantization == quantization


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: a.jsonl\nout: a\nrank: 4\nlearning_rate: 1.0e-3\ntarget_modules: [q_proj, v_proj]\n"
    )
    made = Recipe.from_file(path, {"rank": 32, "out": "b", "epochs": None})
    assert (made.rank, made.out, made.learning_rate, made.epochs) == (32, Path("b"), 1e-3, 3.0)
    assert made.target_modules == ("q_proj", "v_proj")


def test_to_mapping_makes_the_same_recipe_again() -> None:
    made = recipe(target_modules=("q_proj",), alpha=3.5, max_steps=7, publish="h:1", name="x", eval_data=DATA)
    assert Recipe.from_mapping(made.to_mapping(), source="test") == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dora"}, "method is 'dora', must be one of lora, qlora, rslora"),
        ({"rank": 0}, "rank is 0, must be a whole number from 1 to 1024"),
        ({"rank": 8.5}, "rank is 8.5, must be a whole number"),
        ({"rank": True}, "rank is True, must be a whole number"),
        ({"learning_rate": "2e-4"}, "in YAML write 2.0e-4"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"eval_fraction": 0.6}, "eval_fraction is 0.6"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"eval_data": "e.jsonl", "eval_fraction": 0.1}, "eval_data and eval_fraction are both given"),
        ({"packing": "no"}, "packing is 'no', must be true or false"),
        ({"loss_on": "prompts"}, "loss_on is 'prompts', must be one of completions, all"),
        ({"on_too_long": "split"}, "on_too_long is 'split', must be one of cut, drop, fail"),
        ({"target_modules": ()}, r"target_modules is \(\), must be all-linear or names"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj', must be"),
        ({"publish": "127.0.0.1:1"}, "no name is given"),
        ({"learning_rat": 1e-3}, "did you mean learning_rate?"),
        ({"data": None}, "test does not set data"),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("rank: [1", "is not YAML"), ("- rank", "must hold lines such as"), ("rank: 4", "does not set data")],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_file(path)


def test_missing_file() -> None:
    with pytest.raises(RecipeError, match="No such file"):
        Recipe.from_file(Path("/no/such/recipe.yaml"))
