"""Who may call what: one table from method to scopes, and the callers that tokens stand for. Knows no calls.

Whatever the table does not name is denied, to everybody.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from server.errors import PermissionDeniedError, UnauthenticatedError
from server.file_marks import mark_of
from server.rates import Rates
from server.token_file import TokenFileError, read_tokens
from server.tokens import Scope, Token, new_token, split_token

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may call a method.

    Attributes:
        scopes: any one of them lets in.
        everybody: also callers without a token.
        whole_server: concerns all tenants, so no tenant's token may.
    """

    scopes: frozenset[Scope] = frozenset(Scope)
    everybody: bool = False
    whole_server: bool = False


_ANYBODY: Final = Rule(everybody=True)
_ANY_TOKEN: Final = Rule()
_INFER: Final = Rule(frozenset({Scope.INFER}))
_UPLOAD: Final = Rule(frozenset({Scope.UPLOAD}))
_ADMIN: Final = Rule(frozenset({Scope.ADMIN}))
_OPERATOR: Final = Rule(frozenset({Scope.ADMIN}), whole_server=True)
_KEEPERS: Final = Rule(frozenset({Scope.UPLOAD, Scope.ADMIN}))

RULES: Final[Mapping[str, Rule]] = {
    "/quickchange.v1.InferenceService/Generate": _INFER,
    "/quickchange.v1.InferenceService/GenerateStream": _INFER,
    "/quickchange.v1.InferenceService/Tokenize": _INFER,
    "/quickchange.v1.InferenceService/ListModels": _ANY_TOKEN,
    "/quickchange.v1.AdapterService/UploadAdapter": _UPLOAD,
    "/quickchange.v1.AdapterService/QueryUpload": _UPLOAD,
    "/quickchange.v1.AdapterService/CancelUpload": _UPLOAD,
    "/quickchange.v1.AdapterService/GetAdapter": _ANY_TOKEN,
    "/quickchange.v1.AdapterService/ListAdapters": _ANY_TOKEN,
    "/quickchange.v1.AdapterService/WatchAdapters": _ANY_TOKEN,
    "/quickchange.v1.AdapterService/DownloadAdapter": _KEEPERS,
    "/quickchange.v1.AdapterService/UpdateAdapter": _KEEPERS,
    "/quickchange.v1.AdapterService/DeleteAdapter": _KEEPERS,
    "/quickchange.v1.AdapterService/LoadAdapter": _ADMIN,
    "/quickchange.v1.AdapterService/UnloadAdapter": _ADMIN,
    "/quickchange.v1.AdapterService/CollectGarbage": _OPERATOR,
    "/quickchange.v1.ServerService/GetServerInfo": _ANY_TOKEN,
    "/quickchange.v1.ServerService/Drain": _OPERATOR,
    "/grpc.health.v1.Health/Check": _ANYBODY,
    "/grpc.health.v1.Health/Watch": _ANYBODY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY_TOKEN,
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as far as rights go.

    Attributes:
        name: of the token; None for whoever is let in without one.
        tenant: whose adapters there are for this caller; None for all.
        rates: what is left of the token's limits.
        check_standing: raises UnauthenticatedError once the token is revoked or expired; for calls that last.
    """

    name: str | None
    tenant: str | None
    scopes: frozenset[Scope]
    rates: Rates
    adapter_bytes: int | None = None
    check_standing: Callable[[], None] = lambda: None

    def require(self, scope: Scope, what: str) -> None:
        """
        Raises:
            PermissionDeniedError: the caller has not this scope; `what` says what it would be needed for.
        """
        if scope not in self.scopes:
            raise PermissionDeniedError(f"{what} needs a token with scope {scope}", "SCOPE_MISSING")


def check_allowed(caller: Caller, method: str) -> None:
    """
    Raises:
        PermissionDeniedError: this method is not for this caller, or for nobody.
    """
    rule = RULES.get(method)
    if rule is None:
        raise PermissionDeniedError("nobody may call this method", "METHOD_NOT_ALLOWED")
    if not caller.scopes & rule.scopes:
        needed = " or ".join(sorted(rule.scopes))
        raise PermissionDeniedError(f"this needs a token with scope {needed}", "SCOPE_MISSING")
    if rule.whole_server and caller.tenant is not None:
        raise PermissionDeniedError(
            "this concerns the whole server; no tenant's token may", "TENANT_NOT_ALLOWED"
        )


class OpenDoor:
    """A server without tokens: everybody is the operator."""

    def __init__(self) -> None:
        self._everybody = Caller(None, None, frozenset(Scope), Rates(None, None))

    def admit(self, authorization: list[str], method: str) -> Caller | None:
        """The caller. Errors as Doorkeeper.admit, but for tokens, which are not looked at."""
        check_allowed(self._everybody, method)
        return self._everybody


class Doorkeeper:
    """Knows the tokens of a file; reads it again when it changes, and keeps the last good ones if it is bad.

    One thread at a time.

    Args:
        on_reload: told whether each changed file was good.

    Raises:
        TokenFileError: the file of the start is no good.
    """

    def __init__(self, path: Path, on_reload: Callable[[bool], None]) -> None:
        self._path, self._on_reload = path, on_reload
        self._mark = mark_of(path)
        self._callers: dict[str, tuple[Token, Caller]] = {}
        self._take(read_tokens(path))
        self._nobody, _ = new_token("nobody", frozenset({Scope.INFER}))

    def admit(self, authorization: list[str], method: str) -> Caller | None:
        """The caller; None if the method is for those without a token too.

        Args:
            authorization: every value of this header.

        Raises:
            UnauthenticatedError: no token, more than one, or none that counts.
            PermissionDeniedError: the token is good, and not for this method.
            RateLimitError: the token's requests of this minute are used up.
        """
        rule = RULES.get(method)
        if rule is not None and rule.everybody:
            return None
        caller = self._caller(authorization)
        check_allowed(caller, method)
        caller.rates.take_request()
        return caller

    def _caller(self, authorization: list[str]) -> Caller:
        self._reread()
        if not authorization:
            raise UnauthenticatedError(
                "this server wants a token: send `authorization: Bearer TOKEN` (QUICKCHANGE_TOKEN)",
                "TOKEN_MISSING",
            )
        scheme, _, text = authorization[0].partition(" ")
        parts = split_token(text.strip()) if scheme.lower() == "bearer" and len(authorization) == 1 else None
        id_, secret = parts or ("", "")
        token, caller = self._callers.get(id_, (self._nobody, None))
        # An unknown id is hashed like a known one, so that the time does not tell which ids there are.
        if not token.is_secret(secret) or caller is None:
            raise _not_ours()
        _check_current(token)
        return caller

    def _check_standing(self, id_: str) -> None:
        self._reread()
        if id_ not in self._callers:
            raise _not_ours()
        token, _ = self._callers[id_]
        _check_current(token)

    def _reread(self) -> None:
        mark = mark_of(self._path)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            tokens = read_tokens(self._path)
        except TokenFileError as error:
            log.error("tokens not reloaded, the last ones stay in use: %s", error)
            self._on_reload(False)
            return
        self._take(tokens)
        log.info("tokens reloaded file=%s tokens=%d", self._path, len(tokens))
        self._on_reload(True)

    def _take(self, tokens: Mapping[str, Token]) -> None:
        """What a token has used up stays used up, unless its limits are other ones."""
        before, self._callers = self._callers, {}
        for token in tokens.values():
            limits = token.limits
            old_token, old_caller = before.get(token.id, (None, None))
            if old_token is not None and old_caller is not None and old_token.limits == limits:
                rates = old_caller.rates
            else:
                rates = Rates(limits.requests_per_minute, limits.tokens_per_minute)
            standing = partial(self._check_standing, token.id)
            caller = Caller(token.name, token.tenant, token.scopes, rates, limits.adapter_bytes, standing)
            self._callers[token.id] = (token, caller)


def _check_current(token: Token) -> None:
    if token.is_expired():
        raise UnauthenticatedError(f"the token {token.name!r} has expired; get a new one", "TOKEN_EXPIRED")


def _not_ours() -> UnauthenticatedError:
    return UnauthenticatedError("the token is not one of this server's, or was revoked", "TOKEN_INVALID")
