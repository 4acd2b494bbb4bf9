"""The tensors of a step: what they say, and that decode steps come in few shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.batch import Batch, Row
from server.request import Request, SamplingParams
from server.sequence import Sequence
from server.step_tensors import StepBuffers, bucket

CPU = torch.device("cpu")
BLOCK_TOKENS, SPARE = 4, 99


def row(start: int, count: int, first_block: int) -> Row:
    """Of a sequence whose tokens are their positions and a hundred, in neighbouring blocks."""
    tokens = tuple(range(100, 100 + start + count))
    sequence = Sequence(Request("x", tokens, SamplingParams()), start + count + 1, 0.0)
    sequence.blocks = list(range(first_block, first_block + -(-(start + count) // BLOCK_TOKENS)))
    return Row(sequence, start, count)


def buffers() -> StepBuffers:
    return StepBuffers(CPU, BLOCK_TOKENS, SPARE)


def test_a_step_with_a_prompt_has_its_own_size() -> None:
    tensors = buffers().fill(Batch((row(5, 1, 0), row(2, 3, 7))))
    assert tensors.ids_T.tolist() == [105, 102, 103, 104]
    assert tensors.positions_T.tolist() == [5, 2, 3, 4]
    assert tensors.rows_S.tolist() == [0, 3]
    plan = tensors.plan
    assert plan.write_T.tolist() == [5, 7 * 4 + 2, 7 * 4 + 3, 8 * 4]
    assert plan.starts.tolist() == [0, 1, 4]
    assert plan.lengths_B.tolist() == [6, 5]
    assert plan.blocks_BM.tolist() == [[0, 1], [7, 8]]
    assert plan.max_queries == 3


@pytest.mark.parametrize(
    ("start", "count", "rows"),
    [(0, 4, []), (0, 5, [4]), (0, 8, [4, 5, 6, 7]), (2, 4, [2, 3]), (5, 3, [0, 1, 2]), (5, 1, [0])],
)
def test_an_answer_that_is_given_needs_logits_from_the_prompt_s_end_on(
    start: int, count: int, rows: list[int]
) -> None:
    """A prompt of five tokens, and four that are given, of which the last is not computed."""
    judging = SamplingParams(max_new_tokens=4, logprobs=0, ignore_eos=True)
    request = Request("x", (100, 101, 102, 103, 104), judging, given=(105, 106, 107, 108))
    sequence = Sequence(request, 9, 0.0)
    sequence.blocks = [0, 1]
    part = Row(sequence, start, count)
    tensors = buffers().fill(Batch((part,)))
    assert tensors.ids_T.tolist() == [100 + start + at for at in range(count)]
    assert tensors.rows_S.tolist()[: part.samples] == rows


def test_padding_belongs_to_nobody_and_writes_where_nobody_reads() -> None:
    tensors = buffers().fill(Batch(tuple(row(4 * index, 1, 10 * index) for index in range(5))))
    plan = tensors.plan
    assert tensors.ids_T.tolist()[5:] == tensors.positions_T.tolist()[5:] == [0]
    assert tensors.rows_S.tolist() == [0, 1, 2, 3, 4, 0]
    assert plan.write_T.tolist()[5:] == [SPARE * BLOCK_TOKENS]
    assert plan.starts.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert plan.lengths_B.tolist() == [1, 5, 9, 13, 17, 1]
    assert plan.blocks_BM.tolist()[1] == [10, 11, 11, 11, 11, 11]  # its own last, never another's
    assert plan.blocks_BM.tolist()[5] == [SPARE] * 6


def test_decode_steps_of_one_shape_use_the_same_memory() -> None:
    kept = buffers()
    first = kept.fill(Batch((row(4, 1, 0), row(5, 1, 2), row(6, 1, 4), row(7, 1, 6), row(0, 1, 8))))
    addresses = [tensor.data_ptr() for tensor in (first.ids_T, first.plan.write_T, first.plan.blocks_BM)]
    second = kept.fill(Batch(tuple(row(4 + index, 1, 3 * index) for index in range(4))))
    assert second.ids_T.shape != first.ids_T.shape
    third = kept.fill(Batch(tuple(row(1 + index, 1, 3 * index) for index in range(6))))
    assert [t.data_ptr() for t in (third.ids_T, third.plan.write_T, third.plan.blocks_BM)] == addresses
    assert third.ids_T.tolist() == [101, 102, 103, 104, 105, 106]


@given(st.integers(1, 5000))
def test_buckets_are_few_and_close(count: int) -> None:
    size = bucket(count)
    assert count <= size < 1.5 * count + 1
    assert bucket(size) == size
    assert len({bucket(each) for each in range(1, 257)}) == 16


def test_a_shape_is_kept_for_decoding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts have as many shapes as there are lengths."""
    made = []
    torch_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **keys: made.append(args) or torch_empty(*args, **keys))
    kept = buffers()
    for _ in range(3):
        kept.fill(Batch((row(0, 3, 0),)))
    prompts = len(made)
    for _ in range(3):
        kept.fill(Batch((row(3, 1, 0),)))
    assert (prompts, len(made) - prompts) == (9, 3)
