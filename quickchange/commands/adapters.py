"""`quickchange adapters …`: the adapters of a server. Knows no gRPC."""

import argparse
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from quickchange.commands import downloading, following, uploading
from quickchange.commands.options import (
    add_command,
    add_json_option,
    add_server_options,
    label,
    open_client,
)
from quickchange.commands.output import print_facts, print_json, print_table, short, size
from quickchange.types import Adapter, AdapterState, Residency

if TYPE_CHECKING:
    from quickchange.client import Client
    from quickchange.commands.options import Subparsers

_REFERENCE = "name (its newest version), name@version, name:alias or sha256:…"


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "adapters",
        "upload, list, name, load and remove a server's adapters",
        "  quickchange adapters push ./sql-lora --name sql --alias prod\n  quickchange adapters list",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    uploading.add_push(actions)
    uploading.add_check(actions)
    _add_list(actions)
    _add_show(actions)
    _add_alias(actions)
    _add_on_reference(actions, "pin", "keep an adapter in memory")
    _add_on_reference(actions, "unpin", "let an adapter be evicted again")
    _add_move(actions, "load", "bring an adapter to memory now", (Residency.DEVICE, Residency.HOST))
    _add_move(actions, "unload", "let an adapter leave memory", (Residency.DISK, Residency.HOST))
    _add_remove(actions)
    downloading.add_pull(actions, _REFERENCE)
    following.add_watch(actions)
    following.add_gc(actions)
    uploading.add_cancel_upload(actions)


def run(args: argparse.Namespace) -> int:
    with open_client(args) as client:
        _ACTIONS[args.action](client, args)
    return 0


# What may be typed


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


# What is done


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


_ACTIONS: Mapping[str, Callable[["Client", argparse.Namespace], None]] = {
    "push": uploading.push,
    "check": uploading.check,
    "list": _list,
    "show": _show,
    "alias": _alias,
    "pin": _pin,
    "unpin": _unpin,
    "load": _load,
    "unload": _unload,
    "rm": _remove,
    "pull": downloading.pull,
    "watch": following.watch,
    "gc": following.collect,
    "cancel-upload": uploading.cancel_upload,
}
