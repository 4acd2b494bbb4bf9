"""Renders the chat templates that adapters bring, in a process with limits. Knows no requests."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from server.errors import InvalidRequestError

TIME_LIMIT_S: Final = 2.0

_ENVELOPE_BYTES: Final = 4096
_SCRIPT: Final = str(Path(__file__).with_name("template_process.py"))


class TemplateRenderer:
    """One process, started when the first template comes and again after one that had to be stopped.

    Args:
        tokens: special tokens by the names that templates know, such as "bos_token".
        max_answer_bytes: longest rendered text.
    """

    def __init__(
        self, tokens: Mapping[str, str], max_answer_bytes: int, time_limit_s: float = TIME_LIMIT_S
    ) -> None:
        self._tokens = dict(tokens)
        self._max_answer_bytes = max_answer_bytes
        self._time_limit_s = time_limit_s
        self._process: Process | None = None
        self._one_at_a_time = asyncio.Lock()

    async def render(self, template: str, messages: Sequence[Mapping[str, str]]) -> str:
        """The text up to where the assistant's answer begins.

        Raises:
            InvalidRequestError: the template failed, took too long, or wrote too much.
        """
        request = {"template": template, "messages": list(messages), "tokens": self._tokens}
        async with self._one_at_a_time:
            answer = await self._ask(json.dumps(request).encode() + b"\n")
        if "error" in answer:
            raise _refused(answer["error"])
        return answer["text"]

    async def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            await self._stop(self._process)

    async def _ask(self, line: bytes) -> Mapping[str, str]:
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            await process.stdin.drain()
            answer: Mapping[str, str] = json.loads(await process.stdout.readuntil(b"\n"))
        except BaseException as error:
            await self._stop(process)  # after half an exchange there is no telling whose answer comes next
            if isinstance(error, asyncio.IncompleteReadError | OSError):
                raise _refused(f"it took more than {self._time_limit_s:g} s, or all its memory") from None
            raise
        return answer

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # modules beside the script must not hide those of the standard library
                _SCRIPT,
                str(self._time_limit_s),
                str(self._max_answer_bytes),
                stdin=PIPE,
                stdout=PIPE,
                limit=_ENVELOPE_BYTES + 6 * self._max_answer_bytes,  # JSON writes up to six bytes for one
                start_new_session=True,  # a Ctrl-C is for the server, which ends this process in its own time
            )
        return self._process

    async def _stop(self, process: Process) -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()
        self._process = None


def _refused(why: str) -> InvalidRequestError:
    return InvalidRequestError("chat", f"the adapter's chat template refused it: {why}")
