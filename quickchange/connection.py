"""Where the server is, and how long a call to it may be tried again. Knows nothing of what is called."""

import ipaddress
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import grpc
import grpc.aio

from quickchange.errors import (
    DRAINING,
    NO_CONNECTION,
    TLS_FAILED,
    DeadlineExceededError,
    QuickchangeError,
    ResourceExhaustedError,
    UnavailableError,
)
from quickchange.tls import NAME_VARIABLE, Credentials, resolved

log = logging.getLogger(__name__)

DEFAULT_TARGET = "127.0.0.1:50051"

_REMEDY = "start one with `quickchange serve`, or correct the address"
_HUNG_UP = "Socket closed"  # gRPC's word for a connection that ended before it was one
_TLS_REMEDY = (
    "it ends the connection at once: if it speaks TLS, ask it with --tls (QUICKCHANGE_TLS=on), and with "
    "a certificate if it demands one"
)

MAX_ANSWER_BYTES = 64 * 1024 * 1024
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    ("grpc.primary_user_agent", f"quickchange/{version('quickchange')}"),
    # Our own retries decide when to ask again; gRPC's 1 s to 120 s would make them miss a server's return.
    ("grpc.initial_reconnect_backoff_ms", int(FIRST_DELAY_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(LONGEST_DELAY_S * 1000)),
)
_KEEPALIVE_S = 30.0  # servers take no more than a ping in 10 seconds
_PONG_S = 10.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address with what is needed to be let in.

    Args:
        target: HOST:PORT, or any gRPC target such as "unix:/run/quickchange.sock".
        token: sent as a bearer token; None sends none.
        credentials: for TLS; None speaks plain text.
        server_name: that the server's certificate has to be for; None is the target's host.
        timeout_s: of a whole call, its retries included; None waits for ever.
        retry_window_s: how long a call that may safely be repeated is repeated while nobody answers.
        keepalive_s: after so much silence a peer is asked whether it is there. One that vanished without a
            word would else be waited for until the call's own time-out.
        pong_s: how long it may take to answer that.
    """

    target: str
    token: str | None = field(repr=False)
    credentials: grpc.ChannelCredentials | None
    timeout_s: float | None
    retry_window_s: float
    server_name: str | None = None
    keepalive_s: float = _KEEPALIVE_S
    pong_s: float = _PONG_S

    @classmethod
    def resolve(
        cls,
        target: str | None,
        token: str | None,
        credentials: Credentials,
        timeout_s: float | None,
        retry_window_s: float,
        *,
        server_name: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> "Endpoint":
        """What was given, else the environment, else the default.

        Raises:
            InvalidArgumentError: the environment's files for TLS are no good.
        """
        endpoint = cls(
            target=target or environ.get("QUICKCHANGE_SERVER") or DEFAULT_TARGET,
            token=token or environ.get("QUICKCHANGE_TOKEN") or None,
            credentials=resolved(credentials, environ),
            timeout_s=timeout_s,
            retry_window_s=retry_window_s,
            server_name=server_name or environ.get(NAME_VARIABLE) or None,
        )
        if endpoint.token and endpoint.credentials is None and not is_local(endpoint.target):
            log.warning(
                "the token goes to %s in plain text, where others can read it; use TLS", endpoint.target
            )
        return endpoint

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self) -> grpc.Channel:
        if self.credentials is None:
            return grpc.insecure_channel(self.target, options=self._options)
        return grpc.secure_channel(self.target, self.credentials, options=self._secure_options)

    def aio_channel(self) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options=self._options)
        return grpc.aio.secure_channel(self.target, self.credentials, options=self._secure_options)

    @property
    def _options(self) -> tuple[tuple[str, int | str], ...]:
        return (
            *_OPTIONS,
            ("grpc.keepalive_time_ms", round(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.pong_s * 1000)),
        )

    @property
    def _secure_options(self) -> tuple[tuple[str, int | str], ...]:
        if self.server_name is None:
            return self._options
        return (
            *self._options,
            ("grpc.ssl_target_name_override", self.server_name),
            ("grpc.default_authority", self.server_name),
        )

    def attempts(self, *, repeatable: bool, timeout_s: float | None = None, retries: int = 0) -> "Attempts":
        """The budget of one call, counted from now; timeout_s overrides the endpoint's."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        now_s = time.monotonic()
        return Attempts(
            target=self.target,
            repeatable=repeatable,
            refusals_left=retries,
            retry_window_s=self.retry_window_s,
            retry_until_s=now_s + self.retry_window_s,
            deadline_s=None if limit_s is None else now_s + limit_s,
        )

    def unlimited_attempts(self) -> "Attempts":
        """The budget of a call that may last for ever; once it may have begun, it is not begun again."""
        return replace(self.attempts(repeatable=False), deadline_s=None)

    @contextmanager
    def waiting(self, timeout_s: float) -> Iterator["Attempts"]:
        """The budget of a call that waits for the server, whatever it takes up to the time-out.

        Raises:
            DeadlineExceededError: nothing else comes of it when the server does not.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            yield Attempts(
                target=self.target,
                repeatable=True,
                refusals_left=0,
                retry_window_s=timeout_s,
                retry_until_s=deadline_s,
                deadline_s=deadline_s,
            )
        except (DeadlineExceededError, UnavailableError) as error:
            raise DeadlineExceededError(
                f"no server answered at {self.target} within {timeout_s:g} s; {_REMEDY}", reason=NO_CONNECTION
            ) from error


@dataclass(slots=True)
class Attempts:
    """Decides whether a failed call is tried again, and when.

    A request that never left this process is sent again; one that may have arrived only if it is repeatable;
    one that the server refused before it ran (queue full, draining) only as often as the caller asked for.
    """

    target: str
    repeatable: bool
    refusals_left: int
    retry_window_s: float
    retry_until_s: float
    deadline_s: float | None
    _failures: int = 0

    def remaining_s(self) -> float | None:
        """What is left until the deadline, for the next attempt."""
        return None if self.deadline_s is None else max(self.deadline_s - time.monotonic(), 0.001)

    def renewed(self) -> "Attempts":
        """The same until the same deadline, with the whole retry window ahead again."""
        return replace(self, retry_until_s=time.monotonic() + self.retry_window_s, _failures=0)

    def delay_s(self, error: QuickchangeError) -> float:
        """How long to wait before the next attempt.

        Raises:
            QuickchangeError: the given one, if there is to be no next attempt.
        """
        if _refused(error) and self.refusals_left > 0:
            self.refusals_left -= 1
            return self._before_deadline_s(error, max(self._backoff_s(), error.retry_after_s or 0.0))
        if self._may_repeat(error):
            return self.pause_s(error)
        raise self._final(error)

    def pause_s(self, error: QuickchangeError) -> float:
        """How long to wait after an error that the caller knows to be harmless to repeat.

        Raises:
            QuickchangeError: the given one, if the retry window is over.
        """
        delay_s = self._backoff_s()
        if time.monotonic() + delay_s > self.retry_until_s:
            raise self._final(error)
        return self._before_deadline_s(error, delay_s)

    def _before_deadline_s(self, error: QuickchangeError, delay_s: float) -> float:
        if self.deadline_s is not None and time.monotonic() + delay_s >= self.deadline_s:
            raise self._final(error)
        self._failures += 1
        return delay_s

    def _may_repeat(self, error: QuickchangeError) -> bool:
        if not isinstance(error, UnavailableError) or error.reason == TLS_FAILED:
            return False
        return self.repeatable or error.reason == NO_CONNECTION

    def _final(self, error: QuickchangeError) -> QuickchangeError:
        if error.reason != NO_CONNECTION:
            return error
        remedy = _TLS_REMEDY if _HUNG_UP in error.message else _REMEDY
        return UnavailableError(f"no server answers at {self.target}; {remedy}", reason=NO_CONNECTION)

    def _backoff_s(self) -> float:
        longest_s: float = min(FIRST_DELAY_S * 2**self._failures, LONGEST_DELAY_S)
        return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads clients, keeps no secret


def is_local(target: str) -> bool:
    """Whether what is sent to a gRPC target stays on this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = target.rpartition("/")[2]
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        address = address.removeprefix(scheme)
    host = address.rpartition(":")[0].strip("[]") or address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(error: QuickchangeError) -> bool:
    """The server said no before it began."""
    if isinstance(error, ResourceExhaustedError):
        return error.retry_after_s is not None
    return isinstance(error, UnavailableError) and error.reason == DRAINING
