"""Prompts to token ids: chat templates and the tokenizer. Knows neither grpc nor the engine.

The tokenizer runs on a thread of its own: it must not be used by two threads at once, and a long prompt would
hold up the event loop. The base's template is the operator's and runs there too; those of adapters are
strangers' and do not.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from server.errors import InvalidRequestError
from server.templates import TemplateRenderer

ROLES: Final = ("system", "user", "assistant")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model sees it, and the text that was tokenized."""

    token_ids: tuple[int, ...]
    text: str


class PromptEncoder:
    """Turns text, token ids and chats into EncodedPrompt.

    Args:
        tokenizer: the base's; nobody else may encode with it.
        chat_template: the base's Jinja template, for adapters that bring none; None if it has none.
        max_prompt_bytes: longest text in UTF-8, checked before it is tokenized.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, max_prompt_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._max_prompt_bytes = max_prompt_bytes
        self._renderer = TemplateRenderer(tokenizer.special_tokens_map, max_prompt_bytes)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def text(self, text: str) -> EncodedPrompt:
        """Tokenized as the tokenizer does by default, so with the special tokens that it adds."""
        self._check_size("text", text)
        return await self._run(lambda: EncodedPrompt(self._encode(text, add_special_tokens=True), text))

    async def chat(self, messages: Sequence[ChatMessage], template: str | None) -> EncodedPrompt:
        """Rendered up to where the assistant's answer begins.

        Args:
            template: the adapter's Jinja template; None to use the base's.
        """
        self._check_chat(messages)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        if template is not None:
            text = await self._renderer.render(template, turns)
        elif self._chat_template is not None:
            text = await self._run(lambda: self._render(turns))
        else:
            raise InvalidRequestError(
                "chat", "neither the base nor the adapter has a chat template; send text instead"
            )
        self._check_size("chat", text)
        # The template wrote the special tokens itself.
        return await self._run(lambda: EncodedPrompt(self._encode(text, add_special_tokens=False), text))

    async def token_ids(self, token_ids: Sequence[int], *, with_text: bool) -> EncodedPrompt:
        """Ids as they are; with_text decodes them too."""
        ids = tuple(token_ids)
        return EncodedPrompt(ids, await self._run(lambda: self._decode(ids)) if with_text else "")

    async def close(self) -> None:
        """Ends the thread after its current prompt, and the process that renders."""
        await self._renderer.close()
        self._thread.shutdown(cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _check_chat(self, messages: Sequence[ChatMessage]) -> None:
        if not messages:
            raise InvalidRequestError("chat.messages", "is empty; send at least one message")
        for index, message in enumerate(messages):
            if message.role not in ROLES:
                raise InvalidRequestError(
                    f"chat.messages[{index}].role", f"is {message.role!r}, must be one of {', '.join(ROLES)}"
                )
        self._check_size("chat", *(message.content for message in messages))

    def _check_size(self, field: str, *texts: str) -> None:
        size = sum(len(text.encode()) for text in texts)
        if size > self._max_prompt_bytes:
            raise InvalidRequestError(
                field, f"has {size} bytes, at most {self._max_prompt_bytes} are allowed"
            )

    # In the thread

    def _render(self, turns: list[dict[str, str]]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, chat_template=self._chat_template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is data, and can fail in any way
            raise InvalidRequestError("chat", f"the base's chat template refused it: {error}") from None
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        text: str = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return text
