"""What several commands have in common on the command line. Knows no command."""

import argparse
import sys
from typing import TYPE_CHECKING

from quickchange.client import Client
from quickchange.connection import DEFAULT_TARGET

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


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
    group = parser.add_argument_group("server", "the token comes from QUICKCHANGE_TOKEN, if there is one")
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


def open_client(args: argparse.Namespace) -> Client:
    return Client(args.server, timeout_s=args.timeout, retry_window_s=args.wait)


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
