"""Rows to tokens: every form, exact masks, and the same tokens as the server's."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server.chat import ChatMessage, PromptEncoder
from tests.models import CHAT_TEMPLATE, build_tokenizer
from training.data import IGNORED, Collator, Example, RowEncoder, prepare
from training.errors import DataError
from training.rows import Row, parse_row, read_rows, split

EOS: int = build_tokenizer().eos_token_id


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def encoder_for(tokenizer: Any, *, template: str | None = CHAT_TEMPLATE, max_length: int = 512) -> RowEncoder:
    return RowEncoder(tokenizer, template, frozenset({tokenizer.eos_token_id}), max_length)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Rows


@pytest.mark.parametrize(
    ("values", "question", "answer"),
    [
        ({"prompt": "2+2?", "completion": "4"}, "2+2?", "4"),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "Add.\n\n2 2", "4"),
        ({"instruction": "Add.", "input": "", "output": "4"}, "Add.", "4"),
        ({"instruction": "Add 2 2.", "output": "4", "id": 17}, "Add 2 2.", "4"),
    ],
)
def test_questions_become_chats(values: dict[str, Any], question: str, answer: str) -> None:
    row = parse_row(1, json.dumps(values))
    assert row.messages == (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )


def test_messages_and_text() -> None:
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    assert parse_row(1, json.dumps({"messages": chat})).messages == tuple(chat)
    assert parse_row(1, json.dumps({"text": "abc"})).text == "abc"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 7 is not JSON"),
        ("[]", "line 7 is no JSON object"),
        ('{"prompt": "a"}', "line 7 has only prompt; give prompt . completion"),
        ("{}", "line 7 has only nothing"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "line 7 mixes forms"),
        ('{"prompt": "a", "completion": ""}', "line 7: completion is empty"),
        ('{"prompt": "a", "completion": 4}', "line 7: completion is int, must be text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "at least two"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "end with"),
        ('{"messages": [{"role": "bot", "content": "a"}, {"role": "user", "content": "b"}]}', "is 'bot'"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', "with role and content"),
    ],
)  # fmt: skip
def test_malformed_rows(line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_row(7, line)


def test_bad_lines_are_all_counted_and_the_first_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + "{}\n" * 5)
    with pytest.raises(DataError, match=r"line 3 .*line 4 .*line 5 .*and 2 more lines"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"\n\n", "holds no rows"),
        ("latin.jsonl", b'{"text": "\xe9"}', "is not UTF-8 at byte 10"),
        ("rows.parquet", b"PAR1", "is Parquet; only JSON lines are read"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "absent.jsonl")


def test_split_keeps_equal_questions_together() -> None:
    rows = [parse_row(n, json.dumps({"prompt": f"q{n % 10}", "completion": f"a{n}"})) for n in range(40)]
    train, held_out = split(rows, 0.3, seed=1)
    assert len(train) == 28
    assert len(held_out) == 12
    assert not {row.question for row in train} & {row.question for row in held_out}
    assert split(rows, 0.3, seed=1) == (train, held_out)
    assert split(rows, 0.3, seed=2) != (train, held_out)
    assert split(rows, 0.0, seed=1) == (rows, [])


# Tokens


def test_only_the_answer_and_its_end_are_learned(tokenizer: Any) -> None:
    encoder = encoder_for(tokenizer)
    (example,) = encoder.encode(parse_row(1, '{"prompt": "hi", "completion": "yo"}'))
    learned = example.token_ids[example.learned_from :]
    assert tokenizer.decode(example.token_ids[: example.learned_from]) == "<|user|>hi<|end|><|assistant|>"
    assert learned == (*tokenizer("yo")["input_ids"], EOS)


def test_every_answer_of_a_chat_is_learned_in_its_own_context(tokenizer: Any) -> None:
    chat = [{"role": role, "content": text} for role, text in
            (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]  # fmt: skip
    first, second = encoder_for(tokenizer).encode(Row(1, messages=tuple(chat)))
    assert tokenizer.decode(first.token_ids) == "<|user|>a<|end|><|assistant|>b</s>"
    assert tokenizer.decode(second.token_ids).endswith("b<|end|><|user|>c<|end|><|assistant|>d</s>")
    assert len(second.token_ids) - second.learned_from == 2


def test_all_of_a_text_is_learned(tokenizer: Any) -> None:
    (example,) = encoder_for(tokenizer).encode(Row(1, text="abc"))
    assert example == Example((*tokenizer("abc")["input_ids"], EOS), 0)


def test_prompts_are_the_tokens_that_the_server_computes(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief. é"}, {"role": "user", "content": "Hi <|end|> 你好"}]
    prompts = PromptEncoder(tokenizer, CHAT_TEMPLATE, max_prompt_bytes=1000)

    async def served() -> tuple[int, ...]:
        return (await prompts.chat([ChatMessage(**message) for message in messages], None)).token_ids

    assert encoder_for(tokenizer).prompt_ids(messages) == asyncio.run(served())


def test_without_a_template_a_prompt_is_the_servers_text(tokenizer: Any) -> None:
    encoder = encoder_for(tokenizer, template=None)
    prompts = PromptEncoder(tokenizer, None, max_prompt_bytes=1000)

    async def served() -> tuple[int, ...]:
        return (await prompts.text("Once")).token_ids

    assert encoder.prompt_ids([{"role": "user", "content": "Once"}]) == asyncio.run(served())
    with pytest.raises(DataError, match="line 3: the base has no chat template"):
        encoder.prompt_ids([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], line=3)


def test_the_end_is_what_the_template_writes_if_the_server_stops_there(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    stops_at_both = RowEncoder(tokenizer, CHAT_TEMPLATE, frozenset({EOS, end}), 512)
    assert stops_at_both.end_id == end
    assert encoder_for(tokenizer).end_id == EOS


def test_a_template_that_refuses_names_the_line(tokenizer: Any) -> None:
    template = "{% if messages[0]['content'] == 'a' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"line 9: the base's chat template refuses it: no"):
        encoder_for(tokenizer, template=template).encode(parse_row(9, '{"prompt": "a", "completion": "b"}'))


def test_long_rows_are_cut_counted_and_teach_no_ending(tokenizer: Any, tmp_path: Path) -> None:
    rows = write(
        tmp_path / "rows.jsonl",
        {"prompt": "short", "completion": "ok"},
        {"prompt": "short", "completion": "x" * 40},
        {"prompt": "p" * 40, "completion": "ok"},
    )
    data = prepare(rows, encoder_for(tokenizer, max_length=20), held_out_fraction=0.0, seed=0)
    assert data.report.truncated == 1
    assert data.report.dropped_lines == (3,)
    assert data.report.longest == 20
    cut = data.train[1]
    assert len(cut.token_ids) == 20
    assert EOS not in cut.token_ids


def test_nothing_left_to_learn(tokenizer: Any, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", {"prompt": "p" * 40, "completion": "ok"})
    with pytest.raises(DataError, match="raise max_length"):
        prepare(rows, encoder_for(tokenizer, max_length=20), held_out_fraction=0.0, seed=0)


# Batches

SHORT, LONG = Example((11, 12, 13), 1), Example((21, 22, 23, 24, 25, 26), 4)


def test_collator_pads_left_and_masks_exactly() -> None:
    batch = Collator(0, answers_only=False)([_feature(SHORT), _feature(LONG)])
    assert batch["input_ids"].tolist() == [[0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, IGNORED, IGNORED, 12, 13],
        [IGNORED, IGNORED, IGNORED, IGNORED, 25, 26],
    ]


def test_collator_keeps_the_logits_that_predict_answers_and_no_more() -> None:
    batch = Collator(0, answers_only=True)([_feature(SHORT), _feature(LONG)])
    assert batch["logits_to_keep"] == 3
    assert batch["labels"].tolist() == [[IGNORED, 12, 13], [IGNORED, 25, 26]]
    text = Collator(0, answers_only=True)([_feature(Example((1, 2, 3), 0))])
    assert text["logits_to_keep"] == 3


def test_padding_may_be_the_end_token_and_the_end_is_still_learned(tokenizer: Any) -> None:
    examples = [e for text in ("a", "bcd") for e in encoder_for(tokenizer).encode(Row(1, text=text))]
    labels = Collator(EOS, answers_only=False)([_feature(example) for example in examples])["labels"]
    assert isinstance(labels, torch.Tensor)
    assert labels[:, -1].tolist() == [EOS, EOS]
    assert labels[0, :2].tolist() == [IGNORED, IGNORED]


def _feature(example: Example) -> dict[str, Any]:
    return {"input_ids": example.token_ids, "learned_from": example.learned_from}
