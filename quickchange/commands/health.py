"""`quickchange health`: whether a server takes requests, for probes of containers. Knows no gRPC."""

import argparse
from typing import TYPE_CHECKING

from quickchange.commands.failure import CommandError
from quickchange.commands.options import add_command, add_server_options, open_client

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange health
  quickchange health --server 10.0.0.5:50051 --timeout 5"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers, "health", "tell by the exit status whether a server takes requests", _EXAMPLES
    )
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    with open_client(args) as client:
        serving = client.is_serving()
        target = client.target
    if not serving:
        raise CommandError(f"the server at {target} answers, and takes no requests: it starts or drains")
    print("serving")
    return 0
