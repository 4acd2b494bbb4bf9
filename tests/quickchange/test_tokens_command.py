"""`quickchange tokens`: what it prints, once, and how it fails."""

import json
import re
from pathlib import Path

import pytest

from quickchange.cli import main
from server.token_file import read_tokens


def run(*argv: str) -> int:
    return main(["tokens", *argv])


def test_the_secret_is_printed_once_and_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ("--file", str(tmp_path / "tokens.json"))
    assert (
        run("create", *file, "--name", "ci", "--scope", "upload", "--scope", "admin", "--expires", "90d") == 0
    )
    said = capsys.readouterr()
    assert re.fullmatch(r"qc_[0-9a-f]{12}_[A-Za-z0-9_-]{43}\n", said.out)
    secret = said.out.strip().split("_", 2)[2]
    assert secret not in said.err
    assert run("list", *file) == 0
    assert run("list", *file, "--json") == 0
    assert run("create", *file, "--name", "ci", "--scope", "infer") == 1
    said = capsys.readouterr()
    assert secret not in said.out + said.err
    assert "has a token 'ci' already; revoke it first" in said.err
    assert run("revoke", *file, "ci") == 0
    assert run("revoke", *file, "ci") == 1
    assert "has no token 'ci'; there are: none" in capsys.readouterr().err


def test_a_list_says_what_each_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokens.json"
    assert (
        run(
            *("create", "--file", str(path), "--name", "app", "--scope", "infer", "--tenant", "acme"),
            *("--requests-per-minute", "60", "--tokens-per-minute", "9000", "--adapter-bytes", "1048576"),
        )
        == 0
    )
    capsys.readouterr()
    assert run("list", "--file", str(path)) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "ID", "SCOPES", "TENANT", "EXPIRES", "LIMITS"]
    assert row.split("  ")[0] == "app"
    assert row.endswith("infer   acme    never    60 requests/min, 9000 tokens/min, 1.0 MiB of adapters")
    assert run("list", "--file", str(path), "--json") == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert set(facts) == {"name", "id", "scopes", "tenant", "created", "expires", "expired", "limits"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--name", "a b", "--scope", "infer"), "name is 'a b'"),
        (("--name", "a", "--scope", "infer", "--tenant", "A.B"), "tenant is 'A.B'"),
        (("--name", "a", "--scope", "infer", "--adapter-bytes", "5"), "adapter_bytes needs a tenant"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "tokens.json"
    assert run("create", "--file", str(path), *flags) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("when", ["0d", "5", "yesterday", "2020-01-01", "d"])
def test_an_expiry_is_a_span_or_a_date_to_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    with pytest.raises(SystemExit):
        run("create", "--file", str(tmp_path / "t"), "--name", "a", "--scope", "infer", "--expires", when)
    assert "--expires" in capsys.readouterr().err


def test_a_date_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    assert (
        run(
            "create", "--file", str(path), "--name", "a", "--scope", "infer", "--expires", "2999-01-01T00:00Z"
        )
        == 0
    )
    assert read_tokens(path)["a"].expires_s == 32472144000


def test_a_file_that_is_no_list_of_tokens_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}')
    assert run("create", "--file", str(path), "--name", "a", "--scope", "infer") == 1
    assert "is no file of tokens" in capsys.readouterr().err
    assert path.read_text() == '{"mine": 1}'
