"""The file of tokens: read whole or refused, written whole or not at all. Knows no calls.

JSON, written by `quickchange tokens`. It holds hashes, never a token.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from adapters.durable import replace_text
from server.tokens import Limits, Scope, Token, TokenError

_FORMAT: Final = 1
_MAX_BYTES: Final = 16 * 1024 * 1024
_FIELDS: Final = frozenset(
    {"name", "id", "salt", "sha256", "scopes", "tenant", "created", "expires", "limits"}
)


class TokenFileError(Exception):
    """The file cannot be read or is not what it has to be; the message names it and what is wrong."""


def read_tokens(path: Path) -> dict[str, Token]:
    """Every token by its name.

    Raises:
        TokenFileError: of a file with one bad token, none is taken.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TokenFileError(f"{path} has more than {_MAX_BYTES} bytes; is it the file of tokens?")
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise TokenFileError(
                f"{path} is no file of tokens of format {_FORMAT}; see `quickchange tokens create`"
            )
        tokens = [_token(entry) for entry in document["tokens"]]
    except OSError as error:
        raise TokenFileError(f"{path} cannot be read: {error.strerror}") from None
    except TokenError as error:
        raise TokenFileError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise TokenFileError(f"{path} is damaged; write it with `quickchange tokens` only") from None
    names, ids = {token.name for token in tokens}, {token.id for token in tokens}
    if not len(names) == len(ids) == len(tokens):
        raise TokenFileError(f"{path} has a name or an id twice")
    return {token.name: token for token in tokens}


@contextmanager
def changing(path: Path) -> Iterator[dict[str, Token]]:
    """The tokens, to be changed; written when the block ends well. One process at a time.

    Raises:
        TokenFileError
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TokenFileError(f"{path} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokens = read_tokens(path) if path.exists() else {}
        yield tokens
        try:
            replace_text(path, _text(tokens.values()), private=True)
        except OSError as error:
            raise TokenFileError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        os.close(lock)


def _text(tokens: Iterable[Token]) -> str:
    document = {"format": _FORMAT, "tokens": [_entry(token) for token in tokens]}
    return json.dumps(document, indent=2) + "\n"


def _entry(token: Token) -> Mapping[str, object]:
    return {
        "name": token.name,
        "id": token.id,
        "salt": token.salt.hex(),
        "sha256": token.digest.hex(),
        "scopes": sorted(token.scopes),
        "tenant": token.tenant,
        "created": shown_time(token.created_s),
        "expires": None if token.expires_s is None else shown_time(token.expires_s),
        "limits": asdict(token.limits),
    }


def _token(entry: Any) -> Token:
    unknown = set(entry) - _FIELDS
    if unknown:  # a limit that was misspelt must not pass for none
        raise TokenError(f"{sorted(unknown)[0]!r} is no field of a token")
    salt, digest = bytes.fromhex(entry["salt"]), bytes.fromhex(entry["sha256"])
    if len(digest) != 32 or not salt:
        raise ValueError
    return Token(
        name=entry["name"],
        id=entry["id"],
        salt=salt,
        digest=digest,
        scopes=frozenset(Scope(scope) for scope in entry["scopes"]),
        tenant=entry["tenant"],
        created_s=datetime.fromisoformat(entry["created"]).timestamp(),
        expires_s=None if entry["expires"] is None else datetime.fromisoformat(entry["expires"]).timestamp(),
        limits=Limits(**entry["limits"]),
    )


def shown_time(seconds: float) -> str:
    """Seconds since 1970 as people and files write them."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
