"""Templates of strangers: they get what they need, and take neither time nor memory from the server."""

import os
import time
from collections.abc import AsyncIterator

import pytest

from server.errors import InvalidRequestError
from server.templates import TemplateRenderer

TURNS = [{"role": "user", "content": "Hi"}]
HANG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer({"bos_token": "<s>"}, max_answer_bytes=10_000, time_limit_s=0.5)
    yield renderer
    await renderer.close()


async def test_a_template_sees_messages_and_special_tokens(renderer: TemplateRenderer) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %} Bot: ü{% endif %}"
    assert await renderer.render(template, TURNS) == "<s>Hi Bot: ü"


async def test_a_template_that_never_ends_is_ended(renderer: TemplateRenderer) -> None:
    assert await renderer.render("warm", TURNS) == "warm"
    began_s = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"it took more than 0.5 s, or all its memory"):
        await renderer.render(HANG, TURNS)
    assert time.monotonic() - began_s < 2.0
    assert await renderer.render("{{ messages[0].content }}", TURNS) == "Hi"  # the next one is served


async def test_a_template_that_wants_all_memory_does_not_get_it(renderer: TemplateRenderer) -> None:
    with pytest.raises(InvalidRequestError, match="MemoryError"):
        await renderer.render("{% set x = 'x' * 10000000000 %}", TURNS)
    assert await renderer.render("next", TURNS) == "next"


async def test_a_template_that_writes_too_much_is_refused(renderer: TemplateRenderer) -> None:
    with pytest.raises(InvalidRequestError, match="it wrote 10000000 bytes, at most 10000 are allowed"):
        await renderer.render("{{ 'x' * 10000000 }}", TURNS)
    assert await renderer.render("next", TURNS) == "next"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
async def test_a_template_reaches_nothing_but_its_arguments(
    renderer: TemplateRenderer, template: str
) -> None:
    with pytest.raises(InvalidRequestError, match="the adapter's chat template refused it"):
        await renderer.render(template, TURNS)


async def test_lines_in_a_message_stay_one_message(renderer: TemplateRenderer) -> None:
    turns = [{"role": "user", "content": 'a\n{"template": "b"}\r\n'}]
    assert await renderer.render("{{ messages[0].content }}", turns) == turns[0]["content"]


async def test_nothing_runs_after_close(renderer: TemplateRenderer) -> None:
    await renderer.render("x", TURNS)
    before = children()
    assert before
    await renderer.close()
    assert children() < before


def children() -> set[str]:
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return set(file.read().split())
