"""What adapters, versions, aliases and labels may be called, and how to read references. Knows no store."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import InvalidAdapterError
from adapters.strict_json import brief

MAX_VERSION = 2**31
MAX_LABELS = 32
MAX_LABEL_CHARS = 256
MAX_DESCRIPTION_CHARS = 4096

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?")
_LABEL_KEY = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST_PREFIX = "sha256"
_NAME_RULE = "1 to 128 of a-z, 0-9, '.', '_' and '-', with a letter or digit at both ends and without '..'"


@dataclass(frozen=True, slots=True)
class NewestOf:
    """ "sql": whichever version is the newest."""

    name: str


@dataclass(frozen=True, slots=True)
class VersionOf:
    """ "sql@3"."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class AliasOf:
    """ "sql:prod"."""

    name: str
    alias: str


@dataclass(frozen=True, slots=True)
class ContentOf:
    """ "sha256:…": whatever has this content."""

    digest: str


Reference = NewestOf | VersionOf | AliasOf | ContentOf


def parse_reference(text: str) -> Reference:
    """ "name", "name@3", "name:alias" or "sha256:<64 hex>" as what it refers to.

    Raises:
        InvalidAdapterError: reason BAD_REFERENCE or BAD_NAME, saying which part is wrong.
    """
    if text.startswith(f"{_DIGEST_PREFIX}:"):
        return ContentOf(check_digest(text))
    name, separator, rest = _split(text)
    check_name(name)
    if separator == "@":
        if not _VERSION.fullmatch(rest) or int(rest) > MAX_VERSION:
            raise _bad_reference(text, f"the version after '@' must be a number from 1 to {MAX_VERSION}")
        return VersionOf(name, int(rest))
    if separator == ":":
        return AliasOf(name, check_alias(rest))
    return NewestOf(name)


def check_name(name: str) -> str:
    """The name itself if an adapter may be called so; otherwise InvalidAdapterError, reason BAD_NAME."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidAdapterError(f"{brief(name)} is no adapter name; use {_NAME_RULE}", reason="BAD_NAME")
    if name == _DIGEST_PREFIX:
        raise InvalidAdapterError(f"{name!r} is kept for digests; choose another name", reason="BAD_NAME")
    return name


def owner_of(name: str) -> str | None:
    """The tenant whose a name is: what stands before its first dot; None, everybody's, without one."""
    owner, dot, _ = name.partition(".")
    return owner if dot else None


def is_visible(name: str, tenant: str | None) -> bool:
    """Whether there is an adapter of this name for a tenant; None sees all of them."""
    return tenant is None or owner_of(name) in (None, tenant)


def check_alias(alias: str) -> str:
    """The alias itself if a version may be called so; otherwise InvalidAdapterError, reason BAD_ALIAS."""
    if not _NAME.fullmatch(alias) or ".." in alias:
        raise InvalidAdapterError(f"{brief(alias)} is no alias; use {_NAME_RULE}", reason="BAD_ALIAS")
    if alias.isdigit():
        raise InvalidAdapterError(
            f"{alias!r} is no alias, since it looks like a version; add a letter", reason="BAD_ALIAS"
        )
    return alias


def check_version(version: int) -> int:
    """The number itself if it can be a version; otherwise InvalidAdapterError, reason BAD_VERSION."""
    if not 1 <= version <= MAX_VERSION:
        raise InvalidAdapterError(
            f"{brief(version)} is no version; use 1 to {MAX_VERSION}, or leave it unset for the next one",
            reason="BAD_VERSION",
        )
    return version


def check_digest(digest: str) -> str:
    """The digest itself if it is one; otherwise InvalidAdapterError, reason BAD_REFERENCE."""
    if not _DIGEST.fullmatch(digest):
        raise _bad_reference(digest, "a digest is 'sha256:' and 64 lower-case hexadecimal digits")
    return digest


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy of labels that are few, short and printable; else InvalidAdapterError, reason BAD_LABELS."""
    if len(labels) > MAX_LABELS:
        raise _bad_label(f"{len(labels)} labels are too many; use at most {MAX_LABELS}")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise _bad_label(f"{brief(key)} is no label key; use up to 63 of a-z, 0-9 and '._-/'")
        if len(value) > MAX_LABEL_CHARS or not value.isprintable():
            raise _bad_label(f"label {key!r} must have at most {MAX_LABEL_CHARS} printable characters")
    return dict(labels)


def check_description(description: str) -> str:
    """The text itself if it is short and printable; otherwise InvalidAdapterError, reason BAD_DESCRIPTION."""
    if len(description) > MAX_DESCRIPTION_CHARS or not description.replace("\n", "").isprintable():
        raise InvalidAdapterError(
            f"the description must have at most {MAX_DESCRIPTION_CHARS} printable characters and line breaks",
            reason="BAD_DESCRIPTION",
        )
    return description


def _split(text: str) -> tuple[str, str, str]:
    at, colon = text.partition("@"), text.partition(":")
    if at[1] and colon[1]:
        raise _bad_reference(text, "it has both a version '@' and an alias ':'; use one of them")
    return at if at[1] else colon


def _bad_reference(text: str, why: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"{brief(text)} is no adapter reference: {why}", reason="BAD_REFERENCE")


def _bad_label(message: str) -> InvalidAdapterError:
    return InvalidAdapterError(message, reason="BAD_LABELS")
