"""`quickchange adapters pull`: what comes from a server. Knows no gRPC."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.interruptible import interruptible_result
from quickchange.commands.options import add_command, add_progress_option, add_server_options, progress_of
from quickchange.commands.output import size
from quickchange.errors import AdapterDirectoryError, QuickchangeError
from quickchange.partial import partial_of

if TYPE_CHECKING:
    from quickchange.client import Client
    from quickchange.commands.options import Subparsers


def add_pull(actions: "Subparsers", reference_help: str) -> None:
    parser = add_command(
        actions,
        "pull",
        "download an adapter; a download that broke goes on when the command is repeated",
        "  quickchange adapters pull sql:prod ./sql-lora",
    )
    parser.add_argument("reference", metavar="REF", help=reference_help)
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder that is new or empty")
    add_progress_option(parser)
    add_server_options(parser)


def pull(client: "Client", args: argparse.Namespace) -> None:
    with _resumable(args.directory):
        result = interruptible_result(
            lambda: client.adapters.pull(args.reference, args.directory, progress=progress_of(args))
        )
    earlier = f", {size(result.resumed_bytes)} of it from an earlier pull" if result.resumed_bytes else ""
    print(f"{result.adapter.reference} {result.directory} ({size(result.size_bytes)}{earlier})")


@contextmanager
def _resumable(directory: Path) -> Iterator[None]:
    """Says how to go on, if the block ends before the download does and something has arrived."""
    try:
        yield
    except AdapterDirectoryError:
        raise
    except (KeyboardInterrupt, QuickchangeError):
        partial = partial_of(directory)
        if partial.exists():
            print(
                f"what has arrived is in {partial}; repeat the command to go on, or remove that folder",
                file=sys.stderr,
            )
        raise
