"""Tokens, their file, their limits and who may call what, without a server."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access import Doorkeeper, OpenDoor, check_allowed
from server.errors import PermissionDeniedError, RateLimitError, UnauthenticatedError
from server.rates import Bucket, Rates
from server.token_file import TokenFileError, changing, read_tokens
from server.tokens import Limits, Scope, Token, TokenError, new_token, split_token

INFER = frozenset({Scope.INFER})
GENERATE = "/quickchange.v1.InferenceService/Generate"
DRAIN = "/quickchange.v1.ServerService/Drain"


def add(path: Path, name: str, scopes: frozenset[Scope] = INFER, **options: Any) -> str:
    token, secret = new_token(name, scopes, **options)
    with changing(path) as tokens:
        tokens[name] = token
    return secret


# Tokens


def test_a_token_knows_its_secret_and_does_not_hold_it() -> None:
    token, text = new_token("ci", INFER)
    id_, secret = split_token(text) or ("", "")
    assert (id_, token.is_secret(secret)) == (token.id, True)
    assert not token.is_secret(secret[:-1])
    assert not token.is_secret("")
    assert secret not in repr(token)
    assert token.digest.hex() not in repr(token)


def test_no_two_tokens_are_alike() -> None:
    made = [new_token("ci", INFER) for _ in range(100)]
    assert len({text for _, text in made}) == len({token.id for token, _ in made}) == 100
    assert len({token.salt for token, _ in made}) == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "name is 'a b'"),
        ({"name": ""}, "name is ''"),
        ({"name": "line\nbreak"}, "name is 'line"),
        ({"scopes": frozenset()}, "scopes are none"),
        ({"tenant": "a.b"}, "tenant is 'a.b'"),
        ({"tenant": "-a"}, "tenant is '-a'"),
        ({"limits": Limits(adapter_bytes=5)}, "adapter_bytes needs a tenant"),
    ],
)
def test_what_a_token_cannot_be(changes: dict[str, Any], message: str) -> None:
    token, _ = new_token("ci", INFER)
    with pytest.raises(TokenError, match=message):
        dataclasses.replace(token, **changes)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "5"])
def test_limits_are_whole_numbers(value: Any) -> None:
    with pytest.raises(TokenError, match="requests_per_minute"):
        Limits(requests_per_minute=value)


# The file


def test_what_is_written_is_read_and_the_secret_is_not_in_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokens.json"
    limits = Limits(60, 1000, 1 << 30)
    secret = add(
        path, "ci", frozenset({Scope.UPLOAD, Scope.ADMIN}), tenant="acme", limits=limits, expires_s=4e9
    )
    add(path, "app")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret.rpartition("_")[2] not in path.read_text()
    tokens = read_tokens(path)
    assert list(tokens) == ["ci", "app"]
    ci = tokens["ci"]
    assert (ci.scopes, ci.tenant, ci.limits, ci.expires_s) == ({"upload", "admin"}, "acme", limits, 4e9)
    assert ci.is_secret((split_token(secret) or ("", ""))[1])


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    add(path, "ci")
    before = path.read_bytes()

    def fail() -> None:
        with changing(path) as tokens:
            del tokens["ci"]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == before


def test_processes_that_change_it_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    code = (
        "import sys; from pathlib import Path; from tests.server.test_tokens import add\n"
        "for n in range(20): add(Path(sys.argv[1]), f'{sys.argv[2]}-{n}')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(read_tokens(path)) == 40


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "", "damaged"),
        (lambda text: text[:-20], "damaged"),
        (lambda text: "[]", "no file of tokens"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "no file of tokens"),
        (lambda text: text.replace('"limits"', '"limitz"'), "'limitz' is no field"),
        (lambda text: text.replace('"infer"', '"everything"'), "damaged"),
        (lambda text: text.replace('"sha256": "', '"sha256": "00'), "damaged"),
        (lambda text: text.replace('"name": "ci"', '"name": 5'), "damaged"),
        (
            lambda text: text.replace('"requests_per_minute": null', '"requests_per_minute": 0'),
            "requests_per_minute",
        ),
        (lambda text: text.replace('"tenant": null', '"tenant": "A"'), "tenant is 'A'"),
        (lambda text: "[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_file_is_refused_whole(tmp_path: Path, spoil: Any, message: str) -> None:
    path = tmp_path / "tokens.json"
    add(path, "ci")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(TokenFileError, match=message):
        read_tokens(path)


def test_a_name_or_an_id_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    add(path, "ci")
    document = json.loads(path.read_text())
    document["tokens"] *= 2
    path.write_text(json.dumps(document))
    with pytest.raises(TokenFileError, match="twice"):
        read_tokens(path)


# Rates


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@given(st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 1500), st.floats(0, 30)), max_size=30))
def test_a_bucket_gives_no_more_than_its_rate_and_keeps_its_word(
    per_minute: int, steps: list[tuple[int, float]]
) -> None:
    clock = Clock()
    bucket, given_out = Bucket(per_minute, clock), 0
    for amount, pause_s in steps:
        wait_s = bucket.wait_s(amount)
        if amount <= per_minute:
            clock.now_s += wait_s + 1e-6  # come back when it said
            assert bucket.wait_s(amount) == 0
            bucket.take(amount)
            given_out += amount
        assert given_out <= per_minute * (1 + clock.now_s / 60) + 1e-3
        clock.now_s += pause_s


def test_requests_run_out_and_come_back_when_it_says() -> None:
    clock = Clock()
    rates = Rates(2, None, clock)
    rates.take_request()
    rates.take_request()
    with pytest.raises(RateLimitError) as refused:
        rates.take_request()
    assert (refused.value.reason, refused.value.retry_after_s) == ("REQUESTS_PER_MINUTE", 30)
    clock.now_s += 30
    rates.take_request()


def test_tokens_that_were_not_used_come_back() -> None:
    rates = Rates(None, 100, Clock())
    first = rates.reserve_tokens(10, 60)
    first.use(10)
    with pytest.raises(RateLimitError) as refused:
        rates.reserve_tokens(10, 60)
    assert (refused.value.reason, refused.value.retry_after_s) == ("TOKENS_PER_MINUTE", 24)
    first.close()
    first.close()
    with pytest.raises(RateLimitError):
        rates.reserve_tokens(10, 81)
    rates.reserve_tokens(10, 80)
    with pytest.raises(RateLimitError) as never:
        rates.reserve_tokens(1, 100)
    assert never.value.retry_after_s is None  # waiting would not help


# Who may


def test_what_has_no_rule_is_denied_to_whoever_has_every_right() -> None:
    everybody = OpenDoor().admit([], GENERATE)
    assert everybody is not None
    assert everybody.scopes == set(Scope)
    with pytest.raises(PermissionDeniedError) as refused:
        check_allowed(everybody, "/quickchange.v1.ServerService/New")
    assert refused.value.reason == "METHOD_NOT_ALLOWED"
    with pytest.raises(PermissionDeniedError):
        OpenDoor().admit([], "/quickchange.v1.ServerService/New")


def test_what_concerns_the_whole_server_is_for_no_tenant(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    tenants = add(path, "tenant", frozenset(Scope), tenant="acme")
    operators = add(path, "operator", frozenset(Scope))
    doors = Doorkeeper(path, lambda _: None)
    assert doors.admit([f"bearer {operators}"], DRAIN)
    with pytest.raises(PermissionDeniedError) as refused:
        doors.admit([f"Bearer {tenants}"], DRAIN)
    assert refused.value.reason == "TENANT_NOT_ALLOWED"


def test_what_is_used_up_stays_so_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    secret = add(path, "ci", limits=Limits(requests_per_minute=1))
    doors = Doorkeeper(path, lambda _: None)
    assert doors.admit([f"Bearer {secret}"], GENERATE)
    add(path, "other")
    with pytest.raises(RateLimitError):
        doors.admit([f"Bearer {secret}"], GENERATE)
    with changing(path) as tokens:
        tokens["ci"] = dataclasses.replace(tokens["ci"], limits=Limits(requests_per_minute=2))
    assert doors.admit([f"Bearer {secret}"], GENERATE)


def test_a_file_that_comes_and_goes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    told: list[bool] = []
    secret = add(path, "ci")
    doors = Doorkeeper(path, told.append)
    text = path.read_text()
    path.unlink()
    assert doors.admit([f"Bearer {secret}"], GENERATE)
    os.utime(path.parent)
    path.write_text(text.replace('"ci"', '"renamed"'))
    caller = doors.admit([f"Bearer {secret}"], GENERATE)
    assert caller is not None
    assert (caller.name, told) == ("renamed", [False, True])
    with changing(path) as tokens:
        tokens.clear()
    with pytest.raises(UnauthenticatedError):
        doors.admit([f"Bearer {secret}"], GENERATE)


def test_an_unknown_id_is_hashed_as_a_known_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time does not tell which ids there are."""
    path = tmp_path / "tokens.json"
    add(path, "ci")
    doors = Doorkeeper(path, lambda _: None)
    asked: list[str] = []
    real = Token.is_secret

    def counted(token: Token, secret: str) -> bool:
        asked.append(secret)
        return real(token, secret)

    monkeypatch.setattr(Token, "is_secret", counted)
    known = next(iter(read_tokens(path).values())).id
    for id_ in (known, "0" * 12):
        with pytest.raises(UnauthenticatedError):
            doors.admit([f"Bearer qc_{id_}_{'A' * 43}"], GENERATE)
    assert len(asked) == 2


def test_a_token_expires_by_the_wall_clock() -> None:
    token, _ = new_token("ci", INFER, expires_s=time.time() - 1)
    assert token.is_expired()
    assert not dataclasses.replace(token, expires_s=None).is_expired()
