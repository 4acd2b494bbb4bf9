"""Tokens before a real server: every method it has, found by reflection, called raw without and with them."""

import json
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from quickchange import Client, PermissionDeniedError, QuickchangeError, UnauthenticatedError
from quickchange.cli import main
from quickchange.errors import from_rpc
from server.access import RULES
from server.app import serve
from server.setting_sources import settings_from
from server.tokens import Scope
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.reflecting import methods_of
from tests.e2e.tokens import create

HEALTH = "/grpc.health.v1.Health/"
KINDS: Mapping[str, tuple[str, ...]] = {
    "infer": ("--scope", "infer"),
    "upload": ("--scope", "upload"),
    "admin": ("--scope", "admin"),
    "tenant-admin": ("--scope", "admin", "--tenant", "acme"),
    "all": ("--scope", "infer", "--scope", "upload", "--scope", "admin"),
}
UNKNOWN = "qc_0123456789ab_" + "A" * 43


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("access") / "tokens.json"


@pytest.fixture(scope="module")
def tokens(file: Path) -> Mapping[str, str]:
    return {name: create(file, name, *flags) for name, flags in KINDS.items()}


@pytest.fixture(scope="module")
def server(
    base: Path, file: Path, tokens: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    with running(ServerProcess(base, store, SMALL, flags=("--tokens", str(file)))) as process:
        yield process


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as open_channel:
        yield open_channel


@pytest.fixture(scope="module")
def methods(channel: grpc.Channel, tokens: Mapping[str, str]) -> list[str]:
    return sorted(methods_of(channel, tokens["all"]))


def call(
    channel: grpc.Channel, method: str, *authorization: str, timeout_s: float = 20
) -> QuickchangeError | None:
    """What came of it; None if it was answered, or if it went on without an end."""
    metadata = [("authorization", value) for value in authorization]
    # Streams both ways: on the wire that is the same as every other kind of method.
    answers = channel.stream_stream(method)(iter([b""]), timeout=timeout_s, metadata=metadata)
    try:
        next(iter(answers), None)
    except grpc.RpcError as error:
        return from_rpc(error)
    finally:
        answers.cancel()
    return None


def denied(answer: QuickchangeError | None) -> bool:
    return isinstance(answer, UnauthenticatedError | PermissionDeniedError)


# Every method


def test_every_method_has_its_rule(methods: list[str]) -> None:
    assert len(methods) >= 20
    assert set(methods) == set(RULES)


def test_nothing_but_health_answers_without_a_token(channel: grpc.Channel, methods: list[str]) -> None:
    for method in methods:
        answer = call(channel, method)
        if method.startswith(HEALTH):
            assert not denied(answer), method
        else:
            assert isinstance(answer, UnauthenticatedError), method
            assert answer.reason == "TOKEN_MISSING"


@pytest.mark.parametrize(
    "authorization",
    [
        (f"Bearer {UNKNOWN}",),
        ("Bearer {infer}x",),
        ("Bearer {infer_id}" + "A" * 43,),
        ("Bearer ",),
        ("",),
        ("Basic {infer}",),
        ("{infer}",),
        ("Bearer {infer}", "Bearer {infer}"),
        ("Bearer {infer}", f"Bearer {UNKNOWN}"),
        ("Bearer " + "A" * 4000,),
    ],
)
def test_no_method_takes_a_bad_token(
    channel: grpc.Channel, methods: list[str], tokens: Mapping[str, str], authorization: tuple[str, ...]
) -> None:
    infer = tokens["infer"]
    given = [each.format(infer=infer, infer_id=infer[: len("qc_0123456789ab_")]) for each in authorization]
    for method in methods:
        answer = call(channel, method, *given)
        if method.startswith(HEALTH):
            assert not denied(answer), method
        else:
            assert isinstance(answer, UnauthenticatedError), method
            assert answer.reason == "TOKEN_INVALID"


@pytest.mark.parametrize("kind", ["infer", "upload", "admin", "tenant-admin"])
def test_a_scope_opens_its_methods_and_no_others(
    channel: grpc.Channel, methods: list[str], tokens: Mapping[str, str], kind: str
) -> None:
    scope = Scope(kind.removeprefix("tenant-"))
    for method in methods:
        rule = RULES[method]
        is_allowed = scope in rule.scopes and not (rule.whole_server and kind == "tenant-admin")
        if is_allowed and method.endswith("/Drain"):
            continue  # it would do it
        answer = call(channel, method, f"Bearer {tokens[kind]}", timeout_s=20 if not is_allowed else 2)
        assert isinstance(answer, PermissionDeniedError) != is_allowed, method
        assert not isinstance(answer, UnauthenticatedError), method
        if not is_allowed:
            assert answer is not None
            assert answer.reason in ("SCOPE_MISSING", "TENANT_NOT_ALLOWED")


def test_a_method_without_a_rule_is_closed_to_everybody(
    channel: grpc.Channel, tokens: Mapping[str, str]
) -> None:
    for method in ("/quickchange.v1.ServerService/Reboot", "/nothing/at.all", "/grpc.health.v1.Health/Open"):
        assert isinstance(call(channel, method), UnauthenticatedError)
        answer = call(channel, method, f"Bearer {tokens['all']}")
        assert isinstance(answer, PermissionDeniedError)
        assert answer.reason == "METHOD_NOT_ALLOWED"


def test_an_upload_is_turned_away_before_its_bytes_are_read(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(200):
            sent += 1
            yield bytes(1 << 20)

    upload = channel.stream_unary("/quickchange.v1.AdapterService/UploadAdapter")
    with pytest.raises(grpc.RpcError) as refused:
        upload(chunks(), timeout=30)
    assert isinstance(from_rpc(refused.value), UnauthenticatedError)
    assert sent < 50


# Clients and the file


def test_the_clients_token_lets_it_in(
    server: ServerProcess, tokens: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with server.client(token=tokens["infer"]) as client:
        assert client.generate("hello", max_new_tokens=2).token_ids
        with pytest.raises(PermissionDeniedError, match="needs a token with scope admin"):
            client.drain()
    with server.client() as client, pytest.raises(UnauthenticatedError, match="QUICKCHANGE_TOKEN"):
        client.generate("hello", max_new_tokens=2)
    secret = tmp_path / "token"
    secret.write_text(tokens["infer"] + "\n")
    ask = ["info", "--server", server.grpc]
    assert main([*ask, "--token", tokens["infer"]]) == 0
    assert main([*ask, "--token-file", str(secret)]) == 0
    assert main(ask) == 1
    monkeypatch.setenv("QUICKCHANGE_TOKEN", tokens["infer"])
    assert main(ask) == 0
    secret.write_text("two words")
    assert main([*ask, "--token-file", str(secret)]) == 2
    assert main([*ask, "--token-file", str(tmp_path / "nothing")]) == 2


def test_a_revoked_token_is_refused_at_once_and_a_new_one_let_in(server: ServerProcess, file: Path) -> None:
    secret = create(file, "brief", "--scope", "infer")
    with server.client(token=secret) as client:
        assert client.server_info()
        assert main(["tokens", "revoke", "--file", str(file), "brief"]) == 0
        with pytest.raises(UnauthenticatedError, match="was revoked"):
            client.server_info()


def test_a_watch_ends_with_its_token(
    server: ServerProcess, file: Path, tokens: Mapping[str, str], adapters: Mapping[str, Path]
) -> None:
    secret = create(file, "watcher", "--scope", "infer")
    with server.client(token=secret) as watcher, server.client(token=tokens["all"]) as client:
        client.adapters.push(adapters["a"], "watched")
        with watcher.adapters.watch(send_initial=True) as events:
            assert next(events).adapter.name == "watched"
            assert main(["tokens", "revoke", "--file", str(file), "watcher"]) == 0
            client.adapters.alias("watched", "prod", 1)
            with pytest.raises(UnauthenticatedError, match="was revoked"):
                list(events)


def test_an_expired_token_is_refused_as_such(server: ServerProcess, file: Path) -> None:
    until = datetime.fromtimestamp(time.time() + 2, UTC).isoformat()
    secret = create(file, "short-lived", "--scope", "infer", "--expires", until)
    with server.client(token=secret) as client:
        assert client.server_info()
        time.sleep(2)
        with pytest.raises(UnauthenticatedError, match="'short-lived' has expired") as refused:
            client.server_info()
    assert refused.value.reason == "TOKEN_EXPIRED"


def test_a_bad_file_leaves_the_last_tokens_in_use(
    server: ServerProcess, file: Path, tokens: Mapping[str, str]
) -> None:
    good = file.read_text()
    document: Any = json.loads(good)
    document["tokens"][0]["limitz"] = {}
    try:
        for bad in ("", "{", json.dumps(document), good.replace('"infer"', '"everything"')):
            before = server.scrape().get('quickchange_token_reloads_total{result="error"}', 0)
            file.write_text(bad)
            with server.client(token=tokens["infer"]) as client:
                assert client.server_info()
                assert client.server_info()
            assert server.scrape()['quickchange_token_reloads_total{result="error"}'] == before + 1
        file.unlink()
        with server.client(token=tokens["infer"]) as client:
            assert client.server_info()
        eventually(lambda: "tokens not reloaded, the last ones stay in use" in server.log)
    finally:
        file.write_text(good)
    with server.client(token=tokens["infer"]) as client:
        assert client.server_info()


def test_denials_are_counted_by_reason(server: ServerProcess, channel: grpc.Channel) -> None:
    name = 'quickchange_calls_denied_total{reason="TOKEN_MISSING"}'
    before = server.scrape().get(name, 0)
    call(channel, "/quickchange.v1.ServerService/GetServerInfo")
    assert server.scrape()[name] == before + 1


# Where a server may listen


def start_error(capsys: pytest.CaptureFixture[str], base: Path, folder: Path, **flags: object) -> str:
    usual = {"base": str(base), "store": str(folder / "store"), "port": "0", "metrics_port": "0"}
    assert serve(settings_from(usual | flags, {})) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not (folder / "store").exists()
    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_server_that_others_reach_says_who_may(
    base: Path, tmp_path: Path, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = start_error(capsys, base, tmp_path, host=host)
    assert line.startswith(
        f"error: --host {host} would let everybody who reaches it do everything; give --tokens"
    )
    assert "--insecure-open on" in line


def test_a_server_that_others_reach_starts_with_tokens_or_when_it_is_wanted(
    base: Path, tmp_path: Path, file: Path, tokens: Mapping[str, str]
) -> None:
    open_flags = ("--host", "0.0.0.0", "--insecure-open", "on")
    with running(ServerProcess(base, tmp_path / "open", SMALL, flags=open_flags)) as process:
        with Client(process.grpc.replace("0.0.0.0", "127.0.0.1")) as client:
            assert client.server_info()
        assert "everybody who reaches 0.0.0.0 may do everything" in process.log
    closed_flags = ("--host", "0.0.0.0", "--tokens", str(file))
    with running(ServerProcess(base, tmp_path / "closed", SMALL, flags=closed_flags)) as process:
        with Client(process.grpc.replace("0.0.0.0", "127.0.0.1"), token=tokens["infer"]) as client:
            assert client.server_info()
        assert "tokens travel to 0.0.0.0 in plain text" in process.log


def test_a_bad_file_of_tokens_is_named_at_the_start(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing, bad = tmp_path / "nothing.json", tmp_path / "bad.json"
    bad.write_text("{}")
    assert f"--tokens: {nothing} cannot be read: No such file" in start_error(
        capsys, base, tmp_path, tokens=nothing
    )
    assert f"--tokens: {bad} is no file of tokens" in start_error(capsys, base, tmp_path, tokens=bad)
