"""`quickchange store …`: a store's folder as a file or at a URL and back, and its damaged files."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.failure import CommandError, needs_extra
from quickchange.commands.options import add_command, add_json_option, add_progress_option, progress_of
from quickchange.commands.output import print_json, size
from quickchange.progress import reporting

if TYPE_CHECKING:
    from adapters.adoption import Adopted
    from adapters.store import AdapterStore
    from quickchange.commands.options import Subparsers


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "store",
        "take a store of adapters to a file or a URL and back, or show what is damaged",
        "  quickchange store export --store ./store --out adapters.tar\n"
        "  quickchange store import --store ./other adapters.tar\n"
        "  quickchange store push --store ./store s3://bucket/adapters\n"
        "  quickchange store quarantine --store ./store",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    export = add_command(
        actions,
        "export",
        "write a store's READY versions, names and aliases to one file; servers may go on using it",
        "  quickchange store export --store ./store --out adapters.tar --name sql",
    )
    export.add_argument("--out", required=True, type=Path, metavar="FILE", help="the archive; must not exist")
    load = add_command(
        actions,
        "import",
        "publish all that an archive holds, or nothing; servers may go on using the store",
        "  quickchange store import --store ./store adapters.tar --renumber",
    )
    load.add_argument("archive", type=Path, metavar="FILE", help="from `quickchange store export`")
    push, pull = _add_push(actions), _add_pull(actions)
    quarantine = add_command(
        actions,
        "quarantine",
        "show the damaged files of a store that were moved out of the way, and why",
        "  quickchange store quarantine --store ./store",
    )
    for each in (load, pull):
        each.add_argument(
            "--renumber",
            action="store_true",
            help="give a version the next number where its own is taken or was used (default: refuse)",
        )
    for each in (export, load, pull):
        each.add_argument(
            "--name", action="append", default=[], metavar="N", help="only this adapter; may be repeated"
        )
    for each in (export, load, push, pull):
        add_progress_option(each)
    for each in (export, load, push, pull, quarantine):
        each.add_argument("--store", required=True, type=Path, metavar="DIR", help="the folder of the store")
        add_json_option(each)


def _add_push(actions: "Subparsers") -> argparse.ArgumentParser:
    push = add_command(
        actions,
        "push",
        "publish a store at a URL, for servers that are given that URL; servers may go on using the store",
        "  quickchange store push --store ./store s3://bucket/adapters\n"
        "  quickchange store push --store ./store file:///mnt/shared/adapters",
    )
    push.add_argument("url", metavar="URL", help="s3://, gs://, az:// … or file://")
    push.add_argument(
        "--verify",
        action="store_true",
        help="read all that is there already, and upload it again if it is damaged",
    )
    push.add_argument(
        "--overwrite", action="store_true", help="replace a catalogue that was not published from this store"
    )
    return push


def _add_pull(actions: "Subparsers") -> argparse.ArgumentParser:
    pull = add_command(
        actions,
        "pull",
        "publish here all that a URL has, or nothing; servers may go on using the store",
        "  quickchange store pull --store ./store s3://bucket/adapters --name sql",
    )
    pull.add_argument("url", metavar="URL", help="from `quickchange store push`; https:// too")
    return pull


def run(args: argparse.Namespace) -> int:
    with needs_extra("server"):
        from adapters.errors import AdapterError
        from adapters.store import AdapterStore
    if args.action not in ("import", "pull") and not (args.store / "catalogue.sqlite3").is_file():
        raise CommandError(f"{args.store} is no store of adapters; give the folder that a server was given")
    try:
        with AdapterStore(args.store) as store:
            _ACTIONS[args.action](store, args)
    except AdapterError as error:
        raise CommandError(str(error)) from error
    return 0


def _export(store: "AdapterStore", args: argparse.Namespace) -> None:
    from adapters.export_archive import export_store

    with reporting(progress_of(args), "export") as report:
        done = export_store(store, args.out, names=args.name, report=report)
    if args.json:
        print_json(done)
        return
    print(f"{args.out}: {done.versions} versions, {done.contents} contents, {size(done.size_bytes)}")
    for reference in done.left_out:
        print(f"left out: {reference} is FAILED")


def _import(store: "AdapterStore", args: argparse.Namespace) -> None:
    with needs_extra("server"):
        from adapters.import_archive import import_store
    with reporting(progress_of(args), "import") as report:
        adopted = import_store(store, args.archive, names=args.name, renumber=args.renumber, report=report)
    _tell_adopted(adopted, args, "imported")


def _push(store: "AdapterStore", args: argparse.Namespace) -> None:
    with needs_extra("server"):
        from adapters.remote import RemotePlace
        from adapters.remote_push import push_store
    with reporting(progress_of(args), "push") as report:
        done = push_store(
            store,
            RemotePlace(args.url),
            overwrite=args.overwrite,
            verify=args.verify,
            report=report,
        )
    if args.json:
        print_json(done)
        return
    state = "published" if done.created else "was there already"
    print(
        f"{args.url}: snapshot {done.generation} {state}: {done.versions} versions, "
        f"{done.contents} contents, {size(done.uploaded_bytes)} uploaded"
    )
    for reference in done.left_out:
        print(f"left out: {reference} is FAILED")


def _pull(store: "AdapterStore", args: argparse.Namespace) -> None:
    with needs_extra("server"):
        from adapters.remote import RemotePlace
        from adapters.remote_pull import pull_store
    with reporting(progress_of(args), "pull") as report:
        adopted = pull_store(
            store, RemotePlace(args.url), names=args.name, renumber=args.renumber, report=report
        )
    _tell_adopted(adopted, args, "pulled")


def _tell_adopted(adopted: "Sequence[Adopted]", args: argparse.Namespace, verb: str) -> None:
    if args.json:
        print_json(adopted)
        return
    for each in adopted:
        if each.created:
            renamed = "" if each.version == each.listed.version else f" (was {each.listed.reference})"
            print(f"{each.listed.name}@{each.version} {each.listed.digest}{renamed}")
        for alias in each.aliases_left:
            print(f"{each.listed.name}:{alias} stays where it points here")
    created = sum(each.created for each in adopted)
    print(f"{created} versions {verb}, {len(adopted) - created} were there already")


def _quarantine(store: "AdapterStore", args: argparse.Namespace) -> None:
    entries = store.quarantined()
    if args.json:
        print_json(entries)
        return
    for entry in entries:
        since = datetime.fromtimestamp(entry.since_s).astimezone().isoformat(sep=" ", timespec="seconds")
        print(f"{entry.place} ({size(entry.size_bytes)}, since {since}): {entry.reason}")
    print(
        f"{len(entries)} damaged content{'s' if len(entries) != 1 else ''}, "
        f"{size(sum(entry.size_bytes for entry in entries))}; `quickchange adapters gc` removes old ones"
    )


_ACTIONS: Mapping[str, Callable[["AdapterStore", argparse.Namespace], None]] = {
    "export": _export,
    "import": _import,
    "push": _push,
    "pull": _pull,
    "quarantine": _quarantine,
}
