"""`quickchange adapters watch` and `gc`: what happens to adapters, and which need not stay. Knows no gRPC."""

import argparse
from typing import TYPE_CHECKING

from quickchange.commands.interruptible import interruptible
from quickchange.commands.options import add_command, add_json_option, add_server_options
from quickchange.commands.output import print_json, print_json_line, print_table, size
from quickchange.types import AdapterEvent

if TYPE_CHECKING:
    from quickchange.client import Client
    from quickchange.commands.options import Subparsers


def add_watch(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "watch",
        "show changes of adapters as they happen, one to a line",
        "  quickchange adapters watch\n  quickchange adapters watch --initial --json",
    )
    parser.add_argument("--initial", action="store_true", help="begin with every adapter that is there")
    add_json_option(parser)
    add_server_options(parser)


def add_gc(actions: "Subparsers") -> None:
    parser = add_command(
        actions,
        "gc",
        'delete old versions; what has an alias, a pin or the label "keep" stays',
        "  quickchange adapters gc --dry-run\n  quickchange adapters gc --keep 3 --min-age 86400",
    )
    parser.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="newest ready versions of each name that stay (default: the server's setting)",
    )
    parser.add_argument(
        "--min-age",
        type=float,
        metavar="S",
        help="whatever is younger than so many seconds stays (default: the server's setting)",
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, show what would go and why")
    add_json_option(parser)
    add_server_options(parser)


def watch(client: "Client", args: argparse.Namespace) -> None:
    with client.adapters.watch(send_initial=args.initial) as events:
        for event in interruptible(events):
            if args.json:
                print_json_line(event)
            else:
                print(_happened(event), flush=True)


def _happened(event: AdapterEvent) -> str:
    adapter = event.adapter
    if event.deleted:
        return f"{adapter.reference} deleted"
    facts = [adapter.reference, adapter.state, adapter.residency]
    facts += ["pinned"] if adapter.pinned else []
    facts += [f":{alias}" for alias in adapter.aliases]
    facts += [f"{key}={value}" for key, value in sorted(adapter.labels.items())]
    facts += [f"({adapter.error})"] if adapter.error else []
    return " ".join(facts)


def collect(client: "Client", args: argparse.Namespace) -> None:
    collection = client.adapters.collect_garbage(
        keep_versions=args.keep, min_age_s=args.min_age, dry_run=args.dry_run
    )
    if args.json:
        print_json(collection)
        return
    if collection.versions:
        rows = [(each.reference, size(each.freed_bytes), each.reason) for each in collection.versions]
        print_table(("ADAPTER", "FREES", "WHY"), rows)
    for entry in collection.quarantined:
        print(f"{entry.place}: {entry.reason}")
    would = "would be " if args.dry_run else ""
    count = len(collection.versions)
    print(
        f"{count} version{'s' if count != 1 else ''} {would}deleted, "
        f"{size(collection.freed_bytes)} {would}freed"
    )
