"""Owns finding the batch of a file of rows that takes the most memory. Loads a tokenizer and no weights."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from adapters.support import supported_config
from adapters.text import generation_config, text_of
from training.data import TrainingData, prepare
from training.encoding import RowEncoder
from training.order import RowOrder
from training.packing import Pack
from training.recipe import Recipe
from training.row_lengths import Rows
from training.shape import ModelShape
from training.shared_prefix import common_beginning

_EPOCHS_LOOKED_AT: Final = 5
"""Each draws other batches; by then one with the longest rows was among them."""


def measured_rows(recipe: Recipe, shape: ModelShape, folder: Path) -> Rows:
    """The rows of a recipe as the tokenizer in `folder` sees them.

    Raises:
        DataError: the rows cannot be used.
        UnsupportedBaseError: the base cannot be trained here.
    """
    config = supported_config(folder)
    text = text_of(folder, config, generation_config(folder, config))
    length = min(recipe.max_length, text.max_context_tokens)
    encoder = RowEncoder(
        text.tokenizer,
        text.chat_template,
        text.eos_token_ids,
        length,
        loss_on=recipe.loss_on,
        on_too_long=recipe.on_too_long,
    )
    return heaviest_rows(prepare(recipe, encoder), recipe, shape)


def heaviest_rows(data: TrainingData, recipe: Recipe, shape: ModelShape, processes: int = 1) -> Rows:
    """Of the batches that will be learned, in their own order, the one with the most to keep.

    Args:
        processes: that learn together; any of them may get that batch.
    """
    shapes = (_batch(packs, recipe, shape) for packs in _batches(data, recipe, processes))
    longest, kept, shared = max(shapes, key=lambda found: found[0] * shape.layers + found[1])
    return Rows(longest, kept, shared, sum(map(_tokens, data.sequences)), len(data.sequences))


def _batches(data: TrainingData, recipe: Recipe, processes: int) -> Iterator[list[Pack]]:
    """Those of the first epochs, up to max_steps."""
    lengths = [_tokens(pack) for pack in data.sequences]
    passes = recipe.gradient_accumulation * processes
    padded = not (recipe.packing or _joins_rows(recipe))
    order = RowOrder(lengths, recipe.batch_size * passes, recipe.seed, padded=padded)
    left = None if recipe.max_steps is None else recipe.max_steps * passes
    for epoch in range(min(_EPOCHS_LOOKED_AT, math.ceil(recipe.epochs))):
        order.epoch = epoch
        indices = list(order)[: None if left is None else left * recipe.batch_size]
        for first in range(0, len(indices), recipe.batch_size):
            yield [data.sequences[index] for index in indices[first : first + recipe.batch_size]]
        left = None if left is None else max(0, left - math.ceil(len(indices) / recipe.batch_size))


def _batch(packs: Sequence[Pack], recipe: Recipe, shape: ModelShape) -> tuple[int, int, bool]:
    """Tokens a row, logits a row, whether the rows are one sequence."""
    width = max(map(_tokens, packs))
    kept = 1 + max(_kept(pack) for pack in packs)
    if not _joins_rows(recipe):
        return width, kept, False
    examples = [example for pack in packs for example in pack]
    shared = common_beginning(examples)
    together = shared + sum(len(example.token_ids) - shared for example in examples)
    if _work(shape, 1, together) >= _work(shape, len(examples), width):
        return width, kept, False
    learned = 1 + sum(example.learned_tokens for example in examples)
    return math.ceil(together / len(examples)), math.ceil(learned / len(examples)), True


def _joins_rows(recipe: Recipe) -> bool:
    """Whether rows that begin alike are one sequence, without padding."""
    alone = recipe.kind.family in ("prefix", "prompt")  # what is learned stands before each row
    return recipe.share_prefixes and not (alone or recipe.packing or recipe.neftune_alpha)


def _work(shape: ModelShape, rows: int, tokens: int) -> float:
    attention = 4.0 * shape.layers * shape.query_width * tokens
    return rows * tokens * (2.0 * shape.active_linear_parameters + attention)


def _tokens(pack: Pack) -> int:
    return sum(len(example.token_ids) for example in pack)


def _kept(pack: Pack) -> int:
    """Columns from the first that is learned to the last; of several examples those that are learned."""
    if len(pack) == 1:
        return len(pack[0].token_ids) - pack[0].learned_from
    return sum(example.learned_tokens for example in pack)
