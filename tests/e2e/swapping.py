"""Adapters that change all the time while streams run, and what every answer has to be. Holds no test."""

import contextlib
import itertools
import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quickchange import (
    Client,
    Delta,
    NotFoundError,
    ResourceExhaustedError,
    Started,
)
from tests.e2e.process import ServerProcess
from tests.parity.oracle import Oracle

HEAD = "a beginning that every prompt shares, longer than two blocks of keys and values: "
PROMPTS = tuple(HEAD + tail for tail in ("one", "number two", "and the third of them"))
ANSWER_TOKENS = 24
_PROBE_TOKENS = 6
_KEPT_VERSIONS = 3


@dataclass(frozen=True)
class Expected:
    """Tokens by digest ("" is the base) and prompt: those of transformers and PEFT, alone, in float32."""

    tokens: Mapping[tuple[str, str], tuple[int, ...]]

    @classmethod
    def compute(cls, base: Path, folders: Mapping[str, Path], tokenizer: Any) -> "Expected":
        """
        Args:
            folders: of adapters by digest.
        """
        oracle = Oracle(base, {digest.replace(":", "-"): folder for digest, folder in folders.items()})
        oracle.model.generation_config.eos_token_id = None
        return cls(
            {
                (digest, prompt): tuple(
                    oracle.greedy(tokenizer(prompt)["input_ids"], digest.replace(":", "-"), ANSWER_TOKENS)
                )
                for digest in ("", *folders)
                for prompt in PROMPTS
            }
        )

    def problem(self, digest: str, prompt: str, tokens: Sequence[int], count: int) -> str | None:
        """What is wrong with an answer."""
        want = self.tokens.get((digest, prompt))
        if want is None:
            return f"{digest} was never published"
        if tuple(tokens) != want[:count]:
            return f"{digest} {prompt!r}: {tuple(tokens)} and not {want[:count]}"
        return None


class Streams:
    """Threads that stream answers without pause and check each of them.

    Attributes:
        answers: how many came, by reference.
        missing: how many were told that there is no such adapter, by reference.
        problems: wrong tokens and failed requests.
        seen: digests by name and version, as the answers told them.
    """

    def __init__(
        self, server: ServerProcess, expected: Expected, references: Sequence[str], threads: int = 3
    ) -> None:
        self.answers: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.problems: list[str] = []
        self.seen: set[tuple[str, int, str]] = set()
        self._server, self._expected, self._references = server, expected, references
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        choose = random.Random(seed)
        with self._server.client() as client:
            while not self._over.is_set():
                reference, prompt = choose.choice(self._references), choose.choice(PROMPTS)
                try:
                    self._ask(client, reference, prompt)
                except NotFoundError:
                    self.missing[reference] += 1
                except Exception as error:
                    self.problems.append(f"{reference}: {error!r}")

    def _ask(self, client: Client, reference: str, prompt: str) -> None:
        tokens: list[int] = []
        with client.stream(
            prompt, adapter=reference, max_new_tokens=ANSWER_TOKENS, ignore_eos=True
        ) as stream:
            for event in stream:
                if isinstance(event, Started):
                    began = event.adapter
                elif isinstance(event, Delta):
                    tokens += event.token_ids
        self.answers[reference] += 1
        self.seen.add((began.name, began.version, began.digest))
        problem = self._expected.problem(began.digest, prompt, tokens, ANSWER_TOKENS)
        if problem is not None:
            self.problems.append(f"{reference}: {problem}")


class Swapper:
    """Changes what names mean, one thing after another; asks after each whether new requests see it.

    "live" is replaced and its alias "prod" moves; "doomed" is deleted and uploaded again.

    Attributes:
        swaps: changes so far, hints not counted.
        published: digests by name and version.
    """

    def __init__(
        self, client: Client, folders: Mapping[str, Path], expected: Expected, seed: int = 0
    ) -> None:
        """
        Args:
            folders: of adapters by digest; more than `live` keeps versions of.
        """
        self.swaps = 0
        self.published: dict[tuple[str, int], str] = {}
        self._client, self._folders, self._expected = client, folders, expected
        self._choose = random.Random(seed)
        self._prompts = itertools.cycle(PROMPTS)
        self._live: list[tuple[int, str]] = []
        self._aliased = 0
        self._doomed = ""

    def begin(self) -> None:
        """Every name means something."""
        self._replace()
        self._replace()
        self._move_alias()
        self._upload_again()

    def swap_until(self, count: int) -> None:
        """Goes on until there were so many swaps."""
        actions = (self._replace, self._replace, self._move_alias, self._come_and_go, self._hint)
        while self.swaps < count:
            self._choose.choice(actions)()

    def delete_all(self) -> None:
        """Takes every name away."""
        self._client.adapters.delete("live", all_versions=True)
        if self._doomed:
            self._client.adapters.delete("doomed", all_versions=True)

    def _replace(self) -> None:
        here = {digest for _, digest in self._live}
        digest = self._choose.choice(sorted(set(self._folders) - here))
        self._live.append((self._publish("live", digest), digest))
        self._probe("live", digest)
        while len(self._live) > _KEPT_VERSIONS:
            index = next(i for i, (version, _) in enumerate(self._live) if version != self._aliased)
            version, _ = self._live.pop(index)
            assert self._client.adapters.delete(f"live@{version}") == 1

    def _move_alias(self) -> None:
        version, digest = self._choose.choice([each for each in self._live if each[0] != self._aliased])
        self._client.adapters.alias("live", "prod", version)
        self._aliased = version
        self.swaps += 1
        self._probe("live:prod", digest)

    def _come_and_go(self) -> None:
        if not self._doomed:
            self._upload_again()
            return
        self._client.adapters.delete("doomed", all_versions=True)
        self._doomed = ""
        self.swaps += 1
        try:
            answer = self._client.generate(PROMPTS[0], adapter="doomed", max_new_tokens=1)
        except NotFoundError:
            return
        raise AssertionError(f"deleted, and yet it answered: {answer}")

    def _upload_again(self) -> None:
        self._doomed = self._choose.choice(sorted(self._folders))
        self._publish("doomed", self._doomed)
        self._probe("doomed", self._doomed)

    def _hint(self) -> None:
        reference = self._choose.choice(["live", "live:prod"])
        move, tier = self._choose.choice(
            [
                (self._client.adapters.load, "device"),
                (self._client.adapters.load, "host"),
                (self._client.adapters.unload, "host"),
                (self._client.adapters.unload, "disk"),
            ]
        )
        with contextlib.suppress(ResourceExhaustedError):  # a hint: no room while others are in use
            move(reference, tier)

    def _publish(self, name: str, digest: str) -> int:
        result = self._client.adapters.push(self._folders[digest], name)
        assert (result.created, result.adapter.digest) == (True, digest)
        self.published[name, result.adapter.version] = digest
        self.swaps += 1
        return result.adapter.version

    def _probe(self, reference: str, digest: str) -> None:
        prompt = next(self._prompts)
        answer = self._client.generate(
            prompt, adapter=reference, max_new_tokens=_PROBE_TOKENS, ignore_eos=True
        )
        assert answer.adapter.digest == digest, f"{reference} is {answer.adapter}, not the newest"
        problem = self._expected.problem(digest, prompt, answer.token_ids, _PROBE_TOKENS)
        assert problem is None, problem
