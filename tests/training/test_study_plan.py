"""A study's settings, its cells, and the search for learning rates."""

from pathlib import Path
from typing import Any

import pytest

from training.errors import StudyError
from training.rate_search import best, first_rate, needs_trials, next_rate
from training.recipe import Recipe
from training.study_plan import RateSearch, Study
from training.study_result import RateTrial


def study(**changes: Any) -> Study:
    return Study.from_mapping({"data": "rows.jsonl", "test": "test.jsonl", **changes}, source="it")


def names(**changes: Any) -> list[str]:
    return [cell.name for cell in study(**changes).cells()]


# Cells


def test_a_method_makes_no_cells_of_what_it_does_not_know() -> None:
    found = names(
        methods=["qlora", "full", "ia3", "prefix"], ranks=[4, 8], targets=["qv", ["q_proj", "o_proj"]]
    )
    assert found == [
        *("qlora-r4-qv-s0", "qlora-r4-q_proj+o_proj-s0", "qlora-r8-qv-s0", "qlora-r8-q_proj+o_proj-s0"),
        *("full-s0", "ia3-qv-s0", "ia3-q_proj+o_proj-s0", "prefix-s0"),
    ]


def test_all_of_a_seed_come_before_the_next_seed() -> None:
    assert names(methods=["qlora", "full"], seeds=[3, 4]) == [
        "qlora-r16-s3",
        "full-s3",
        "qlora-r16-s4",
        "full-s4",
    ]


def test_a_cell_is_a_recipe() -> None:
    compared = study(
        methods=["prefix", "lora"],
        targets=["attention"],
        recipe={"epochs": 2, "batch_size": 4},
        overrides={"prefix": {"virtual_tokens": 7}},
    )
    prefix, lora = compared.cells()
    values = compared.recipe_of(lora, out=Path("x"), learning_rate=1e-3)
    recipe = Recipe.from_mapping(values, source="it")
    assert (recipe.method, recipe.rank, recipe.target_modules) == ("lora", 16, "attention")
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (2, 4, 1e-3)
    assert compared.recipe_of(prefix, out=Path("x"))["virtual_tokens"] == 7
    assert "virtual_tokens" not in values
    assert [compared.quantization_of(cell) for cell in compared.cells()] == ["nf4", "none"]


def test_what_modules_are_meant_is_said() -> None:
    cells = study(methods=["qlora", "ia3", "full"]).cells()
    assert [cell.targets_text for cell in cells] == ["all-linear", "its own", None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, r"methods is \[\], must be a list of different values"),
        ({"methods": ["qlora", "qlora"]}, "must be a list of different values"),
        ({"methods": "qlora"}, "methods is 'qlora', must be a list"),
        ({"methods": ["qlor"]}, "method is 'qlor', must be one of"),
        ({"method": ["qlora"]}, "it sets 'method', which does not exist; there are data, test"),
        ({"ranks": [0]}, "qlora-r0-s0: rank is 0, must be a whole number from 1"),
        ({"test": None}, "it does not set test"),
        ({"rows": 0}, "rows is 0, must be a whole number from 1"),
        ({"rows": True}, "rows is True"),
        ({"recipe": {"rank": 4}}, "recipe sets rank, which a study sets itself; give methods, ranks"),
        ({"recipe": {"publish": "x:1"}}, "recipe sets publish, which has no place in a study"),
        (
            {"recipe": {"epoch": 1}},
            "qlora-r16-s0: the study sets 'epoch', which does not exist; did you mean",
        ),
        ({"overrides": {"full": {"data": "x"}}}, "overrides.full sets data"),
        ({"recipe": {"packing": True}, "methods": ["prefix"]}, "prefix-s0: packing is on, but"),
        ({"rates": {"factors": [1, -1]}}, r"rates.factors is \[1, -1\], must be positive numbers"),
        ({"rates": {"factors": []}}, "must be positive numbers"),
        ({"rates": {"factors": 3}}, "rates.factors is 3, must be a list"),
        ({"rates": {"steps": 1.5}}, "rates.steps is 1.5, must be a whole number"),
        ({"rates": {"eval_fraction": 0}}, "rates.eval_fraction is 0, must be above 0"),
        ({"rates": {"given": {"qlor": 1e-3}}}, "rates.given: method is 'qlor'"),
        ({"rates": {"given": {"qlora": "2e-4"}}}, "rates.given is '2e-4', must be positive"),
        ({"rates": {"step": 3}}, "it: rates sets 'step', which does not exist"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study(**changes)


def test_a_file_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("data: a.jsonl\ntest: b.jsonl\nmethods: [qlora]\nrates: {given: {qlora: 1.0e-3}}\n")
    found = Study.from_file(path, {"test": "c.jsonl", "ranks": [2]})
    assert (found.data, found.test, found.ranks) == (Path("a.jsonl"), Path("c.jsonl"), (2,))
    assert found.rates.given == {"qlora": 1e-3}
    path.write_text("- a")
    with pytest.raises(StudyError, match="must hold lines"):
        Study.from_file(path, {})


# Learning rates

SEARCH = RateSearch(factors=(1.0, 3.0, 10.0))


def searched(
    losses: dict[float, float | None], search: RateSearch = SEARCH, method: str = "qlora"
) -> list[float]:
    """All rates that are tried if these are the losses; a rate that is not among them fails the test."""
    tried: list[RateTrial] = []
    while (rate := next_rate(method, search, tried)) is not None:
        tried.append(RateTrial(learning_rate=rate, held_out_loss=losses[rate]))
    return [trial.learning_rate for trial in tried]


def test_a_best_rate_inside_the_grid_ends_the_search() -> None:
    assert searched({2e-4: 2.0, 6e-4: 1.0, 2e-3: 1.5}) == [2e-4, 6e-4, 2e-3]


def test_a_best_rate_at_an_end_is_looked_beyond_twice_at_most() -> None:
    rising = {2e-4: 3.0, 6e-4: 2.0, 2e-3: 1.0, 6.32e-3: 0.5, 0.02: 0.4}
    assert searched(rising) == [2e-4, 6e-4, 2e-3, 6.32e-3, 0.02]
    assert searched(rising | {6.32e-3: 1.5}) == [2e-4, 6e-4, 2e-3, 6.32e-3]
    assert searched({2e-4: 1.0, 6e-4: 2.0, 2e-3: 3.0, 6.32e-5: 1.2})[-1] == 6.32e-5


def test_runs_that_diverge_lead_downwards() -> None:
    assert searched({2e-4: None, 6e-4: None, 2e-3: None, 6.32e-5: None, 2e-5: 1.0})[-2:] == [6.32e-5, 2e-5]


def test_no_rate_is_beyond_what_a_recipe_takes() -> None:
    prompt = {3e-2: 3.0, 9e-2: 2.0, 0.3: 1.0, 0.949: 0.5}
    assert searched(prompt, method="prompt") == [3e-2, 9e-2, 0.3, 0.949]


def test_the_lowest_loss_wins() -> None:
    trials = [
        RateTrial(learning_rate=rate, held_out_loss=loss) for rate, loss in ((1, 2.0), (2, None), (3, 1.0))
    ]
    assert best(trials) == 3
    assert best(trials[1:2]) is None


def test_a_given_rate_needs_no_search() -> None:
    given = RateSearch(given={"qlora": 5e-4})
    assert not needs_trials("qlora", given)
    assert first_rate("qlora", given) == 5e-4
    assert needs_trials("lora", given)
    assert not needs_trials("lora", RateSearch(factors=(2.0,)))
    assert first_rate("lora", RateSearch(factors=(2.0,))) == 4e-4
