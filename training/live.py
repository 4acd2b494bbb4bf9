"""Asks a server an evaluation's questions, through the public client, as any user would. Knows no metric."""

from collections.abc import Sequence

from quickchange import Client, FinishReason, InvalidArgumentError, QuickchangeError
from quickchange.requests import GenerateOptions, Prompt
from training.answering import answer_all
from training.cases import Answer, Case
from training.errors import EvaluationError

_CONCURRENCY = 16
_RETRIES = 20  # a full server says when to come back


class LiveModel:
    """One adapter of a server, or its base, as something that answers cases greedily.

    Args:
        adapter: a reference; empty for the base.
        max_new_tokens: None for the server's default.
    """

    def __init__(self, client: Client, adapter: str, max_new_tokens: int | None) -> None:
        self._client, self._adapter = client, adapter
        self._options = GenerateOptions(adapter=adapter, temperature=0.0)
        if max_new_tokens is not None:
            self._options["max_new_tokens"] = max_new_tokens
        self._as_chat = True

    def answers(self, cases: Sequence[Case], *, progress: bool) -> list[Answer]:
        """In the order of the cases; so many at a time that they share forward passes.

        Raises:
            EvaluationError: a case is refused, which is named by its place, or the server fails.
        """
        from tqdm import tqdm

        self._as_chat = self._takes_chats(cases[0])
        with tqdm(total=len(cases), desc=self._adapter or "base", unit="row", disable=not progress) as bar:
            return answer_all(self._answer, cases, concurrency=_CONCURRENCY, on_answer=bar.update)

    def _answer(self, case: Case) -> Answer:
        try:
            answer = self._client.generate(self._prompt(case), retries=_RETRIES, **self._options)
        except QuickchangeError as error:
            raise EvaluationError(f"{case.place}, asked of {self._adapter or 'base'}: {error}") from error
        return Answer(answer.text, len(answer.token_ids), answer.finish_reason == FinishReason.STOP)

    def _prompt(self, case: Case) -> Prompt:
        return list(case.messages) if self._as_chat else case.question

    def _takes_chats(self, case: Case) -> bool:
        """Whether there is a chat template; without one training renders a lone question as plain text."""
        if len(case.messages) > 1:
            return True
        try:
            self._client.tokenize(list(case.messages), adapter=self._adapter)
        except InvalidArgumentError as error:
            return not any(violation.field == "chat" for violation in error.field_violations)
        except QuickchangeError as error:
            raise EvaluationError(f"{self._adapter or 'base'} cannot be asked: {error}") from error
        return True
