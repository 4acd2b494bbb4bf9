"""quickchange.json, an optional manifest beside an adapter: base, origin, canary. Knows no tensors."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from adapters.canary import Canary, parse_canary
from adapters.errors import InvalidAdapterError, UnsupportedAdapterError, WrongBaseError
from adapters.files import BUNDLE_FILE, read_bounded
from adapters.strict_json import brief, parse_object

FORMAT = 1
MAX_BUNDLE_BYTES = 256 * 1024
MAX_CHAT_TEMPLATE_CHARS = 64 * 1024

_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = frozenset({"format", "base_fingerprint", "chat_template", "data_sha256", "seed", "canary"})


@dataclass(frozen=True, slots=True)
class Bundle:
    """Facts that travel with an adapter.

    Attributes:
        base_fingerprint: "sha256:…" of the base it was trained against; it is refused by every other.
        chat_template: Jinja source that messages are rendered with; None for the base's own.
        data_sha256: 64 hexadecimal digits over the training data; None if unknown.
        seed: of the training run; None if unknown.
        canary: what it answered where it was trained; None if nobody recorded it.
    """

    base_fingerprint: str
    chat_template: str | None = None
    data_sha256: str | None = None
    seed: int | None = None
    canary: Canary | None = None

    def canonical(self) -> dict[str, object]:
        """JSON-able, the same for the same content; unknown facts are left out."""
        facts = {
            "format": FORMAT,
            "base_fingerprint": self.base_fingerprint,
            "chat_template": self.chat_template,
            "data_sha256": self.data_sha256,
            "seed": self.seed,
            "canary": None if self.canary is None else self.canary.canonical(),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def to_json(self) -> str:
        """The text of a quickchange.json, checked as a reader would."""
        text = json.dumps(self.canonical(), sort_keys=True) + "\n"
        parse_bundle(text.encode())
        return text


def read_bundle(directory: Path) -> Bundle | None:
    """The manifest in an adapter's directory; None if it has none.

    Raises:
        InvalidAdapterError: it is malformed.
        UnsupportedAdapterError: it is of a later format.
    """
    path = directory / BUNDLE_FILE
    if not path.is_symlink() and not path.exists():
        return None
    return parse_bundle(read_bounded(path, MAX_BUNDLE_BYTES))


def check_base(declared: str, resident: str) -> None:
    """Whether an adapter was made for the resident base, by their fingerprints; WrongBaseError if not."""
    if declared != resident:
        raise WrongBaseError(
            f"the adapter was made for base {declared}, the server has {resident}; "
            "send it to a server with its base, or train it on this one"
        )


def parse_bundle(raw: bytes) -> Bundle:
    """The manifest in the bytes of a quickchange.json; errors as `read_bundle`."""
    members = parse_object(raw, source=BUNDLE_FILE, max_bytes=MAX_BUNDLE_BYTES)
    if members.get("format") != FORMAT:
        raise UnsupportedAdapterError(
            f"{BUNDLE_FILE} has format {brief(members.get('format'))}; this server reads format {FORMAT}",
            feature=f"{BUNDLE_FILE} format",
        )
    unknown = sorted(members.keys() - _FIELDS)
    if unknown:
        _refuse(unknown[0], members[unknown[0]], f"unknown; the fields are {', '.join(sorted(_FIELDS))}")
    return Bundle(
        base_fingerprint=_fingerprint(members),
        chat_template=_chat_template(members),
        data_sha256=_data_sha256(members),
        seed=_seed(members),
        canary=_canary(members),
    )


def _fingerprint(members: Mapping[str, Any]) -> str:
    value = members.get("base_fingerprint")
    if not isinstance(value, str) or not _FINGERPRINT.fullmatch(value):
        _refuse("base_fingerprint", value, 'it must be "sha256:" and 64 hexadecimal digits')
    return value


def _chat_template(members: Mapping[str, Any]) -> str | None:
    value = members.get("chat_template")
    if value is not None and (not isinstance(value, str) or not 0 < len(value) <= MAX_CHAT_TEMPLATE_CHARS):
        _refuse("chat_template", value, f"it must be a string of 1 to {MAX_CHAT_TEMPLATE_CHARS} characters")
    return value


def _data_sha256(members: Mapping[str, Any]) -> str | None:
    value = members.get("data_sha256")
    if value is not None and (not isinstance(value, str) or not _SHA256.fullmatch(value)):
        _refuse("data_sha256", value, "it must be 64 hexadecimal digits")
    return value


def _seed(members: Mapping[str, Any]) -> int | None:
    value = members.get("seed")
    if value is not None and (type(value) is not int or not 0 <= value < 2**64):
        _refuse("seed", value, "it must be an integer of 64 bits")
    return value


def _canary(members: Mapping[str, Any]) -> Canary | None:
    value = members.get("canary")
    return None if value is None else parse_canary(value, _refuse)


def _refuse(field: str, value: object, why: str) -> NoReturn:
    raise InvalidAdapterError(f"{field} = {brief(value)} in {BUNDLE_FILE}: {why}", reason="BAD_BUNDLE")
