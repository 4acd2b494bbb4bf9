"""What several commands have in common on the command line. Knows no command."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from quickchange.client import Client
from quickchange.commands.failure import MISUSED, CommandError
from quickchange.connection import DEFAULT_TARGET
from quickchange.errors import AdapterDirectoryError
from quickchange.tls import (
    AUTHORITY_VARIABLE,
    CERTIFICATE_VARIABLE,
    KEY_VARIABLE,
    USE_VARIABLE,
    credentials_from,
)
from quickchange.upload import require_adapter

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_command(subparsers: "Subparsers", name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends with examples."""
    return subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server",
        metavar="HOST:PORT",
        help=f"where the server is (default: QUICKCHANGE_SERVER, else {DEFAULT_TARGET})",
    )
    group.add_argument(
        "--timeout",
        type=positive_seconds,
        default=600.0,
        metavar="S",
        help="seconds that the whole call may take (default: %(default)g)",
    )
    group.add_argument(
        "--wait",
        type=positive_seconds,
        default=2.0,
        metavar="S",
        help="seconds to wait for a server that does not answer (default: %(default)g)",
    )
    _add_access_options(parser)


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    token = group.add_mutually_exclusive_group()
    token.add_argument(
        "--token",
        metavar="TOKEN",
        help="what lets this client in (default: QUICKCHANGE_TOKEN); others on this machine see it here: "
        "rather use --token-file",
    )
    token.add_argument("--token-file", type=Path, metavar="FILE", help="a file with nothing but the token")
    group.add_argument(
        "--tls",
        action="store_true",
        help="encrypt the connection; any of the following does too (default: QUICKCHANGE_TLS)",
    )
    group.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="PEM file of who signed the server's certificate (default: QUICKCHANGE_SERVER_CA, else "
        "those that come with gRPC)",
    )
    group.add_argument(
        "--tls-cert",
        type=Path,
        metavar="FILE",
        help="PEM file with a certificate of this client's own (default: QUICKCHANGE_CLIENT_CERT)",
    )
    group.add_argument(
        "--tls-key", type=Path, metavar="FILE", help="PEM file with its key (default: QUICKCHANGE_CLIENT_KEY)"
    )
    group.add_argument(
        "--tls-name",
        metavar="NAME",
        help="that the server's certificate is for, where it is not HOST (default: QUICKCHANGE_SERVER_NAME)",
    )


def open_client(args: argparse.Namespace) -> Client:
    """
    Raises:
        CommandError: the file with the token is no good.
        InvalidArgumentError: a file for TLS is no good.
    """
    return Client(
        args.server,
        token=_token_of(args),
        credentials=_credentials_of(args),
        server_name=args.tls_name,
        timeout_s=args.timeout,
        retry_window_s=args.wait,
    )


def _token_of(args: argparse.Namespace) -> str | None:
    given: str | None = args.token
    if args.token_file is None:
        return given
    try:
        token: str = args.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--token-file {args.token_file}: cannot be read: {error}", MISUSED) from None
    if not token.isascii() or len(token.split()) != 1:
        raise CommandError(f"--token-file {args.token_file}: must hold one token and nothing else", MISUSED)
    return token


def _credentials_of(args: argparse.Namespace) -> grpc.ChannelCredentials | None:
    """What flags ask for, each that is missing taken from the environment; None leaves all to that."""
    files = {
        AUTHORITY_VARIABLE: args.tls_ca,
        CERTIFICATE_VARIABLE: args.tls_cert,
        KEY_VARIABLE: args.tls_key,
    }
    given = {variable: str(path) for variable, path in files.items() if path is not None}
    if not (given or args.tls or args.tls_name):
        return None
    return credentials_from({**os.environ, **given, USE_VARIABLE: "on"})


def add_progress_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress", action="store_true", help="show a progress bar even if standard error is no terminal"
    )


def progress_of(args: argparse.Namespace) -> bool:
    """Whether there is somebody to see a progress bar."""
    return bool(args.progress) or sys.stderr.isatty()


def add_retries_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        metavar="N",
        help="how often to come back when the server is full (default: %(default)s)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def size_bytes(text: str) -> int:
    """An argument such as 2GB, 512MiB or a number of bytes."""
    match = re.fullmatch(r"(\d+) ?([A-Za-z]*)", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MiB")
    return int(match[1]) * unit


def adapter_folder(text: str) -> Path:
    """An argument that names a folder with an adapter."""
    try:
        require_adapter(Path(text))
    except AdapterDirectoryError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    return Path(text)


def label(text: str) -> tuple[str, str]:
    """An argument of the form KEY=VALUE."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def positive_int(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def positive_seconds(text: str) -> float:
    """An argument that is a time span."""
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return seconds
