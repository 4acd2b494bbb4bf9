"""What a server writes down: every change of an adapter with who made it, and no secret anywhere."""

import json
import signal
import stat
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quickchange import (
    NotFoundError,
    PermissionDeniedError,
    QuickchangeError,
    UnauthenticatedError,
    tls_credentials,
)
from tests.e2e.certificates import Authority
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.tokens import create

SECRET_PROMPT = "the combination of the safe is eleven"
DEBUGGING = """
    # A server that says all it can.
    import logging, os, sys
    os.environ["GRPC_VERBOSITY"] = "DEBUG"
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    from quickchange.cli import main
    sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_every_change_is_one_line_with_who_made_it(
    base: Path, tmp_path: Path, adapters: Mapping[str, Path]
) -> None:
    tokens, audit = tmp_path / "tokens.json", tmp_path / "audit.jsonl"
    admin = create(tokens, "ops", "--scope", "admin", "--scope", "upload", "--scope", "infer")
    tenant = create(tokens, "ci", "--scope", "upload", "--tenant", "acme")
    flags = ("--tokens", str(tokens), "--audit-log", str(audit))
    with running(ServerProcess(base, tmp_path / "store", SMALL, flags=flags)) as server:
        with server.client(token=tenant) as ci, server.client(token=admin) as ops:
            first = ci.adapters.push(adapters["a"], "acme.a").adapter
            ci.adapters.push(adapters["a"], "acme.a")
            ci.adapters.push(adapters["b"], "acme.a", validate_only=True)
            second = ci.adapters.push(adapters["b"], "acme.a").adapter
            with pytest.raises(PermissionDeniedError):
                ci.adapters.push(adapters["a"], "other")
            with pytest.raises(NotFoundError):
                ci.adapters.delete("acme.nothing")
            ci.adapters.alias("acme.a", "prod", 1)
            ops.adapters.load("acme.a:prod")
            ops.adapters.unload("acme.a:prod")
            ops.generate("hello", adapter="acme.a", max_new_tokens=1)  # changes nothing
            ops.adapters.collect_garbage(keep_versions=1, min_age_s=0, dry_run=True)
            ops.adapters.delete("acme.a", all_versions=True)
        lines = [json.loads(line) for line in audit.read_text().splitlines()]
        assert "acme.a" not in "".join(line for line in server.stderr if "quickchange.audit" in line)
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600
    told = [(line["who"], line["action"], line["adapter"], line["digest"], line["outcome"]) for line in lines]
    assert told == [
        ("ci", "upload", "acme.a@1", first.digest, "created"),
        ("ci", "upload", "acme.a@1", first.digest, "unchanged"),
        ("ci", "upload", "acme.a@2", second.digest, "created"),
        ("ci", "upload", "other", "", "TENANT_NOT_ALLOWED"),
        ("ci", "delete", "acme.nothing", "", "ADAPTER_NOT_FOUND"),
        ("ci", "update", "acme.a@1", first.digest, "ok"),
        ("ops", "load", "acme.a@1", first.digest, "ok"),
        ("ops", "unload", "acme.a@1", first.digest, "ok"),
        ("ops", "delete", "acme.a@1", first.digest, "ok"),
        ("ops", "delete", "acme.a@2", second.digest, "ok"),
    ]
    assert all(
        line["peer"].startswith("ipv4:127.0.0.1:") and line["time"].endswith("+00:00") for line in lines
    )
    assert [line["tenant"] for line in lines if line["who"] == "ci"] == ["acme"] * 6


def test_without_a_file_the_log_has_the_lines_and_a_certificate_names_who(
    base: Path, tmp_path: Path, adapters: Mapping[str, Path]
) -> None:
    ours = Authority(tmp_path, "ours")
    pair, person = ours.pair("server"), ours.pair("person", "ann@example.org")
    flags = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--tls-client-ca", str(ours.file))
    with running(ServerProcess(base, tmp_path / "store", SMALL, flags=flags)) as server:
        with server.client(credentials=tls_credentials(ours.file, person.cert, person.key)) as client:
            client.adapters.push(adapters["a"], "a")
        eventually(lambda: " quickchange.audit " in server.log)
        (line,) = [line for line in server.log.splitlines() if " quickchange.audit " in line]
    written: dict[str, Any] = json.loads(line[line.index("{") :])
    assert (written["who"], written["action"], written["adapter"]) == ("ann@example.org", "upload", "a@1")


def test_no_secret_is_in_a_log_however_much_it_says(
    base: Path, tmp_path: Path, adapters: Mapping[str, Path]
) -> None:
    tokens, audit = tmp_path / "tokens.json", tmp_path / "audit.jsonl"
    ours = Authority(tmp_path, "ours")
    pair = ours.pair("server")
    good = create(tokens, "all", "--scope", "infer", "--scope", "upload", "--scope", "admin")
    narrow = create(tokens, "narrow", "--scope", "upload")
    revoked = "qc_0123456789ab_" + "S" * 43
    process = ServerProcess(
        base, tmp_path / "store", SMALL, ("-c", textwrap.dedent(DEBUGGING)),
        (
            *("--tokens", str(tokens), "--audit-log", str(audit)),
            *("--tls-cert", str(pair.cert), "--tls-key", str(pair.key)),
        ),
    )  # fmt: skip
    credentials = tls_credentials(ours.file)
    with running(process) as server:
        answers = []
        for token in (good, narrow, revoked, "nonsense-" + "T" * 30):
            with server.client(token=token, credentials=credentials) as client:
                for attempt in (
                    lambda c: answers.append(c.generate(SECRET_PROMPT, max_new_tokens=24)),
                    lambda c: c.generate(SECRET_PROMPT, temperature=-1.0),
                    lambda c: c.adapters.push(adapters["a"], "a"),
                    lambda c: c.adapters.push(adapters["a"], "A bad name"),
                    lambda c: c.adapters.delete("a"),
                ):
                    try:
                        attempt(client)
                    except QuickchangeError:
                        continue
        pair.key.write_text("no key any more")
        with server.client(token=good, credentials=credentials) as client:
            assert client.server_info()
        tokens.write_text(tokens.read_text().replace('"format"', '"formal"'))
        with (
            server.client(token=revoked, credentials=credentials) as client,
            pytest.raises(UnauthenticatedError),
        ):
            client.server_info()
        eventually(lambda: server.log.count("call denied") >= 5)
        server.signal(signal.SIGTERM)
        server.wait()  # and with it all that it says
        said = server.log + audit.read_text()
    assert "DEBUG" in said
    assert len(answers) == 1
    for secret in (
        *(token.rpartition("_")[2] for token in (good, narrow, revoked)),
        "T" * 30, "eleven", answers[0].text.strip(), "no key any more", "PRIVATE KEY", "earer qc_",
    ):  # fmt: skip
        assert secret, "nothing to look for"
        assert secret not in said
    for token in json.loads(tokens.read_text())["tokens"]:
        assert token["sha256"] not in said
        assert token["salt"] not in said


def test_an_audit_log_that_cannot_be_written_is_named_at_the_start(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from server.app import serve
    from server.setting_sources import settings_from

    path = tmp_path / "nowhere" / "audit.jsonl"
    flags = {
        "base": str(base),
        "store": str(tmp_path / "store"),
        "port": 0,
        "metrics_port": 0,
        "audit_log": str(path),
    }
    assert serve(settings_from(flags, {})) == 1
    assert (
        f"error: --audit-log {path}: cannot be written: No such file or directory" in capsys.readouterr().err
    )
