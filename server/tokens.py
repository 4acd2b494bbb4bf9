"""Bearer tokens: what one may do, and how it is recognised. Knows neither files nor calls.

A token is 32 random bytes, so nobody finds it by trying, not even with its hash: one SHA-256 is enough.
A deliberately slow hash, which is for passwords that people choose, would only cost each call its time. The
salt keeps two files that have the same token from showing it.
"""

import enum
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Final

_PREFIX: Final = "qc"  # lets scanners of code and logs find tokens that were left there
_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_SALT_BYTES: Final = 16
_FORM: Final = re.compile(r"qc_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TENANT: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


class TokenError(ValueError):
    """A token cannot be as it is written or asked for; the message says what is wrong with which field."""


class Scope(enum.StrEnum):
    """What a token is for; none of them includes another."""

    INFER = "infer"
    UPLOAD = "upload"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a token may use; None is no limit.

    Attributes:
        requests_per_minute: calls of any method.
        tokens_per_minute: of prompts and answers together.
        adapter_bytes: of all versions of its tenant's adapters.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    adapter_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise TokenError(f"{name} is {value!r}, must be a whole number from 1 on")


@dataclass(frozen=True, slots=True)
class Token:
    """One token, without what would let anybody in.

    Attributes:
        id: the part of the token that is no secret.
        digest: SHA-256 of salt and secret.
        tenant: whose adapters it is about; None for the operator's, which are all.
        created_s, expires_s: seconds since 1970; None never expires.
    """

    name: str
    id: str
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    scopes: frozenset[Scope]
    tenant: str | None
    created_s: float
    expires_s: float | None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise TokenError(
                f"name is {self.name[:80]!r}, must be 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'"
            )
        if not self.scopes:
            raise TokenError(f"scopes are none, must be some of {', '.join(Scope)}")
        if self.tenant is not None and not _TENANT.fullmatch(self.tenant):
            raise TokenError(
                f"tenant is {self.tenant[:80]!r}, must be 1 to 32 of a-z, 0-9 and '-', with no '-' at an end"
            )
        if self.tenant is None and self.limits.adapter_bytes is not None:
            raise TokenError("adapter_bytes needs a tenant; the whole store's limit is --store-max-bytes")

    def is_secret(self, secret: str) -> bool:
        """Whether this is its secret; takes as long whichever character differs."""
        return hmac.compare_digest(_hashed(self.salt, secret), self.digest)

    def is_expired(self) -> bool:
        """By the wall clock."""
        return self.expires_s is not None and time.time() >= self.expires_s


def new_token(
    name: str,
    scopes: frozenset[Scope],
    tenant: str | None = None,
    expires_s: float | None = None,
    limits: Limits = Limits(),
) -> tuple[Token, str]:
    """A token and the text that proves it, which is known nowhere else from here on.

    Raises:
        TokenError
    """
    id_, secret, salt = (
        secrets.token_hex(_ID_BYTES),
        secrets.token_urlsafe(_SECRET_BYTES),
        secrets.token_bytes(_SALT_BYTES),
    )
    token = Token(name, id_, salt, _hashed(salt, secret), scopes, tenant, time.time(), expires_s, limits)
    return token, f"{_PREFIX}_{id_}_{secret}"


def split_token(text: str) -> tuple[str, str] | None:
    """Id and secret; None if this is no token."""
    match = _FORM.fullmatch(text)
    return None if match is None else (match[1], match[2])


def _hashed(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode()).digest()
