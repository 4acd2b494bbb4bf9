"""Prompts as the model sees them: text, ids and chats, with the templates of base and adapter."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tokenizers import processors

from server.chat import ChatMessage, EncodedPrompt, PromptEncoder
from server.errors import InvalidRequestError
from tests.models import CHAT_TEMPLATE, build_tokenizer

HELLO = (ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
async def encoder(tokenizer: Any) -> AsyncIterator[PromptEncoder]:
    encoder = PromptEncoder(tokenizer, CHAT_TEMPLATE, max_prompt_bytes=1000)
    yield encoder
    await encoder.close()


async def test_text_is_tokenized_as_the_tokenizer_does_by_default(
    encoder: PromptEncoder, tokenizer: Any
) -> None:
    prompt = await encoder.text("héllo")
    assert prompt == EncodedPrompt(tuple(tokenizer("héllo")["input_ids"]), "héllo")
    assert len(prompt.token_ids) == 6


async def test_a_chat_is_rendered_up_to_the_answer(encoder: PromptEncoder, tokenizer: Any) -> None:
    prompt = await encoder.chat(HELLO, None)
    assert prompt.text == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert prompt.token_ids[0] == tokenizer.convert_tokens_to_ids("<|system|>")
    assert tokenizer.decode(prompt.token_ids) == prompt.text


async def test_an_adapters_own_template_wins(encoder: PromptEncoder) -> None:
    prompt = await encoder.chat(
        HELLO, "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}Answer:"
    )
    assert prompt.text == "[system] Be brief.\n[user] Hi\nAnswer:"


async def test_special_tokens_are_added_once(tokenizer: Any) -> None:
    """Text gets the tokenizer's beginning token; a chat's template has written its own."""
    begins = build_tokenizer()
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begins.bos_token_id)]
    )
    encoder = PromptEncoder(begins, "{{ bos_token }}{{ messages[0].content }}", max_prompt_bytes=1000)
    try:
        text = await encoder.text("Hi")
        chat = await encoder.chat([ChatMessage("user", "Hi")], None)
    finally:
        await encoder.close()
    assert text.token_ids == chat.token_ids
    assert text.token_ids.count(begins.bos_token_id) == 1


async def test_ids_are_taken_as_they_are(encoder: PromptEncoder, tokenizer: Any) -> None:
    ids = tokenizer("Hi")["input_ids"]
    assert await encoder.token_ids(ids, with_text=False) == EncodedPrompt(tuple(ids), "")
    assert await encoder.token_ids(ids, with_text=True) == EncodedPrompt(tuple(ids), "Hi")


@pytest.mark.parametrize(
    ("messages", "template", "field", "words"),
    [
        ((), None, "chat.messages", "is empty"),
        ((ChatMessage("tool", "x"),), None, "chat.messages[0].role", "is 'tool', must be one of"),
        (HELLO, "{{ raise_exception('no system here') }}", "chat", "no system here"),
        (HELLO, "{% for", "chat", "refused it"),
        (HELLO, "{{ messages[7].content.x }}", "chat", "refused it"),
        (HELLO, "{{ 1 / 0 }}", "chat", "refused it"),
        (HELLO, "{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat", "refused it"),
        (HELLO, "{{ messages.append(1) }}", "chat", "refused it"),
        (HELLO, "{% for i in range(1000000) %}x{% endfor %}", "chat", "refused it"),
        (HELLO, "{{ 'x' * 2000 }}", "chat", "it wrote 2000 bytes, at most 1000"),
        ((ChatMessage("user", "ü" * 501),), None, "chat", "has 1002 bytes, at most 1000"),
    ],
)
async def test_a_chat_that_cannot_be_rendered_is_refused(
    encoder: PromptEncoder, messages: tuple[ChatMessage, ...], template: str | None, field: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await encoder.chat(messages, template)
    assert caught.value.field == field
    assert words in caught.value.description


async def test_a_prompt_over_the_limit_is_not_tokenized(encoder: PromptEncoder) -> None:
    await encoder.text("x" * 1000)
    with pytest.raises(InvalidRequestError, match=r"text: has 1001 bytes, at most 1000 are allowed"):
        await encoder.text("x" * 1001)


async def test_a_chat_needs_a_template(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer, None, max_prompt_bytes=1000)
    try:
        with pytest.raises(InvalidRequestError, match="neither the base nor the adapter has a chat template"):
            await encoder.chat(HELLO, None)
        assert (await encoder.chat(HELLO, "x")).text == "x"
    finally:
        await encoder.close()


async def test_many_at_once_do_not_mix(encoder: PromptEncoder, tokenizer: Any) -> None:
    texts = [f"prompt {index} " * (index % 7 + 1) for index in range(64)]
    prompts = await asyncio.gather(*(encoder.text(text) for text in texts))
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == texts
