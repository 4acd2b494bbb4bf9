"""Batches: exact labels, and packs that compute what their examples compute alone, in every architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from tests.models import ARCHITECTURES, VOCABULARY, Architecture, build_tiny_model, build_tokenizer
from training.attaching import takes_logits_to_keep
from training.batches import IGNORED, Collator, PackCollator, Sequences
from training.encoding import Example, RowEncoder
from training.packing import Pack, alone, packed
from training.readers import Place
from training.rows import Row

EOS: int = build_tokenizer().eos_token_id
SHORT, LONG = Example((11, 12, 13), ((1, 3),)), Example((21, 22, 23, 24, 25, 26), ((4, 6),))
TWO_ANSWERS = Example((31, 32, 33, 34, 35), ((1, 2), (4, 5)))


def features(*packs: Pack) -> list[dict[str, Any]]:
    sequences = Sequences(packs)
    return [sequences[index] for index in range(len(sequences))]


def test_collator_pads_left_and_masks_exactly() -> None:
    batch = Collator(0, answers_only=False)(features((SHORT,), (LONG,), (TWO_ANSWERS,)))
    tensors = {name: value.tolist() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert tensors["input_ids"] == [[0, 0, 0, 11, 12, 13], [*range(21, 27)], [0, *range(31, 36)]]
    assert tensors["attention_mask"] == [[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]]
    assert tensors["position_ids"] == [[0, 0, 0, 0, 1, 2], [*range(6)], [0, 0, 1, 2, 3, 4]]
    assert tensors["labels"] == [
        [IGNORED, IGNORED, IGNORED, IGNORED, 12, 13],
        [IGNORED, IGNORED, IGNORED, IGNORED, 25, 26],
        [IGNORED, IGNORED, 32, IGNORED, IGNORED, 35],
    ]


def test_collator_keeps_the_logits_that_predict_answers_and_no_more() -> None:
    batch = Collator(0, answers_only=True)(features((SHORT,), (LONG,)))
    assert batch["logits_to_keep"] == 3
    assert batch["labels"].tolist() == [[IGNORED, 12, 13], [IGNORED, 25, 26]]
    batch = Collator(0, answers_only=True)(features((TWO_ANSWERS,), (LONG,)))
    assert batch["logits_to_keep"] == 5


def test_padding_may_be_the_end_token_and_the_end_is_still_learned() -> None:
    encoder = RowEncoder(build_tokenizer(), None, frozenset({EOS}), 512)
    texts = [example for text in ("a", "bcd") for example in encoder.encode(Row(Place(1), text=text))]
    labels = Collator(EOS, answers_only=False)(features(*alone(texts)))["labels"]
    assert isinstance(labels, torch.Tensor)
    assert labels[:, -1].tolist() == [EOS, EOS]
    assert labels[0].tolist() == [IGNORED, IGNORED, IGNORED, EOS]


def test_pack_collator_restarts_positions_and_masks_exactly() -> None:
    batch = PackCollator(9, answers_only=False, flat=False)(features((SHORT, TWO_ANSWERS), (LONG,)))
    tensors = {name: value.tolist() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert tensors["input_ids"] == [[11, 12, 13, *range(31, 36)], [*range(21, 27), 9, 9]]
    assert tensors["position_ids"] == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]]
    assert tensors["attention_mask"] == [[1] * 8, [1] * 6 + [0, 0]]
    no = IGNORED
    assert tensors["labels"] == [[no, 12, 13, no, 32, no, no, 35], [no, no, no, no, 25, 26, no, no]]


def test_pack_collator_keeps_the_columns_that_predict_anything() -> None:
    """Columns 0, 1, 3 and 6 of the first pack, 3 and 4 of the second; the last once more, unused."""
    batch = PackCollator(9, answers_only=True, flat=False)(features((SHORT, TWO_ANSWERS), (LONG,)))
    assert batch["logits_to_keep"].tolist() == [0, 1, 3, 4, 6, 6]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, 12, 13, 32, no, 35], [no, no, no, 25, 26, no]]


def test_flat_packs_are_one_row_without_padding() -> None:
    """As FlashAttention wants them: transformers finds each example's boundaries in the positions."""
    batch = PackCollator(9, answers_only=False, flat=True)(features((SHORT, TWO_ANSWERS), (LONG,)))
    assert batch["input_ids"].tolist() == [[11, 12, 13, *range(31, 36), *range(21, 27)]]
    (begins, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert begins.tolist() == [0, 3, 8, 14]
    assert longest == 6


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pack_computes_what_its_examples_compute_alone(
    architecture: Architecture, flat: bool, tmp_path: Path
) -> None:
    """Loss and every gradient, in float32; windows of tiny models are shorter than the packs."""
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path, architecture)).eval()
    examples = random_examples(9)
    packs = packed(examples, 40, seed=0)
    assert 1 < len(packs) < len(examples)
    answers_only = takes_logits_to_keep(model)
    batch = PackCollator(0, answers_only=answers_only, flat=flat)(features(*packs))
    loss, gradients = computed(model, batch)
    expected, expected_gradients = computed_alone(model, examples)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        gradients, expected_gradients, rtol=1e-3, atol=1e-5 * float(expected_gradients.abs().max())
    )


def test_without_boundaries_a_pack_computes_something_else(tmp_path: Path) -> None:
    """What the test above would see if examples saw each other, or positions went on."""
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path)).eval()
    examples = random_examples(9)
    batch = PackCollator(0, answers_only=True, flat=True)(features(tuple(examples)))
    _, expected = computed_alone(model, examples)
    through = batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    masked = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    for wrong, unmasked in ((through, True), (masked, False)):
        _, found = computed(model, wrong, unmasked=unmasked)
        assert (found - expected).norm() > 0.1 * expected.norm()


def random_examples(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for index in range(count):
        length = 3 + 3 * index
        ids = tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())
        spans = ((1, length),) if index % 3 == 0 else ((2, length),)
        examples.append(
            Example(ids, ((1, 2), (length - 2, length)) if index % 3 == 1 and index > 1 else spans)
        )
    return examples


def computed(model: Any, batch: dict[str, Any], *, unmasked: bool = True) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(**{name: v for name, v in batch.items() if not (unmasked and name == "attention_mask")}).loss
    loss.backward()
    return float(loss.detach()), gradients_of(model)


def computed_alone(model: Any, examples: list[Example]) -> tuple[float, torch.Tensor]:
    """Each by itself, from all of its logits."""
    model.zero_grad()
    learned = sum(example.learned_tokens for example in examples)
    total = 0.0
    for example in examples:
        ids = torch.tensor([example.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        where = torch.tensor([position for begin, end in example.spans for position in range(begin, end)])
        loss = F.cross_entropy(logits[where - 1], ids[0, where], reduction="sum") / learned
        loss.backward()
        total += float(loss.detach())
    return total, gradients_of(model)


def gradients_of(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# Which examples share a sequence


@pytest.mark.parametrize("count", [1, 15, 16, 17, 200])
def test_every_example_is_in_one_pack_and_packs_are_nearly_full(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(2, 65, (count,), generator=generator).tolist()
    examples = [Example(tuple(range(length)), ((1, length),)) for length in lengths]
    packs = packed(examples, 64, seed=1)
    sizes = [sum(len(example.token_ids) for example in pack) for pack in packs]
    assert max(sizes) <= 64
    assert sorted(map(id, examples)) == sorted(id(example) for pack in packs for example in pack)
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // 64) + 1  # what first fit, longest first, never exceeds
    assert packed(examples, 64, seed=1) == packs
