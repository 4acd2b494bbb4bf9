"""Templates: the tokens before an answer in training are those that the server computes.

The server renders the base's template by itself, and an adapter's in a process of its own; every adapter that
is trained here brings its base's.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from server.chat import ChatMessage, PromptEncoder
from training.encoding import RowEncoder
from training.errors import DataError
from training.readers import Place
from training.rows import Message, Row, turn

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant!') }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
STRIPPING = (
    "{%- for message in messages -%}\n    [{{- message.role -}}]  {{- message.content.strip() -}} "
    "{{ eos_token }}\n"
    "{%- endfor -%}\n{%- if add_generation_prompt -%} [assistant] {%- endif -%}"
)


@dataclass(frozen=True)
class Style:
    """A template, the special tokens it writes, how its answers end, and in how many sequences TURNS go."""

    template: str | None
    tokens: tuple[str, ...] = ()
    end: str = "</s>"
    sequences: int = 3
    takes_system: bool = True


STYLES = {
    "chatml": Style(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", sequences=1),
    "llama 3": Style(
        LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", sequences=2
    ),
    "mistral": Style(MISTRAL, ("[INST]", "[/INST]"), takes_system=False),
    "gemma": Style(
        GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", sequences=2, takes_system=False
    ),
    "stripping": Style(STRIPPING, sequences=2),
}
TURNS = (
    turn("user", "What is 2 + 2?\n"),
    turn("assistant", "It is four, I think."),
    turn("user", "  你好 <|im_end|> [INST] are   you sure?"),
    turn("assistant", " Yes: 2 + 2 = 4\n"),
    turn("user", ""),
    turn("assistant", "…"),
)
PLAIN = (turn("user", " Once upon"), turn("assistant", " a time"))


def tokenizer_for(style: Style) -> PreTrainedTokenizerFast:
    """With merges across blanks and letters, and one that begins every text with <s> unless told not to."""
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([message["content"] for message in (*TURNS, *PLAIN)] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": list(style.tokens)})
    assert made("It is")["input_ids"][0] == made.bos_token_id
    assert len(made(" a time")["input_ids"]) < len(" a time")
    return made


def encoder_of(style: Style, tokenizer: Any) -> RowEncoder:
    ends = frozenset({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(style.end)})
    return RowEncoder(tokenizer, style.template, ends, 4096)


def served(
    style: Style, tokenizer: Any, messages: Sequence[Message], *, from_adapter: bool
) -> tuple[int, ...]:
    """Through the server's own code: rendering by the base's template or by an adapter's, then tokenizing."""

    async def ask() -> tuple[int, ...]:
        prompts = PromptEncoder(tokenizer, style.template, max_prompt_bytes=10_000)
        try:
            if style.template is None:
                return (await prompts.text(messages[0]["content"])).token_ids
            chat = [ChatMessage(**message) for message in messages]
            return (await prompts.chat(chat, style.template if from_adapter else None)).token_ids
        finally:
            await prompts.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("from_adapter", [False, True], ids=["base's template", "adapter's template"])
@pytest.mark.parametrize(
    ("name", "with_system"),
    [
        (name, system)
        for name, style in STYLES.items()
        for system in (False, True)
        if style.takes_system or not system
    ],
)
def test_every_answer_follows_the_tokens_that_the_server_computes(
    name: str, with_system: bool, from_adapter: bool
) -> None:
    style = STYLES[name]
    tokenizer = tokenizer_for(style)
    messages = ((turn("system", "Be  brief."),) if with_system else ()) + TURNS
    examples = encoder_of(style, tokenizer).encode(Row(Place(1), messages=messages))
    assert len(examples) == style.sequences
    answers = [(example, span) for example in examples for span in example.spans]
    indexes = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    end = tokenizer.convert_tokens_to_ids(style.end)
    for (example, (begin, finish)), index in zip(answers, indexes, strict=True):
        expected = served(style, tokenizer, messages[:index], from_adapter=from_adapter)
        assert example.token_ids[:begin] == expected
        learned = example.token_ids[begin:finish]
        assert learned[-1] == end
        assert tokenizer.decode(learned[:-1]) == messages[index]["content"]


def test_styles_differ_and_begin_once() -> None:
    """What a test of equal tokens would not see: a template that writes <s> where the tokenizer does too."""
    seen = set()
    for style in STYLES.values():
        tokenizer = tokenizer_for(style)
        prompt = encoder_of(style, tokenizer).prompt_ids(TURNS[:1])
        assert prompt.count(tokenizer.bos_token_id) == ("bos_token" in str(style.template))
        seen.add(tokenizer.decode(prompt))
    assert len(seen) == len(STYLES)


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if not style.takes_system])
def test_a_role_that_the_template_does_not_know_is_refused_by_line(name: str) -> None:
    style = STYLES[name]
    row = Row(Place(7), messages=(turn("system", "Be brief."), *PLAIN))
    with pytest.raises(
        DataError, match=r"line 7: the base's chat template refuses it: (Only user|System role)"
    ):
        encoder_of(style, tokenizer_for(style)).encode(row)


def test_without_a_template_a_prompt_is_the_servers_text() -> None:
    style = Style(None)
    tokenizer = tokenizer_for(style)
    encoder = encoder_of(style, tokenizer)
    (example,) = encoder.encode(Row(Place(1), messages=PLAIN))
    prompt = example.token_ids[: example.learned_from]
    assert prompt == served(style, tokenizer, PLAIN[:1], from_adapter=False)
    assert prompt[0] == tokenizer.bos_token_id
    with pytest.raises(DataError, match="line 3: the base has no chat template"):
        encoder.encode(Row(Place(3), messages=TURNS))
