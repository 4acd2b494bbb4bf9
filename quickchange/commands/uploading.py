"""`quickchange adapters push`, `check` and `cancel-upload`: what goes to a server. Knows no gRPC."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.interruptible import interruptible_result
from quickchange.commands.options import (
    add_command,
    add_json_option,
    add_progress_option,
    add_retries_option,
    add_server_options,
    label,
    progress_of,
)
from quickchange.commands.output import print_json
from quickchange.commands.report import print_report, summary
from quickchange.errors import QuickchangeError
from quickchange.types import UploadResult
from quickchange.upload import new_upload_id

if TYPE_CHECKING:
    from quickchange.client import Client
    from quickchange.commands.options import Subparsers

_NAME_OF_A_CHECK = "check"  # an upload needs a name, even one that is never given to anything


def add_push(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "push",
        "upload the adapter in a folder",
        "  quickchange adapters push ./out --name sql\n"
        "  quickchange adapters push ./out --name sql --label team=data --alias canary\n"
        "  quickchange adapters push ./out --name sql --validate-only",
    )
    _add_adapter_folder(parser)
    parser.add_argument("--name", required=True, help="what requests will call it")
    parser.add_argument(
        "--version", type=int, metavar="N", help="publish as exactly this version (default: the next)"
    )
    parser.add_argument(
        "--alias", action="append", default=[], metavar="A", help="point this at it; may be repeated"
    )
    parser.add_argument(
        "--label", action="append", default=[], type=label, metavar="K=V", help="attach this; may be repeated"
    )
    parser.add_argument("--description", default="", metavar="TEXT", help="a line for people")
    parser.add_argument("--validate-only", action="store_true", help="run every check, publish nothing")
    parser.add_argument(
        "--resume", metavar="ID", help="go on with an upload that broke; the message about it names its ID"
    )
    add_progress_option(parser)
    add_retries_option(parser)
    add_json_option(parser)
    add_server_options(parser)


def add_check(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "check",
        "show whether the server would take the adapter in a folder, check by check; nothing is published",
        "  quickchange adapters check ./out",
    )
    _add_adapter_folder(parser)
    add_progress_option(parser)
    add_retries_option(parser)
    add_json_option(parser)
    add_server_options(parser)


def _add_adapter_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        help="holds adapter_config.json and adapter_model.safetensors, as PEFT saves them",
    )


def add_cancel_upload(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "cancel-upload",
        "remove what the server keeps of an upload that broke",
        "  quickchange adapters cancel-upload 9f86d081884c7d659a2feaa0c55ad015",
    )
    parser.add_argument("upload_id", metavar="ID", help="as the message about the upload names it")
    add_server_options(parser)


def push(client: "Client", args: argparse.Namespace) -> None:
    with _refusals_shown(args), _resumable(args.resume or new_upload_id()) as upload_id:
        result = interruptible_result(
            lambda: client.adapters.push(
                args.directory,
                args.name,
                version=args.version,
                labels=dict(args.label),
                description=args.description,
                validate_only=args.validate_only,
                progress=progress_of(args),
                retries=args.retries,
                upload_id=upload_id,
            )
        )
    if not args.validate_only:
        for alias in args.alias:
            client.adapters.alias(args.name, alias, result.adapter.version)
    if args.json:
        print_json(result)
    else:
        _print_pushed(result, validate_only=args.validate_only)


@contextmanager
def _resumable(upload_id: str) -> Iterator[str]:
    """Says how to go on, if the block ends before the upload does but not for good."""
    try:
        yield upload_id
    except (KeyboardInterrupt, QuickchangeError) as error:
        if isinstance(error, KeyboardInterrupt) or error.upload_id:
            print(
                "what was sent stays at the server for a while; to go on, repeat the command with "
                f"--resume {upload_id}",
                file=sys.stderr,
            )
        raise


def _print_pushed(result: UploadResult, *, validate_only: bool) -> None:
    if validate_only:
        _print_valid(result)
        return
    print(f"{result.adapter.reference} {result.adapter.digest}")
    print(summary(result.report), file=sys.stderr)
    if not result.created:
        print("this content was there already; nothing new was published", file=sys.stderr)


def check(client: "Client", args: argparse.Namespace) -> None:
    with _refusals_shown(args):
        result = interruptible_result(
            lambda: client.adapters.push(
                args.directory,
                _NAME_OF_A_CHECK,
                validate_only=True,
                progress=progress_of(args),
                retries=args.retries,
            )
        )
    if args.json:
        print_json(result)
    else:
        _print_valid(result)


def _print_valid(result: UploadResult) -> None:
    print_report(result.report)
    print(f"valid: {summary(result.report)}")


@contextmanager
def _refusals_shown(args: argparse.Namespace) -> Iterator[None]:
    """All that is wrong with an adapter goes before the one line that every failure ends with."""
    try:
        yield
    except QuickchangeError as error:
        if error.report is not None:
            if args.json:
                print_json(error.report)
            else:
                print_report(error.report, sys.stderr)
        raise


def cancel_upload(client: "Client", args: argparse.Namespace) -> None:
    client.adapters.cancel_upload(args.upload_id)
    print(f"upload {args.upload_id} cancelled")
