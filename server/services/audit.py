"""Who changed which adapter, and what came of it: one JSON line each. Does not know how changes are made."""

import asyncio
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Final, NamedTuple

from adapters.retention import Collection
from server.services.interceptors import caller
from server.services.statuses import reason_of

_log = logging.getLogger("quickchange.audit")
_REFERENCE_CHARACTERS: Final = 256
_CERTIFICATE_NAMES: Final = ("x509_subject_alternative_name", "x509_common_name")


def write_audit_to(path: Path) -> None:
    """Has the lines go to a file instead of to the log; one that is moved away is made anew.

    Raises:
        OSError: it cannot be written.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
    handler = WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(handler)
    _log.propagate = False


class Who(NamedTuple):
    """Who changes something.

    Attributes:
        name: of the token, else what the client's certificate says; None if there is neither.
        peer: the address; empty for the server itself.
    """

    name: str | None
    tenant: str | None
    peer: str


SERVER: Final = Who("server", None, "")
"""What the server does by itself."""


def who_calls(context: Any) -> Who:
    """Whoever makes the call that this context is of."""
    known = caller()
    return Who(known.name or _certificate_name(context), known.tenant, context.peer())


def _certificate_name(context: Any) -> str | None:
    names = context.auth_context()
    for kind in _CERTIFICATE_NAMES:
        for name in names.get(kind, ()):
            if name:
                return str(name, "utf-8", "replace")
    return None


class Subject(NamedTuple):
    """One version that is changed, as far as it is known; any part may be empty."""

    adapter: str
    digest: str = ""


@dataclass(slots=True)
class Change:
    """One change on its way into the audit log.

    Attributes:
        subjects: what is changed; a line for each.
        outcome: "ok" unless something better can be said.
        is_none: nothing was to be changed after all, so there is no line.
    """

    subjects: Sequence[Subject]
    outcome: str = "ok"
    is_none: bool = field(default=False)


@contextmanager
def audited(action: str, who: Who, adapter: str = "") -> Iterator[Change]:
    """Tells what came of the block, an error included.

    Args:
        adapter: what the caller named; the block replaces `subjects` when it knows more.
    """
    change = Change([Subject(adapter)])
    try:
        yield change
    except asyncio.CancelledError:
        change.outcome = "CANCELLED"
        raise
    except Exception as error:
        change.outcome = reason_of(error)
        raise
    finally:
        if not change.is_none:
            _write(action, who, change)


def subjects_of(collection: Collection) -> list[Subject]:
    """What a collection took away."""
    return [Subject(f"{version.name}@{version.version}", version.digest) for version in collection.versions]


def _write(action: str, who: Who, change: Change) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    for subject in change.subjects:
        line = {
            "time": now,
            "who": who.name,
            "tenant": who.tenant,
            "peer": who.peer,
            "action": action,
            "adapter": subject.adapter[:_REFERENCE_CHARACTERS],
            "digest": subject.digest,
            "outcome": change.outcome,
        }
        _log.info("%s", json.dumps(line))
