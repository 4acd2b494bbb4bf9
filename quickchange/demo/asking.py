"""Asks base and adapters the same questions at the same time, and counts. Knows no process."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from quickchange import Client, StepStatistics
from training.answering import answer_all
from training.score import Score, score
from training.tasks import Question, Task

BASE: Final = ""
"""What the base is called in a request."""

_CONCURRENCY: Final = 16
_MAX_NEW_TOKENS: Final = 20  # the longest right answer has 15


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    adapter: str
    question: Question


@dataclass(frozen=True, slots=True)
class Together:
    """Answers that were computed side by side.

    Attributes:
        steps: forward passes meanwhile, of which `mixed_steps` served several adapters at once.
        most_adapters: the most different adapters in one forward pass since the server began.
    """

    answers: Mapping[Ask, str]
    steps: int
    mixed_steps: int
    most_adapters: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Marks:
    """How an adapter did on what was held out, and the base on the same questions."""

    task: Task
    adapter: Score
    base: Score


def ask_together(client: Client, asks: Sequence[Ask]) -> Together:
    """All at once, as far as the server and a pool of 16 callers allow."""

    def answer(ask: Ask) -> str:
        return client.generate(
            ask.question.messages, adapter=ask.adapter, max_new_tokens=_MAX_NEW_TOKENS, retries=3
        ).text

    before = client.server_info().steps
    answers = answer_all(answer, asks, concurrency=_CONCURRENCY)
    after = client.server_info().steps
    return Together(
        answers=dict(zip(asks, answers, strict=True)),
        steps=after.steps - before.steps,
        mixed_steps=after.mixed_steps - before.mixed_steps,
        most_adapters=after.max_adapters_in_step,
        tokens=_tokens(before, after),
    )


def everyone(tasks: Sequence[Task], questions_each: int) -> list[Ask]:
    """The first held-out questions of each task, each for the base and for every adapter."""
    questions = [question for task in tasks for question in task.held_out[:questions_each]]
    return [Ask(adapter, question) for question in questions for adapter in (BASE, *_names(tasks))]


def held_out(tasks: Sequence[Task]) -> list[Ask]:
    """Every held-out question for its adapter and for the base, shuffled so that they meet in one batch."""
    asks = [
        Ask(adapter, question)
        for task in tasks
        for question in task.held_out
        for adapter in (BASE, task.name)
    ]
    random.Random(0).shuffle(asks)  # noqa: S311  an order is no secret
    return asks


def marks(tasks: Sequence[Task], together: Together) -> list[Marks]:
    """What everyone got right of what was held out."""

    def of(task: Task, adapter: str) -> Score:
        answers = [together.answers[Ask(adapter, question)] for question in task.held_out]
        return score(task.held_out, answers, task.labels)

    return [Marks(task, of(task, task.name), of(task, BASE)) for task in tasks]


def _names(tasks: Sequence[Task]) -> list[str]:
    return [task.name for task in tasks]


def _tokens(before: StepStatistics, after: StepStatistics) -> int:
    return after.tokens_computed - before.tokens_computed
