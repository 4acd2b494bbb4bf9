"""Asks many questions at a time and keeps their order. Does not know who answers: any function does."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


def answer_all(
    ask: Callable[[Q], A],
    questions: Sequence[Q],
    *,
    concurrency: int,
    on_answer: Callable[[], object] = lambda: None,
) -> list[A]:
    """Answers in the order of the questions, asked up to `concurrency` at a time; the first error ends it.

    Args:
        on_answer: called after each answer, from any thread.
    """
    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        futures = [pool.submit(ask, question) for question in questions]
        try:
            for future in futures:
                future.add_done_callback(lambda _: on_answer())
            return [future.result() for future in futures]
        except BaseException:
            _forget(futures)
            raise


def _forget(futures: Sequence[Future[A]]) -> None:
    for future in futures:
        future.cancel()
