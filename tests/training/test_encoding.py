"""Rows to tokens: exact spans, several answers in one sequence, and what is too long."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import CHAT_TEMPLATE, build_tokenizer
from training.data import prepare
from training.encoding import Example, RowEncoder
from training.errors import DataError
from training.readers import Place
from training.recipe import Recipe, TooLong
from training.rows import Row, turn

EOS: int = build_tokenizer().eos_token_id
ENDING_TEMPLATE = CHAT_TEMPLATE.replace("<|end|>", "</s>")
"""Ends turns with the token that ends answers: a chat begins with every earlier answer's sequence."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def encoder_for(
    tokenizer: Any, *, template: str | None = CHAT_TEMPLATE, max_length: int = 512, **settings: Any
) -> RowEncoder:
    return RowEncoder(tokenizer, template, frozenset({tokenizer.eos_token_id}), max_length, **settings)


def chat(*contents: str, number: int = 1) -> Row:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    turns = tuple(turn(roles[index % 2], content) for index, content in enumerate(contents))
    return Row(Place(number), messages=turns)


def learned_texts(tokenizer: Any, example: Example) -> list[str]:
    return [tokenizer.decode(example.token_ids[begin:end]) for begin, end in example.spans]


def test_only_the_answer_and_its_end_are_learned(tokenizer: Any) -> None:
    (example,) = encoder_for(tokenizer).encode(chat("hi", "yo"))
    assert tokenizer.decode(example.token_ids[: example.learned_from]) == "<|user|>hi<|end|><|assistant|>"
    assert learned_texts(tokenizer, example) == ["yo</s>"]
    assert example.learned_tokens == 3


def test_answers_share_a_sequence_where_each_sees_what_the_server_would_show(tokenizer: Any) -> None:
    encoder = encoder_for(tokenizer, template=ENDING_TEMPLATE)
    (example,) = encoder.encode(chat("a", "bb", "c", "d", "e", "ff"))
    assert tokenizer.decode(example.token_ids) == (
        "<|user|>a</s><|assistant|>bb</s><|user|>c</s><|assistant|>d</s><|user|>e</s><|assistant|>ff</s>"
    )
    assert learned_texts(tokenizer, example) == ["bb</s>", "d</s>", "ff</s>"]


def test_answers_stay_apart_where_the_template_ends_them_otherwise(tokenizer: Any) -> None:
    first, second = encoder_for(tokenizer).encode(chat("a", "b", "c", "d"))
    assert tokenizer.decode(first.token_ids) == "<|user|>a<|end|><|assistant|>b</s>"
    assert tokenizer.decode(second.token_ids).endswith("b<|end|><|user|>c<|end|><|assistant|>d</s>")
    assert learned_texts(tokenizer, second) == ["d</s>"]


def test_only_those_answers_stay_apart_that_are_rendered_otherwise(tokenizer: Any) -> None:
    """A template that trims: the first answer has blanks around it, the second has none."""
    template = ENDING_TEMPLATE.replace("message['content']", "message['content'] | trim")
    first, rest = encoder_for(tokenizer, template=template).encode(chat("a", " b ", "c", "d", "e", "f"))
    assert learned_texts(tokenizer, first) == [" b </s>"]
    assert learned_texts(tokenizer, rest) == ["d</s>", "f</s>"]
    assert "<|assistant|>b</s>" in tokenizer.decode(rest.token_ids)


def test_an_earlier_answer_that_only_begins_alike_is_not_taken_for_the_same(tokenizer: Any) -> None:
    """The template drops past answers; the next question happens to begin as the answer did."""
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    examples = encoder_for(tokenizer, template=template).encode(chat("a", "b", "b</s>", "d"))
    assert [tokenizer.decode(example.token_ids) for example in examples] == ["ab</s>d</s>"]
    assert learned_texts(tokenizer, examples[0]) == ["b</s>", "d</s>"]
    first, second = encoder_for(tokenizer, template=template).encode(chat("a", "b", "c", "d"))
    assert tokenizer.decode(first.token_ids) == "ab</s>"
    assert tokenizer.decode(second.token_ids) == "acd</s>"


def test_all_of_a_text_is_learned_but_its_first_token_which_nothing_predicts(tokenizer: Any) -> None:
    (example,) = encoder_for(tokenizer).encode(Row(Place(1), text="abc"))
    assert example == Example((*tokenizer("abc")["input_ids"], EOS), ((1, 4),))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, ENDING_TEMPLATE])
def test_all_of_a_chat_is_learned_if_asked_for(tokenizer: Any, template: str) -> None:
    encoder = encoder_for(tokenizer, template=template, loss_on="all")
    (example,) = encoder.encode(chat("a", "b", "c", "d"))
    answers_only = encoder_for(tokenizer, template=template).encode(chat("a", "b", "c", "d"))
    assert example.token_ids == answers_only[-1].token_ids
    assert example.spans == ((1, len(example.token_ids)),)


def test_the_end_is_what_the_template_writes_if_the_server_stops_there(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    stops_at_both = RowEncoder(tokenizer, CHAT_TEMPLATE, frozenset({EOS, end}), 512)
    assert stops_at_both.end_id == end
    assert encoder_for(tokenizer).end_id == EOS


def test_a_template_that_refuses_names_the_line(tokenizer: Any) -> None:
    template = "{% if messages[0]['content'] == 'a' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"line 9: the base's chat template refuses it: no"):
        encoder_for(tokenizer, template=template).encode(chat("a", "b", number=9))
    with pytest.raises(DataError, match="the base's chat template refuses a question and its answer: never"):
        encoder_for(tokenizer, template="{{ raise_exception('never') }}")


# What is too long

SHORT = {"prompt": "short", "completion": "ok"}  # 11 tokens
ENDLESS = {"prompt": "short", "completion": "x" * 40}
HOPELESS = {"prompt": "p" * 40, "completion": "ok"}


def recipe_for(folder: Path, *rows: object, **settings: Any) -> Recipe:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(data=path, out=folder / "out", **settings)


def test_long_rows_are_cut_counted_and_teach_no_ending(tokenizer: Any, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, SHORT, ENDLESS, HOPELESS)
    data = prepare(recipe, encoder_for(tokenizer, max_length=20))
    assert (data.report.train.cut, data.report.train.dropped) == ((2,), (3,))
    assert data.report.train.longest == 49
    cut = data.train[1]
    assert len(cut.token_ids) == 20
    assert EOS not in cut.token_ids
    assert learned_texts(tokenizer, cut) == ["x" * 12]


@pytest.mark.parametrize(
    ("on_too_long", "kept", "cut", "dropped"), [("cut", 3, (1,), ()), ("drop", 1, (), (1,))]
)
def test_a_chat_is_too_long_as_a_whole(
    tokenizer: Any, on_too_long: TooLong, kept: int, cut: tuple[int, ...], dropped: tuple[int, ...]
) -> None:
    """Its first answers are left if it may be cut, in one sequence or in several; else nothing of it is."""
    rows = [chat("a", "b", "c", "ddd", "e" * 20, "f"), chat("a", "b", number=2)]
    for template in (CHAT_TEMPLATE, ENDING_TEMPLATE):
        encoder = encoder_for(tokenizer, template=template, max_length=13, on_too_long=on_too_long)
        encoded = encoder.encode_all(rows)
        assert [place.number for place in encoded.cut] == list(cut)
        assert [place.number for place in encoded.dropped] == list(dropped)
        texts = [text for example in encoded.examples for text in learned_texts(tokenizer, example)]
        assert texts == ["b</s>", "ddd", "b</s>"][-kept:]


def test_long_rows_may_be_an_error(tokenizer: Any, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, SHORT, *[ENDLESS] * 5)
    strict = encoder_for(tokenizer, max_length=20, on_too_long="fail")
    with pytest.raises(
        DataError,
        match=r"rows.jsonl line 2; line 3; line 4; and 2 more: longer than max_length 20, the longest 49 ",
    ):
        prepare(recipe, strict)
    assert len(prepare(recipe_for(tmp_path, SHORT), strict).train) == 1


def test_nothing_left_to_learn(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="raise max_length"):
        prepare(recipe_for(tmp_path, HOPELESS), encoder_for(tokenizer, max_length=20))
