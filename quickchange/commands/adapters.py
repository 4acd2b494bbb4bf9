"""`quickchange adapters …`: the adapters of a server. Knows no gRPC."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands import following
from quickchange.commands.options import (
    add_command,
    add_json_option,
    add_progress_option,
    add_retries_option,
    add_server_options,
    label,
    open_client,
    progress_of,
)
from quickchange.commands.output import print_facts, print_json, print_table, short, size
from quickchange.commands.report import print_report, summary
from quickchange.errors import QuickchangeError
from quickchange.types import Adapter, AdapterState, Residency, UploadResult
from quickchange.upload import new_upload_id

if TYPE_CHECKING:
    from quickchange.client import Client
    from quickchange.commands.options import Subparsers

_NAME_OF_A_CHECK = "check"  # an upload needs a name, even one that is never given to anything
_REFERENCE = "name (its newest version), name@version, name:alias or sha256:…"


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "adapters",
        "upload, list, name, load and remove a server's adapters",
        "  quickchange adapters push ./sql-lora --name sql --alias prod\n  quickchange adapters list",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_push(actions)
    _add_check(actions)
    _add_list(actions)
    _add_show(actions)
    _add_alias(actions)
    _add_on_reference(actions, "pin", "keep an adapter in memory")
    _add_on_reference(actions, "unpin", "let an adapter be evicted again")
    _add_move(actions, "load", "bring an adapter to memory now", (Residency.DEVICE, Residency.HOST))
    _add_move(actions, "unload", "let an adapter leave memory", (Residency.DISK, Residency.HOST))
    _add_remove(actions)
    _add_pull(actions)
    following.add_watch(actions)
    following.add_gc(actions)
    _add_cancel_upload(actions)


def run(args: argparse.Namespace) -> int:
    with open_client(args) as client:
        _ACTIONS[args.action](client, args)
    return 0


# What may be typed


def _add_push(actions: "Subparsers") -> None:
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


def _add_check(actions: "Subparsers") -> None:
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


def _add_list(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "list",
        "list adapters, one version to a line",
        "  quickchange adapters list\n  quickchange adapters list --name sql --state ready --json",
    )
    states = [state.value for state in AdapterState if state is not AdapterState.UNKNOWN]
    parser.add_argument("--name", help="only of this name")
    parser.add_argument("--state", choices=states, help="only in this state")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        type=label,
        metavar="K=V",
        help="only with this; may be repeated",
    )
    add_json_option(parser)
    add_server_options(parser)


def _add_show(actions: "Subparsers") -> None:
    parser = add_command(
        actions, "show", "show all about one version", "  quickchange adapters show sql:prod"
    )
    parser.add_argument("reference", metavar="REF", help=_REFERENCE)
    add_json_option(parser)
    add_server_options(parser)


def _add_alias(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "alias",
        "point an alias at a version, or remove it",
        "  quickchange adapters alias sql prod 3\n  quickchange adapters alias sql canary --remove",
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("alias", metavar="ALIAS")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("version", metavar="VERSION", type=int, nargs="?")
    which.add_argument("--remove", action="store_true", help="take the alias away from whichever has it")
    add_server_options(parser)


def _add_on_reference(actions: "Subparsers", name: str, summary: str) -> argparse.ArgumentParser:
    parser = add_command(actions, name, summary, f"  quickchange adapters {name} sql@3")
    parser.add_argument("reference", metavar="REF", help=_REFERENCE)
    add_server_options(parser)
    return parser


def _add_move(actions: "Subparsers", name: str, summary: str, tiers: tuple[Residency, ...]) -> None:
    parser = _add_on_reference(actions, name, summary)
    parser.add_argument(
        "--tier",
        choices=[tier.value for tier in tiers],
        default=tiers[0].value,
        help=f"where to (default: {tiers[0]})",
    )


def _add_remove(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "rm",
        "delete a version, or all of a name; running requests finish",
        "  quickchange adapters rm sql@2\n  quickchange adapters rm sql --all-versions",
    )
    parser.add_argument("reference", metavar="REF", help="name@version; with --all-versions the name")
    parser.add_argument("--all-versions", action="store_true", help="every version of the name")
    add_server_options(parser)


def _add_pull(actions: "Subparsers") -> None:
    parser = add_command(
        actions, "pull", "download an adapter", "  quickchange adapters pull sql:prod ./sql-lora"
    )
    parser.add_argument("reference", metavar="REF", help=_REFERENCE)
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder that is new or empty")
    add_progress_option(parser)
    add_server_options(parser)


def _add_cancel_upload(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "cancel-upload",
        "remove what the server keeps of an upload that broke",
        "  quickchange adapters cancel-upload 9f86d081884c7d659a2feaa0c55ad015",
    )
    parser.add_argument("upload_id", metavar="ID", help="as the message about the upload names it")
    add_server_options(parser)


# What is done


def _push(client: "Client", args: argparse.Namespace) -> None:
    with _refusals_shown(args), _resumable(args.resume or new_upload_id()) as upload_id:
        result = client.adapters.push(
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


def _check(client: "Client", args: argparse.Namespace) -> None:
    with _refusals_shown(args):
        result = client.adapters.push(
            args.directory,
            _NAME_OF_A_CHECK,
            validate_only=True,
            progress=progress_of(args),
            retries=args.retries,
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


def _list(client: "Client", args: argparse.Namespace) -> None:
    found = list(client.adapters.list(name=args.name, state=args.state, labels=dict(args.label)))
    if args.json:
        print_json(found)
        return
    header = ("ADAPTER", "ALIASES", "STATE", "WHERE", "PINNED", "METHOD", "RANK", "SIZE", "DIGEST")
    print_table(header, [_row(adapter) for adapter in found])


def _row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.reference,
        ",".join(adapter.aliases) or "-",
        adapter.state,
        adapter.residency,
        "yes" if adapter.pinned else "-",
        adapter.method,
        str(adapter.rank),
        size(adapter.size_bytes),
        short(adapter.digest),
    )


def _show(client: "Client", args: argparse.Namespace) -> None:
    adapter = client.adapters.get(args.reference)
    if args.json:
        print_json(adapter)
    else:
        print_facts(_facts(adapter))


def _facts(adapter: Adapter) -> dict[str, str]:
    return {
        "adapter": adapter.reference,
        "digest": adapter.digest,
        "aliases": ", ".join(adapter.aliases),
        "state": adapter.state,
        "error": adapter.error,
        "where": adapter.residency + (", pinned" if adapter.pinned else ""),
        "method": f"{adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}",
        "modules": ", ".join(adapter.target_modules),
        "size": size(adapter.size_bytes),
        "base": adapter.base_fingerprint,
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items())),
        "description": adapter.description,
        "created": _moment(adapter.create_time),
        "updated": _moment(adapter.update_time),
    }


def _moment(time: datetime | None) -> str:
    return time.astimezone().isoformat(sep=" ", timespec="seconds") if time is not None else ""


def _alias(client: "Client", args: argparse.Namespace) -> None:
    if args.remove:
        client.adapters.remove_alias(args.name, args.alias)
        print(f"{args.name}:{args.alias} removed")
    else:
        adapter = client.adapters.alias(args.name, args.alias, args.version)
        print(f"{args.name}:{args.alias} is {adapter.reference}")


def _pin(client: "Client", args: argparse.Namespace) -> None:
    print(f"{client.adapters.pin(args.reference).reference} pinned")


def _unpin(client: "Client", args: argparse.Namespace) -> None:
    print(f"{client.adapters.unpin(args.reference).reference} unpinned")


def _load(client: "Client", args: argparse.Namespace) -> None:
    adapter = client.adapters.load(args.reference, args.tier)
    print(f"{adapter.reference} {adapter.residency}")


def _unload(client: "Client", args: argparse.Namespace) -> None:
    adapter = client.adapters.unload(args.reference, args.tier)
    print(f"{adapter.reference} {adapter.residency}")


def _remove(client: "Client", args: argparse.Namespace) -> None:
    count = client.adapters.delete(args.reference, all_versions=args.all_versions)
    print(f"{count} version{'s' if count != 1 else ''} deleted")


def _pull(client: "Client", args: argparse.Namespace) -> None:
    result = client.adapters.pull(args.reference, args.directory, progress=progress_of(args))
    print(f"{result.adapter.reference} {result.directory} ({size(result.size_bytes)})")


def _cancel_upload(client: "Client", args: argparse.Namespace) -> None:
    client.adapters.cancel_upload(args.upload_id)
    print(f"upload {args.upload_id} cancelled")


_ACTIONS: Mapping[str, Callable[["Client", argparse.Namespace], None]] = {
    "push": _push,
    "check": _check,
    "list": _list,
    "show": _show,
    "alias": _alias,
    "pin": _pin,
    "unpin": _unpin,
    "load": _load,
    "unload": _unload,
    "rm": _remove,
    "pull": _pull,
    "watch": following.watch,
    "gc": following.collect,
    "cancel-upload": _cancel_upload,
}
