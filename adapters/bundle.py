"""quickchange.json, an optional manifest beside an adapter: base, text, canary, origin. Knows no tensors."""

import json
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from adapters.canary import Canary, parse_canary
from adapters.errors import InvalidAdapterError, UnsupportedAdapterError, WrongBaseError
from adapters.files import BUNDLE_FILE, read_bounded
from adapters.layout import BaseLayout
from adapters.origin import Origin, parse_origin
from adapters.strict_json import brief, parse_object

FORMAT = 1
MAX_BUNDLE_BYTES = 256 * 1024
MAX_CHAT_TEMPLATE_CHARS = 64 * 1024
MAX_EOS_TOKENS = 64

_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_TOKEN_ID = 2**31
_FIELDS = frozenset(
    {
        *("format", "base_fingerprint", "chat_template", "eos_token_ids"),
        *("data_sha256", "seed", "canary", "training"),
    }
)


@dataclass(frozen=True, slots=True)
class Bundle:
    """Facts that travel with an adapter.

    Attributes:
        base_fingerprint: "sha256:…" of the base it was trained against; it is refused by every other.
        chat_template: Jinja source that messages are rendered with; None for the base's own.
        data_sha256: 64 hexadecimal digits over the training data; None if unknown.
        seed: of the training run; None if unknown.
        canary: what it answered where it was trained; None if nobody recorded it.
        eos_token_ids: at which answers ended where it was trained, ascending; None if unknown.
        training: how it came about; None if unknown.
    """

    base_fingerprint: str
    chat_template: str | None = None
    data_sha256: str | None = None
    seed: int | None = None
    canary: Canary | None = None
    eos_token_ids: tuple[int, ...] | None = None
    training: Origin | None = None

    def canonical(self) -> dict[str, object]:
        """JSON-able, the same for the same content; unknown facts are left out."""
        facts = {
            "format": FORMAT,
            "base_fingerprint": self.base_fingerprint,
            "chat_template": self.chat_template,
            "eos_token_ids": None if self.eos_token_ids is None else list(self.eos_token_ids),
            "data_sha256": self.data_sha256,
            "seed": self.seed,
            "canary": None if self.canary is None else self.canary.canonical(),
            "training": None if self.training is None else self.training.canonical(),
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


def check_base(declared: str | None, resident: BaseLayout) -> None:
    """Whether an adapter was made for the resident base, by their fingerprints; WrongBaseError if not.

    Args:
        declared: None if the adapter does not say.
    """
    if declared == resident.fingerprint or (declared is None and not resident.merged):
        return
    made_for = (
        "does not say for which base it was made" if declared is None else f"was made for base {declared}"
    )
    if resident.merged:
        raise WrongBaseError(
            f"the adapter {made_for}, and this server's base has {resident.merged} merged into it and is "
            f"{resident.fingerprint}; ask a server of the bare base, or train on the merged one, which "
            f"{BUNDLE_FILE} then says"
        )
    raise WrongBaseError(
        f"the adapter {made_for}, the server has {resident.fingerprint}; "
        "send it to a server with its base, or train it on this one"
    )


def check_text(bundle: Bundle, eos_token_ids: Set[int], chat_template: str | None) -> str:
    """Whether answers end here where they did in training, and whose template renders chats; in one line.

    Args:
        eos_token_ids, chat_template: of the resident base.

    Raises:
        WrongBaseError: this base goes on after a token that ended answers.
    """
    if bundle.eos_token_ids is None:
        ends = "it does not say where answers end"
    else:
        unknown = sorted(set(bundle.eos_token_ids) - eos_token_ids)
        if unknown:
            raise WrongBaseError(
                f"{BUNDLE_FILE}: answers ended at {_listed(bundle.eos_token_ids)} in training, "
                f"and this base does not stop at {_listed(unknown)} but at {_listed(sorted(eos_token_ids))}; "
                "serve it with the generation_config.json and tokenizer it was trained with"
            )
        ends = f"answers end at {_listed(bundle.eos_token_ids)}"
    if bundle.chat_template is None:
        return f"{ends}; chats are rendered with the base's template"
    same = "the base's template" if bundle.chat_template == chat_template else "the adapter's own template"
    return f"{ends}; chats are rendered with {same}"


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
        eos_token_ids=_eos_token_ids(members),
        training=_training(members),
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


def _eos_token_ids(members: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = members.get("eos_token_ids")
    if value is None:
        return None
    if not isinstance(value, list) or not 0 < len(value) <= MAX_EOS_TOKENS:
        _refuse("eos_token_ids", value, f"it must be a list of 1 to {MAX_EOS_TOKENS} token ids")
    if not all(type(token) is int and 0 <= token < _MAX_TOKEN_ID for token in value):
        _refuse("eos_token_ids", value, f"token ids are from 0 to {_MAX_TOKEN_ID - 1}")
    if value != sorted(set(value)):
        _refuse("eos_token_ids", value, "they must ascend, each once")
    return tuple(value)


def _training(members: Mapping[str, Any]) -> Origin | None:
    value = members.get("training")
    return None if value is None else parse_origin(value, _refuse)


def _listed(tokens: Iterable[int]) -> str:
    return ", ".join(map(str, tokens)) or "none"


def _refuse(field: str, value: object, why: str) -> NoReturn:
    raise InvalidAdapterError(f"{field} = {brief(value)} in {BUNDLE_FILE}: {why}", reason="BAD_BUNDLE")
