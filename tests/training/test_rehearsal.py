"""What is answered before the last step: a draft, on which no weight and no canary depends."""

from pathlib import Path
from typing import Any

import pytest

import training.outcome
import training.rehearsal
from tests.training.bases import BaseOf, bases_in, write_rows
from training.recipe import Recipe
from training.train import train


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> BaseOf:
    return bases_in(tmp_path_factory.mktemp("bases"), base_cache)


def recipe_for(folder: Path, out: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "data": write_rows(folder / "rows.jsonl"), "out": folder / out, "rank": 4, "max_steps": 4,
        "learning_rate": 5e-3, "products": "float32", "dropout": 0.1,
    }  # fmt: skip
    return Recipe.from_mapping(values | changes, source="test")


@pytest.mark.parametrize(
    ("quantization", "changes"),
    [
        ("nf4", {}),
        ("none", {"method": "pissa"}),
        ("none", {"method": "lora", "products": "bfloat16"}),
    ],
)
def test_a_run_is_the_same_to_the_byte_with_and_without_a_rehearsal(
    base_of: BaseOf,
    quantization: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout on: a rehearsal draws no random numbers, and leaves the model in training.

    PiSSA takes out of the base what it begins with; a base without 4-bit weights has bfloat16 by autocast.
    """
    base = base_of(quantization)
    rehearsed = train(recipe_for(tmp_path, "with/out", **changes), base, progress=False)
    monkeypatch.setattr(training.rehearsal.Rehearsal, "on_step_begin", lambda *_, **__: None)
    not_rehearsed = train(recipe_for(tmp_path, "without/out", **changes), base, progress=False)
    assert [p.loss for p in rehearsed.fit.losses] == [p.loss for p in not_rehearsed.fit.losses]
    for path in rehearsed.out.iterdir():
        assert path.read_bytes() == (not_rehearsed.out / path.name).read_bytes()


def test_a_last_step_that_changes_little_leaves_two_passes_after_it(
    base_of: BaseOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, passes = base_of("nf4"), []
    record = training.outcome.record_canary

    def counted(model: Any, *rest: Any) -> Any:
        hook = base.model.register_forward_pre_hook(lambda *_: passes.append(1))
        try:
            return record(model, *rest)
        finally:
            hook.remove()

    monkeypatch.setattr(training.outcome, "record_canary", counted)
    train(recipe_for(tmp_path, "out", schedule="cosine", max_steps=24), base, progress=False)
    assert len(passes) == 2


@pytest.mark.parametrize("changes", [{"canary_probes": 0}, {"method": "qdora"}])
def test_without_a_canary_nothing_is_rehearsed(
    base_of: BaseOf, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("there is nothing to rehearse")

    monkeypatch.setattr(training.rehearsal, "greedy_answers", never)
    train(recipe_for(tmp_path, "out", **changes), base_of("nf4"), progress=False)
