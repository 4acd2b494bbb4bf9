"""Tokens for servers of the tests, made as anybody makes them. No test lives here."""

import contextlib
import io
from pathlib import Path

from quickchange.cli import main


def create(file: Path, name: str, *flags: str) -> str:
    """The new token."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        assert main(["tokens", "create", "--file", str(file), "--name", name, *flags]) == 0
    return out.getvalue().strip()
