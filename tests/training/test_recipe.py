"""Recipes: where values come from, and what is refused."""

from pathlib import Path

import pytest

from training.errors import RecipeError
from training.methods import METHODS, OWN_SETTINGS
from training.recipe import Recipe

DATA, OUT = Path("rows.jsonl"), Path("out")


def recipe(**changes: object) -> Recipe:
    return Recipe.from_mapping({"data": DATA, "out": OUT} | changes, source="test")


def test_defaults_train_the_served_base() -> None:
    made = recipe()
    assert (made.method, made.base_quantization, made.learning_rate) == ("qlora", "nf4", None)
    assert made.effective_learning_rate == 2e-4
    assert made.effective_alpha == 2 * made.rank
    assert recipe(alpha=4).effective_alpha == 4


@pytest.mark.parametrize(("method", "quantization"), [("qlora", "nf4"), ("rslora", "nf4"), ("lora", "none")])
def test_method_decides_the_base(method: str, quantization: str) -> None:
    assert recipe(method=method).base_quantization == quantization


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_defaults_of_its_own_and_comes_back_from_a_report(method: str) -> None:
    made = recipe(method=method)
    kind = METHODS[method]
    assert made.effective_learning_rate == kind.learning_rate
    assert made.base_quantization == kind.quantizations[0]
    assert made.saved_rank == ({"pissa": 32}.get(method, 16) if "rank" in kind.settings else None)
    assert OWN_SETTINGS & made.to_mapping().keys() == kind.settings
    assert Recipe.from_mapping(made.to_mapping(), source="test") == made


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_a_method_does_not_know_is_not_ignored(method: str) -> None:
    """In Python, where only what differs from the default can be seen to be given, and in a file."""
    others: dict[str, object] = {
        "rank": 8, "alpha": 8.0, "dropout": 0.1, "target_modules": ("q_proj",), "lora_plus_ratio": 4.0,
        "virtual_tokens": 5,
    }  # fmt: skip
    assert others.keys() == OWN_SETTINGS
    for name in OWN_SETTINGS - METHODS[method].settings:
        with pytest.raises(RecipeError, match=f"sets {name}, which method {method} does not know"):
            Recipe(data=DATA, out=OUT, method=method, **{name: others[name]})
        default = getattr(recipe(), name)
        if default is not None:
            with pytest.raises(RecipeError, match=f"test sets {name}"):
                recipe(method=method, **{name: default})


def test_full_rates_are_ten_times_lower_and_few_parameters_take_higher_ones() -> None:
    rates = {name: method.learning_rate for name, method in METHODS.items()}
    assert rates["full"] == pytest.approx(rates["lora"] / 10)
    assert min(rates["ia3"], rates["prefix"], rates["prompt"], rates["bitfit"]) > rates["lora"]


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
        ({"method": "magic"}, "method is 'magic', must be one of qlora, lora, lora_8bit, rslora"),
        ({"rank": 0}, "rank is 0, must be a whole number from 1 to 1024"),
        ({"rank": 8.5}, "rank is 8.5, must be a whole number"),
        ({"rank": True}, "rank is True, must be a whole number"),
        ({"learning_rate": "2e-4"}, "in YAML write 2.0e-4"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"eval_fraction": 0.6}, "eval_fraction is 0.6"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"eval_data": "e.jsonl", "eval_fraction": 0.1}, "eval_data and eval_fraction are both given"),
        ({"packing": "no"}, "packing is 'no', must be true or false"),
        ({"packing": True, "method": "prompt"}, "rows of one sequence would share what is learned"),
        ({"packing": True, "method": "prefix"}, "not before each row; turn packing off"),
        ({"loss_on": "prompts"}, "loss_on is 'prompts', must be one of completions, all"),
        ({"on_too_long": "split"}, "on_too_long is 'split', must be one of cut, drop, fail"),
        ({"target_modules": ()}, r"target_modules is \(\), must be all-linear, attention, qv, mlp or names"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj', must be"),
        ({"publish": "127.0.0.1:1"}, "no name is given"),
        ({"learning_rat": 1e-3}, "did you mean learning_rate?"),
        ({"data": None}, "test does not set data"),
        (
            {"method": "ia3", "rank": 16},
            r"test sets rank, which method ia3 does not know \(it knows target_m",
        ),
        ({"method": "full", "target_modules": ["q_proj"]}, r"method full does not know \(it needs none\)"),
        ({"method": "lora", "lora_plus_ratio": 4}, "use one of lora_plus"),
        ({"method": "lora", "virtual_tokens": 4}, "use one of prefix, prompt"),
        ({"method": "bottleneck"}, "method is 'bottleneck': PEFT has no bottleneck adapters"),
        ({"method": "lora", "quantization": "nf4"}, "takes none: on a 4-bit base the same is called qlora"),
        ({"method": "pissa", "quantization": "nf4"}, "what is left would have to be quantised anew"),
        ({"method": "loftq", "quantization": "none"}, "an unquantised base has lost nothing"),
        ({"method": "qdora", "quantization": "int8"}, "PEFT has none for int8"),
        ({"method": "full", "quantization": "int8"}, "it trains on 16- or 32-bit weights"),
        ({"quantization": "int4"}, "quantization is 'int4', must be one of auto, nf4, fp4, int8, none"),
        ({"method": "lora_8bit", "double_quantization": True}, "int8 has no scales of blocks"),
        ({"method": "prefix", "gradient_checkpointing": True}, "turn it off, or use method prompt"),
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
