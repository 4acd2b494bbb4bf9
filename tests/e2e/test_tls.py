"""TLS and mutual TLS over a real socket: who gets in, what others hear, new certificates while it runs."""

import logging
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import quickchange
from quickchange import (
    AsyncClient,
    Client,
    InvalidArgumentError,
    PlainText,
    UnavailableError,
    tls_credentials,
)
from quickchange.certificates import CertificateError
from quickchange.connection import Endpoint
from quickchange.local_server import LocalServer
from server.access_settings import TlsSettings
from server.app import serve
from server.services.tls import ServerCertificates
from server.setting_sources import settings_from
from tests.e2e.certificates import Authority, Pair
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, environment, eventually, running
from tests.server.promised import CERTIFICATE, found_in

PROMPT = "hello"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "theirs")


def tls_server(base: Path, folder: Path, pair: Pair, *flags: str) -> ServerProcess:
    given = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key), *flags)
    return ServerProcess(base, folder / "store", SMALL, flags=given)


@pytest.fixture(scope="module")
def server(base: Path, ours: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tls")
    with running(tls_server(base, folder, ours.pair("server"))) as process:
        yield process


@pytest.fixture(scope="module")
def mutual(
    base: Path, ours: Authority, theirs: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Ours signed the server, for localhost alone; clients have to be signed by them."""
    folder = tmp_path_factory.mktemp("mutual")
    with running(
        tls_server(base, folder, ours.pair("asking", "localhost"), "--tls-client-ca", str(theirs.file))
    ) as process:
        yield process


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(ServerProcess(base, tmp_path_factory.mktemp("plain"), SMALL)) as process:
        yield process


def command(*argv: str, **variables: object) -> subprocess.CompletedProcess[str]:
    given = {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        [sys.executable, "-m", "quickchange", *argv],
        env=environment({}) | given, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


# Who gets in


def test_both_clients_and_the_command_line_speak_it(server: ServerProcess, ours: Authority) -> None:
    with server.client(credentials=tls_credentials(ours.file)) as client:
        assert client.generate(PROMPT, max_new_tokens=2).token_ids
    asked = command(
        "generate", "--server", server.grpc, "--tls-ca", str(ours.file), "--max-new-tokens", "2", PROMPT
    )
    assert asked.returncode == 0, asked.stderr
    asked = command("info", QUICKCHANGE_SERVER=server.grpc, QUICKCHANGE_SERVER_CA=ours.file)
    assert asked.returncode == 0, asked.stderr
    asked = command("info", "--server", server.grpc, "--tls", QUICKCHANGE_SERVER_CA=ours.file)
    assert asked.returncode == 0, asked.stderr


def test_when_the_certificate_expires_is_measured(server: ServerProcess) -> None:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        assert found_in(answer.read().decode()).items() >= CERTIFICATE.items()
    expires_s = server.scrape()["quickchange_certificate_expiry_timestamp_seconds"]
    assert time.time() < expires_s < time.time() + 86400


async def test_the_client_for_asyncio_speaks_it(server: ServerProcess, ours: Authority) -> None:
    async with AsyncClient(server.grpc, credentials=tls_credentials(ours.file)) as client:
        assert (await client.generate(PROMPT, max_new_tokens=2)).token_ids
        assert [event async for event in client.stream(PROMPT, max_new_tokens=2)]


def test_the_environment_makes_any_client_speak_it(
    server: ServerProcess, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICKCHANGE_SERVER_CA", str(ours.file))
    with server.client() as client:
        assert client.server_info().version == quickchange.__version__
    monkeypatch.setenv("QUICKCHANGE_TLS", "off")
    with Client(server.grpc, retry_window_s=0.1) as client, pytest.raises(UnavailableError):
        client.server_info()


def test_a_server_of_an_unknown_authority_is_not_trusted(server: ServerProcess, theirs: Authority) -> None:
    with server.client(credentials=tls_credentials(theirs.file)) as client:
        with pytest.raises(UnavailableError, match="does not trust the server's certificate") as refused:
            client.server_info()
        assert refused.value.reason == "TLS_FAILED"


def test_a_certificate_for_another_name_is_not_trusted(mutual: ServerProcess, ours: Authority) -> None:
    with (
        mutual.client(credentials=tls_credentials(ours.file)) as client,
        pytest.raises(UnavailableError, match="is for another name"),
    ):
        client.server_info()


def test_a_certificate_may_be_for_a_name_that_is_told(
    mutual: ServerProcess, ours: Authority, theirs: Authority
) -> None:
    """As the health check of a container asks: at 127.0.0.1, whatever name the certificate has."""
    pair = theirs.pair("probe")
    credentials = tls_credentials(ours.file, pair.cert, pair.key)
    with mutual.client(credentials=credentials, server_name="localhost") as client:
        assert client.is_serving()
    files = {
        "QUICKCHANGE_SERVER": mutual.grpc,
        "QUICKCHANGE_SERVER_CA": ours.file,
        "QUICKCHANGE_CLIENT_CERT": pair.cert,
        "QUICKCHANGE_CLIENT_KEY": pair.key,
    }
    asked = command("health", **files, QUICKCHANGE_SERVER_NAME="localhost")
    assert (asked.returncode, asked.stdout) == (0, "serving\n"), asked.stderr
    asked = command("health", "--tls-name", "elsewhere", **files, QUICKCHANGE_SERVER_NAME="localhost")
    assert asked.returncode == 1
    assert "say which with --tls-name" in asked.stderr


def test_plain_text_gets_nowhere_and_is_told_why(server: ServerProcess) -> None:
    with (
        Client(server.grpc, retry_window_s=0.2) as client,
        pytest.raises(UnavailableError, match="if it speaks TLS, ask it with --tls"),
    ):
        client.server_info()


def test_tls_to_a_server_in_plain_text_is_told_why(plain: ServerProcess, ours: Authority) -> None:
    with (
        plain.client(credentials=tls_credentials(ours.file)) as client,
        pytest.raises(UnavailableError, match="the server speaks plain text; ask it without TLS"),
    ):
        client.server_info()


def test_a_client_without_a_certificate_is_refused(
    mutual: ServerProcess, ours: Authority, theirs: Authority
) -> None:
    client_pair, stranger = theirs.pair("client", "client"), ours.pair("stranger", "client")
    address = mutual.grpc.replace("127.0.0.1", "localhost")
    with Client(address, credentials=tls_credentials(ours.file, client_pair.cert, client_pair.key)) as client:
        assert client.generate(PROMPT, max_new_tokens=2).token_ids
    for credentials in (
        tls_credentials(ours.file),
        tls_credentials(
            ours.file, stranger.cert, stranger.key
        ),  # signed, but not by whom the server asks for
    ):
        with (
            Client(address, credentials=credentials, retry_window_s=0.2) as client,
            pytest.raises(UnavailableError, match="a certificate if it demands one"),
        ):
            client.server_info()
    flags = (
        "--tls-ca",
        str(ours.file),
        "--tls-cert",
        str(client_pair.cert),
        "--tls-key",
        str(client_pair.key),
    )
    assert command("info", "--server", address, *flags).returncode == 0


# New certificates


def replace(pair: Pair, new: Pair) -> None:
    """As certificate managers do: each file in one step, one after the other."""
    for old_file, new_file in ((pair.cert, new.cert), (pair.key, new.key)):
        draft = old_file.with_name("draft")
        shutil.copy(new_file, draft)
        os.replace(draft, old_file)


def test_new_certificates_are_used_without_a_restart(
    base: Path, tmp_path: Path, ours: Authority, theirs: Authority
) -> None:
    pair = ours.pair("renewed")
    with running(tls_server(base, tmp_path, pair)) as server:
        with server.client(credentials=tls_credentials(ours.file)) as connected:
            stream = connected.stream(PROMPT, max_new_tokens=400, ignore_eos=True)
            next(stream)
            replace(pair, theirs.pair("renewed"))
            with server.client(credentials=tls_credentials(theirs.file)) as client:
                assert client.server_info()
            with (
                server.client(credentials=tls_credentials(ours.file)) as client,
                pytest.raises(UnavailableError, match="does not trust"),
            ):
                client.server_info()
            assert isinstance(list(stream)[-1], quickchange.Finished)  # what was connected stays so
        assert server.scrape()['quickchange_certificate_reloads_total{result="ok"}'] == 1


def test_bad_files_leave_the_last_good_ones_in_use(base: Path, tmp_path: Path, ours: Authority) -> None:
    pair = ours.pair("spoilt")
    credentials = tls_credentials(ours.file)
    with running(tls_server(base, tmp_path, pair)) as server:
        pair.key.write_text("nonsense")
        for _ in range(3):
            with server.client(credentials=credentials) as client:
                assert client.server_info()
        assert server.scrape()['quickchange_certificate_reloads_total{result="error"}'] == 1
        eventually(lambda: "certificate not reloaded, the last one stays in use" in server.log)
        assert server.log.count("certificate not reloaded") == 1  # not once for each connection
        replace(pair, ours.pair("sound"))
        with server.client(credentials=credentials) as client:
            assert client.server_info()
        assert server.scrape()['quickchange_certificate_reloads_total{result="ok"}'] == 1


# Files that are no good


def start_error(capsys: pytest.CaptureFixture[str], base: Path, folder: Path, **flags: object) -> str:
    usual = {"base": str(base), "store": str(folder / "store"), "port": "0", "metrics_port": "0"}
    assert serve(settings_from(usual | flags, {})) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not (folder / "store").exists()  # found out before anything else was done
    return line


def test_bad_files_are_named_at_the_start(
    base: Path, tmp_path: Path, ours: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ours.pair("first"), ours.pair("second")
    nothing, nonsense, encrypted = (
        tmp_path / "nothing.pem",
        tmp_path / "nonsense.pem",
        tmp_path / "locked.key",
    )
    nonsense.write_text("nonsense")
    subprocess.run(
        ["openssl", "pkey", "-in", str(first.key), "-aes256", "-passout", "pass:x", "-out", str(encrypted)],
        check=True,
    )

    def said(cert: Path, key: Path, ca: Path | None = None) -> str:
        return start_error(capsys, base, tmp_path, tls_cert=cert, tls_key=key, tls_client_ca=ca)

    assert f"{nothing} cannot be read: No such file or directory" in said(nothing, first.key)
    assert f"{nothing} cannot be read: No such file or directory" in said(first.cert, nothing)
    assert f"{nothing} cannot be read: No such file or directory" in said(first.cert, first.key, nothing)
    assert f"{second.key} is not the key of {first.cert}" in said(first.cert, second.key)
    assert f"{nonsense} holds no certificate" in said(nonsense, first.key)
    assert f"{nonsense} holds no private key" in said(first.cert, nonsense)
    assert f"{nonsense} holds no certificate" in said(first.cert, first.key, nonsense)
    assert f"{encrypted} is encrypted; decrypt it" in said(first.cert, encrypted)


def test_a_certificate_that_clients_will_refuse_is_a_warning(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    for days, warned in ((1, False), (-1, True)):
        pair = ours.pair("dated", days=days)
        with caplog.at_level(logging.WARNING):
            certificates = ServerCertificates(TlsSettings(pair.cert, pair.key), lambda _: None)
        assert certificates.expires_s == (0 if warned else pytest.approx(time.time() + 86400, abs=60))
        assert ("clients will refuse the certificate" in caplog.text) == warned
    assert "certificate has expired; renew it" in caplog.text


def test_a_pair_that_changes_while_it_is_read_is_not_taken(
    ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, new = ours.pair("torn"), ours.pair("new")
    import server.services.tls as tls

    def check_and_change(*given: Any) -> Any:
        checked = real(*given)
        replace(pair, new)
        return checked

    real = tls.check_pair
    monkeypatch.setattr(tls, "check_pair", check_and_change)
    with pytest.raises(CertificateError, match="changed while it was read"):
        ServerCertificates(TlsSettings(pair.cert, pair.key), lambda _: None)


@pytest.mark.parametrize("wrong", ["missing", "nonsense", "half", "mismatch"])
def test_a_clients_bad_files_are_named(wrong: str, tmp_path: Path, ours: Authority) -> None:
    pair, other = ours.pair("mine"), ours.pair("other")
    (tmp_path / "nonsense").write_text("nonsense")
    given: dict[str, tuple[dict[str, Path], str]] = {
        "missing": ({"ca": tmp_path / "missing"}, "missing cannot be read: No such file"),
        "nonsense": ({"ca": tmp_path / "nonsense"}, "nonsense holds no certificate"),
        "half": ({"cert": pair.cert}, "a client's certificate without its key; give both"),
        "mismatch": ({"cert": pair.cert, "key": other.key}, "is not the key of"),
    }
    files, message = given[wrong]
    with pytest.raises(InvalidArgumentError, match=message):
        tls_credentials(**files)


def test_a_server_of_ones_own_is_open_and_plain_whatever_the_environment_asks_for(
    base: Path, tmp_path: Path, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for whoever started it; `evaluate` and `demo` start such ones."""
    monkeypatch.setenv("QUICKCHANGE_SERVER_CA", str(ours.file))
    monkeypatch.setenv("QUICKCHANGE_TLS_CERT", str(tmp_path / "nothing"))
    monkeypatch.setenv("QUICKCHANGE_ACCESS_TOKENS", str(tmp_path / "nothing"))
    monkeypatch.setenv("QUICKCHANGE_GRPC_HOST", "0.0.0.0")
    flags = ("--quantization", "none", "--dtype", "float32", "--device", "cpu")
    with LocalServer(str(base), tmp_path / "store", tmp_path / "log", flags) as server:
        assert server.grpc.startswith("127.0.0.1:")
        with Client(server.grpc, credentials=PlainText()) as client:
            assert client.server_info()


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.9.1:1", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("dns:///localhost:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("ipv6:[::1]:50051", True),
        ("unix:/run/quickchange.sock", True),
        ("10.0.0.5:50051", False),
        ("[fe80::1]:50051", False),
        ("models.example:50051", False),
        ("dns://8.8.8.8/models.example:50051", False),
        ("localhost.example:50051", False),
        ("0.0.0.0:50051", False),
    ],
)
def test_a_token_in_plain_text_to_another_machine_is_a_warning(
    target: str, local: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for credentials in (PlainText(), grpc.ssl_channel_credentials()):
        caplog.clear()
        Endpoint.resolve(target, "secret", credentials, timeout_s=1, retry_window_s=1, environ={})
        warned = "in plain text, where others can read it; use TLS" in caplog.text
        assert warned == (not local and isinstance(credentials, PlainText))
        assert "secret" not in caplog.text
    caplog.clear()
    Endpoint.resolve(target, None, None, timeout_s=1, retry_window_s=1, environ={})
    assert not caplog.text
