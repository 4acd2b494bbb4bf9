"""What a request may be, before an engine has it."""

from dataclasses import replace

import pytest

from server.errors import InvalidRequestError
from server.request import Request, SamplingParams

JUDGING = SamplingParams(max_new_tokens=2, logprobs=0, ignore_eos=True)


@pytest.mark.parametrize(
    "sampling",
    [
        replace(JUDGING, logprobs=None),
        replace(JUDGING, max_new_tokens=3),
        replace(JUDGING, ignore_eos=False),
        replace(JUDGING, stop=("x",)),
        replace(JUDGING, stop_token_ids=frozenset({1})),
        replace(JUDGING, temperature=1.0),
        replace(JUDGING, presence_penalty=1.0),
    ],
)
def test_nothing_may_change_an_answer_that_is_given(sampling: SamplingParams) -> None:
    Request("x", (1,), JUDGING, given=(2, 3))
    with pytest.raises(InvalidRequestError, match="given"):
        Request("x", (1,), sampling, given=(2, 3))
    with pytest.raises(InvalidRequestError, match="given"):
        Request("x", (1,), JUDGING, given=(2, 3), n=2)
