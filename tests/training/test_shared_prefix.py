"""Rows that begin alike, computed as one sequence: the loss and the gradients of separate rows, less work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base import Base
from training.attaching import attached
from training.batches import IGNORED, Collator, SequenceTrainer
from training.encoding import Example
from training.order import RowOrder
from training.recipe import Recipe
from training.shared_prefix import SharedPrefixCollator, can_share, common_beginning, one_sequence
from training.train import TrainingResult, train

BEGINNING = tuple(range(3, 33))
ROWS = [
    Example((*BEGINNING, 40, 41, 42, 50, 51, 2), ((33, 36),)),
    Example((*BEGINNING, 40, 43, 60, 2), ((32, 34),)),
    Example((*BEGINNING, 44, 45, 46, 47, 48, 70, 71, 72, 2), ((35, 39),)),
]


def features(examples: list[Example]) -> list[dict[str, Any]]:
    return [{"input_ids": example.token_ids, "examples": (example,)} for example in examples]


def both(base: Base, *, answers_only: bool = True) -> tuple[Collator, SharedPrefixCollator]:
    padded = Collator(0, answers_only=answers_only)
    return padded, SharedPrefixCollator(base, padded, answers_only=answers_only)


def gradients(base: Base, recipe: Recipe, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Of one batch, as the Trainer computes it."""
    torch.manual_seed(0)
    with attached(base, recipe, torch.float32) as trainee:
        model = trainee.model
        for name, parameter in model.named_parameters():  # else B is zero, and A has no gradient
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        trainer = SequenceTrainer(model=model)
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        return loss.item(), {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


@pytest.mark.parametrize("answers_only", [True, False])
def test_loss_and_gradients_are_those_of_separate_rows(
    base: Base, tmp_path: Path, answers_only: bool
) -> None:
    recipe = Recipe(data=tmp_path, out=tmp_path / "out", rank=4)
    padded, sharing = both(base, answers_only=answers_only)
    batch = sharing(features(ROWS))
    assert batch["input_ids"].shape == (1, 30 + 6 + 4 + 9)  # type: ignore[union-attr]  # a tensor
    loss, shared = gradients(base, recipe, batch)
    expected_loss, expected = gradients(base, recipe, padded(features(ROWS)))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert shared.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_row_that_sees_its_neighbour_would_be_noticed(base: Base, tmp_path: Path) -> None:
    """The same batch with a plain causal mask has other gradients: the test above can fail."""
    recipe = Recipe(data=tmp_path, out=tmp_path / "out", rank=4)
    padded, sharing = both(base)
    batch = sharing(features(ROWS))
    batch["visible"] = torch.ones_like(batch["visible"]).tril()  # type: ignore[arg-type]  # a tensor
    loss, _ = gradients(base, recipe, batch)
    expected, _ = gradients(base, recipe, padded(features(ROWS)))
    assert loss != pytest.approx(expected, rel=1e-3)


def test_the_beginning_ends_before_anything_that_is_learned() -> None:
    assert common_beginning(ROWS) == 30
    assert common_beginning(ROWS[:2]) == 31  # 40 too
    assert common_beginning([ROWS[0], ROWS[0]]) == 32  # 42 predicts what is learned, in each row anew
    assert common_beginning([Example((5, 6), ((1, 2),)), ROWS[0]]) == 0
    assert common_beginning([Example((5, 6), ((1, 2),))] * 2) == 0


def test_who_sees_whom() -> None:
    examples = [Example((1, 2, 3, 4), ((3, 4),)), Example((1, 2, 5, 6, 7), ((4, 5),))]
    batch = one_sequence(examples, 2)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]  # type: ignore[union-attr]  # tensors
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4]]  # type: ignore[union-attr]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [4, IGNORED, IGNORED, 7]]  # type: ignore[union-attr]
    assert batch["visible"][0, 0].int().tolist() == [  # type: ignore[index]
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1],
    ]
    assert batch["attention_mask"].sum() == 9  # type: ignore[union-attr]  # the tokens of both rows


def test_rows_that_have_nothing_in_common_are_padded(base: Base) -> None:
    _, sharing = both(base)
    examples = [Example((n, *BEGINNING), ((20, 31),)) for n in range(1, 5)]
    assert sharing(features(examples))["input_ids"].shape == (4, 31)  # type: ignore[union-attr]  # a tensor


def test_a_model_that_misreads_the_mask_is_found_out(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_share(base, ROWS)
    forward = base.model.forward

    def forgetful(**kwargs: Any) -> Any:
        return forward(**(kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"]).tril()}))

    monkeypatch.setattr(base.model, "forward", forgetful)
    assert not can_share(base, ROWS)


def test_a_whole_run_has_the_same_losses(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same rows in each step; of its own, a run whose rows are padded has another order."""
    monkeypatch.setattr(
        "training.fitting.RowOrder", lambda *given, **rest: RowOrder(*given, **(rest | {"padded": False}))
    )
    shared, apart = both_ways(base, tmp_path, rank=4)
    assert [p.loss for p in shared.fit.losses] == pytest.approx([p.loss for p in apart.fit.losses], rel=1e-3)
    assert shared.fit.losses != apart.fit.losses, "nothing was shared: rounding would differ"
    assert shared.fit.tokens == apart.fit.tokens


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_learned_positions_stand_before_each_row_and_never_before_a_shared_sequence(
    method: str, base: Base, tmp_path: Path
) -> None:
    with_sharing, without = both_ways(base, tmp_path, method=method)
    assert with_sharing.fit.losses == without.fit.losses  # to the bit: the setting changes nothing


def both_ways(base: Base, folder: Path, **settings: Any) -> tuple[TrainingResult, TrainingResult]:
    """A run whose rows begin alike, with share_prefixes and without."""
    rows = [
        {"prompt": f"answer this question please: {n}", "completion": f"{n * 7 % 10} ok"} for n in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared, apart = (
        train(
            Recipe(
                data=folder / "rows.jsonl", out=folder / str(share), max_steps=6, batch_size=4,
                learning_rate=5e-3, products="float32", share_prefixes=share, canary_probes=0, **settings,
            ),
            base,
            progress=False,
        )
        for share in (True, False)
    )  # fmt: skip
    return shared, apart
