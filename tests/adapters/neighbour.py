"""Another process on a store, told what to do line by line: `python -m tests.adapters.neighbour ROOT`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from adapters.errors import AdapterError
from adapters.leases import Lease
from adapters.retention import RetentionPolicy
from adapters.store import AdapterStore
from tests.adapters.staging import publish, references, stage


class Neighbour:
    """A process that has a store open; each method does one thing there and gives what came of it."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.adapters.neighbour", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear()

    def ask(self, what: str, *arguments: Any) -> Any:
        self.tell(what, *arguments)
        return self._hear()

    def tell(self, what: str, *arguments: Any) -> None:
        """Does not wait for the answer; `hear` it later."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    hear = _hear

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "Neighbour":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def main(root: Path) -> None:
    with AdapterStore(root) as store:
        leases: dict[str, Lease] = {}

        def hold(reference: str) -> str:
            record, lease = store.hold(reference)
            assert lease is not None
            leases[reference] = lease
            return record.facts.digest

        def churn(name: str, rounds: int) -> list[int]:
            """Versions that were published, and deleted again."""
            versions = []
            for index in range(rounds):
                record = publish(store, name, f"{name} {index}")
                store.verify(record.facts.digest)
                versions.append(record.version)
                for digest in store.delete(record.reference):
                    store.remove_blob(digest)
            return versions

        def publish_many(name: str, contents: list[str]) -> list[int]:
            return [publish(store, name, content).version for content in contents]

        def stay(rounds: int) -> None:
            for _ in range(rounds):
                AdapterStore(root).close()

        actions: dict[str, Callable[..., Any]] = {
            "hold": hold,
            "release": lambda reference: leases.pop(reference).release(),
            "stage": lambda content: str(stage(store, content)),
            "publish": lambda name, content: publish(store, name, content).reference,
            "publish many": publish_many,
            "churn": churn,
            "reopen": stay,
            "alias": lambda name, alias, version: store.update(name, version, set_aliases=[alias]).etag,
            "delete": store.delete,
            "remove": store.remove_blob,
            "recover": store.recover,
            "collect": lambda: len(store.collect(RetentionPolicy(1, 0), dry_run=False).versions),
            "list": lambda: references(store),
            "verify": store.verify,
        }
        _say("ready")
        for line in sys.stdin:
            what, *arguments = json.loads(line)
            try:
                _say(actions[what](*arguments))
            except AdapterError as error:
                _say({"error": error.reason})


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
