"""`quickchange evaluate --engine server`: a server answers, one that runs or one of its own."""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quickchange.client import Client
from quickchange.commands.asked import BASE, Asked, loss_on
from quickchange.commands.failure import CommandError
from quickchange.commands.options import progress_of
from quickchange.local_server import LocalServer
from quickchange.tls import PlainText

if TYPE_CHECKING:
    from training.cases import Case
    from training.evaluation import Answered
    from training.metrics import RowLoss

_CANDIDATE: Final = "candidate"
_RIVAL: Final = "rival"


@dataclass(frozen=True, slots=True)
class _Contest:
    """Who is asked.

    Attributes:
        ours, theirs: references on the server, empty for its base; None if there is nobody to compare with.
    """

    client: Client
    ours: str
    theirs: str | None


def ask_server(args: argparse.Namespace, cases: "list[Case]") -> Asked:
    """All answers of a server; losses too if --base says on what to compute them.

    Raises:
        CommandError: an adapter is of a kind that no server applies, or --base is not the server's.
        EvaluationError, LocalServerError, QuickchangeError: the server does not start, or refuses.
    """
    from training.evaluation import Answered

    with tempfile.TemporaryDirectory(prefix="quickchange-evaluate-") as scratch:
        with _contest(args, Path(scratch)) as contest:
            ours = _answered(contest, contest.ours, args, cases)
            theirs = None if contest.theirs is None else _answered(contest, contest.theirs, args, cases)
            base_answers = _base_answers(contest, args, cases)
            who = _who(args, contest)
            folders = _folders(args, contest, Path(scratch))
        losses, loss = _losses(args, cases, folders, who["fingerprint"])
    ours = Answered(ours.name, ours.answers, losses.get(contest.ours))
    if theirs is not None:
        theirs = Answered(theirs.name, theirs.answers, losses.get(contest.theirs or ""))
    return Asked(ours, theirs, base_answers, who, loss)


@contextmanager
def _contest(args: argparse.Namespace, scratch: Path) -> Iterator[_Contest]:
    """The adapters on a server: those named, or those pushed to one that runs for the time."""
    if args.server is not None:
        with Client(args.server) as client:
            if args.base is not None:
                _check_base(args, client)
            ours = _reference(client, args.adapter)
            theirs = None if args.against is None else _reference(client, args.against)
            yield _Contest(client, ours, theirs)
        return
    for folder in (args.adapter, args.against):
        if folder not in (None, BASE):
            _check_served(Path(folder))
    flags = ("--quantization", args.quantization)
    with (
        LocalServer(args.base, scratch / "store", scratch / "server.log", flags) as server,
        Client(server.grpc, credentials=PlainText()) as client,
    ):
        ours = _pushed(client, args.adapter, _CANDIDATE)
        theirs = None if args.against is None else _pushed(client, args.against, _RIVAL)
        yield _Contest(client, ours, theirs)


def _reference(client: Client, adapter: str | None) -> str:
    """A fixed version, whatever an alias or a name does meanwhile."""
    return "" if adapter in (None, BASE) else client.adapters.get(str(adapter)).reference


def _pushed(client: Client, folder: str | None, name: str) -> str:
    return "" if folder in (None, BASE) else client.adapters.push(str(folder), name).adapter.reference


def _answered(contest: _Contest, adapter: str, args: argparse.Namespace, cases: "list[Case]") -> "Answered":
    from training.evaluation import Answered
    from training.live import LiveModel

    model = LiveModel(contest.client, adapter, args.max_new_tokens)
    return Answered(_shown(adapter, args), model.answers(cases, progress=progress_of(args)))


def _shown(reference: str, args: argparse.Namespace) -> str:
    """What people call it: a folder here has a made-up name on the server."""
    if not reference:
        return BASE
    if args.server is not None:
        return reference
    return str(args.adapter if reference.startswith(_CANDIDATE) else args.against)


def _base_answers(contest: _Contest, args: argparse.Namespace, cases: "list[Case]") -> Any:
    """For the rows that are shown, where nobody compared is the base."""
    from training.evaluation_page import SHOWN_ROWS

    if not contest.theirs:
        return ()
    return _answered(contest, "", args, cases[:SHOWN_ROWS]).answers


def _who(args: argparse.Namespace, contest: _Contest) -> dict[str, Any]:
    info = contest.client.server_info()
    return {
        "engine": "server",
        "base": info.base_model,
        "fingerprint": info.base_fingerprint,
        "quantization": info.quantization,
        "dtype": info.dtype,
        "decoding": "greedy",
        "max_new_tokens": args.max_new_tokens or "default",
    }


def _folders(args: argparse.Namespace, contest: _Contest, scratch: Path) -> dict[str, Path | None]:
    """Where each one's adapter lies, for the loss; None for the base."""
    folders: dict[str, Path | None] = {}
    if args.base is None:
        return folders
    for place, (reference, given) in enumerate(
        ((contest.ours, args.adapter), (contest.theirs, args.against))
    ):
        if reference is None:
            continue
        if not reference or args.server is None:
            folders[reference] = Path(given) if reference else None
        else:
            folders[reference] = contest.client.adapters.pull(reference, scratch / f"{place}").directory
    return folders


def _losses(
    args: argparse.Namespace,
    cases: "list[Case]",
    folders: Mapping[str, Path | None],
    served: str,
) -> "tuple[dict[str, list[RowLoss]], str]":
    """In float32 on the training base, after the answers: both would need the memory. And where from."""
    if not folders:
        return {}, "not measured: the wire has no log-probabilities of given tokens; --base computes it here"
    from adapters.base import load_base
    from training.reference_loss import reference_losses

    progress = progress_of(args)
    base = load_base(
        args.base, purpose="train", quantization=args.quantization, dtype="float32", progress=progress
    )
    _check_same(args, base.fingerprint, served)
    losses = {
        reference: reference_losses(base, folder, cases, progress=progress)
        for reference, folder in folders.items()
    }
    return losses, loss_on(base.name, base.quantization)


def _check_base(args: argparse.Namespace, client: Client) -> None:
    """Finds out before anybody is asked whether --base is the server's; its weights are read, not loaded."""
    from adapters.cache import default_cache_dir
    from adapters.fingerprint import fingerprint_of
    from adapters.quantize import Scheme
    from adapters.sources import resolve_source

    cache = default_cache_dir()
    source = resolve_source(args.base, cache, progress=progress_of(args))
    found = fingerprint_of(source.folder, Scheme(args.quantization).name, cache)
    _check_same(args, found, client.server_info().base_fingerprint)


def _check_same(args: argparse.Namespace, found: str, served: str) -> None:
    if found != served:
        raise CommandError(
            f"--base {args.base} is {found} as {args.quantization}, the server has {served}; give "
            "its base and --quantization, or leave --base out"
        )


def _check_served(folder: Path) -> None:
    """Finds out before a server is started whether it would apply the folder."""
    from adapters.files import CONFIG_FILE
    from adapters.unserved_folder import unserved_kind

    if not (folder / CONFIG_FILE).is_file():
        return  # the client says what is missing
    kind = unserved_kind(folder)
    if kind is not None:
        raise CommandError(
            f"{folder} is an adapter of kind {kind}, which no server applies; measure it with "
            "--engine reference"
        )
