"""`quickchange tokens …`: who may call a server, in the file that the server is given. Knows no calls."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.failure import MISUSED, CommandError, needs_extra
from quickchange.commands.options import add_command, add_json_option, positive_int
from quickchange.commands.output import print_json, print_table, size

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers
    from server.tokens import Token

_SCOPES = ("infer", "upload", "admin")
_UNITS_S = {"m": 60, "h": 3600, "d": 86400}


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "tokens",
        "make, list and revoke the tokens that a server lets in",
        "  quickchange tokens create --file tokens.json --name ci --scope upload --expires 90d\n"
        "  quickchange tokens list --file tokens.json\n"
        "  quickchange tokens revoke --file tokens.json ci",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = add_command(
        actions,
        "create",
        "make a token; it is printed once, and the file keeps a hash of it",
        "  quickchange tokens create --file tokens.json --name app --scope infer --tenant acme\n"
        "  quickchange tokens create --file tokens.json --name ops --scope admin --scope infer > token",
    )
    _add_create_options(create)
    show = add_command(
        actions,
        "list",
        "show the tokens without what would let anybody in",
        "  quickchange tokens list --file tokens.json",
    )
    add_json_option(show)
    revoke = add_command(
        actions,
        "revoke",
        "remove a token; a running server refuses it from the next call on",
        "  quickchange tokens revoke --file tokens.json ci",
    )
    revoke.add_argument("name", metavar="NAME", help="what it was called when it was made")
    for each in (create, show, revoke):
        each.add_argument(
            "--file", required=True, type=Path, metavar="FILE", help="as `quickchange serve --tokens` has it"
        )


def _add_create_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", required=True, metavar="NAME", help="whose it is; logs say this, never the token"
    )
    parser.add_argument(
        "--scope",
        required=True,
        action="append",
        choices=_SCOPES,
        help="what it is for; may be repeated, and none includes another",
    )
    parser.add_argument(
        "--tenant",
        metavar="T",
        help="only adapters whose names begin with `T.`, and to look at and ask those without a dot "
        "(default: all adapters)",
    )
    parser.add_argument(
        "--expires",
        type=_expiry,
        metavar="WHEN",
        help="a span such as 12h or 90d, or a date (default: never)",
    )
    parser.add_argument("--requests-per-minute", type=positive_int, metavar="N", help="calls of any kind")
    parser.add_argument(
        "--tokens-per-minute", type=positive_int, metavar="N", help="tokens of prompts and answers together"
    )
    parser.add_argument(
        "--adapter-bytes",
        type=positive_int,
        metavar="N",
        help="bytes of all versions of the tenant's adapters",
    )


def run(args: argparse.Namespace) -> int:
    with needs_extra("server"):
        from server.token_file import TokenFileError
        from server.tokens import TokenError
    try:
        _ACTIONS[args.action](args)
    except TokenFileError as error:
        raise CommandError(str(error)) from error
    except TokenError as error:
        raise CommandError(str(error), MISUSED) from error
    return 0


def _create(args: argparse.Namespace) -> None:
    from server.token_file import changing
    from server.tokens import Limits, Scope, new_token

    limits = Limits(args.requests_per_minute, args.tokens_per_minute, args.adapter_bytes)
    scopes = frozenset(Scope(scope) for scope in args.scope)
    token, secret = new_token(args.name, scopes, args.tenant, args.expires, limits)
    with changing(args.file) as tokens:
        if token.name in tokens:
            raise CommandError(
                f"{args.file} has a token {token.name!r} already; revoke it first, or choose another name"
            )
        tokens[token.name] = token
    print(secret)
    print(f"{args.file} has a hash of it: keep the line above, it is not shown again", file=sys.stderr)


def _list(args: argparse.Namespace) -> None:
    from server.token_file import read_tokens

    tokens = sorted(read_tokens(args.file).values(), key=lambda token: token.name)
    if args.json:
        print_json([_facts(token) for token in tokens])
        return
    rows = [
        (
            token.name,
            token.id,
            ",".join(sorted(token.scopes)),
            token.tenant or "-",
            _until(token),
            _limits(token),
        )
        for token in tokens
    ]
    print_table(("NAME", "ID", "SCOPES", "TENANT", "EXPIRES", "LIMITS"), rows)


def _revoke(args: argparse.Namespace) -> None:
    from server.token_file import changing

    with changing(args.file) as tokens:
        if args.name not in tokens:
            there = ", ".join(sorted(tokens)) or "none"
            raise CommandError(f"{args.file} has no token {args.name!r}; there are: {there}")
        del tokens[args.name]
    print(f"{args.name} is revoked")


def _facts(token: "Token") -> dict[str, object]:
    from dataclasses import asdict

    from server.token_file import shown_time

    return {
        "name": token.name,
        "id": token.id,
        "scopes": sorted(token.scopes),
        "tenant": token.tenant,
        "created": shown_time(token.created_s),
        "expires": None if token.expires_s is None else shown_time(token.expires_s),
        "expired": token.is_expired(),
        "limits": asdict(token.limits),
    }


def _until(token: "Token") -> str:
    from server.token_file import shown_time

    if token.expires_s is None:
        return "never"
    return f"expired {shown_time(token.expires_s)}" if token.is_expired() else shown_time(token.expires_s)


def _limits(token: "Token") -> str:
    limits = token.limits
    said = [
        f"{limits.requests_per_minute} requests/min" if limits.requests_per_minute else "",
        f"{limits.tokens_per_minute} tokens/min" if limits.tokens_per_minute else "",
        f"{size(limits.adapter_bytes)} of adapters" if limits.adapter_bytes else "",
    ]
    return ", ".join(filter(None, said)) or "-"


def _expiry(text: str) -> float:
    """Seconds since 1970; a date without a time zone is this machine's."""
    if text[-1:] in _UNITS_S and text[:-1].isdecimal() and int(text[:-1]):
        return time.time() + int(text[:-1]) * _UNITS_S[text[-1]]
    try:
        when = datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a span such as 12h or 90d nor a date"
        ) from None
    if when <= time.time():
        raise argparse.ArgumentTypeError(f"{text} is over already")
    return when


_ACTIONS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "create": _create,
    "list": _list,
    "revoke": _revoke,
}
