"""`quickchange evaluate --engine reference`: transformers and PEFT answer, in this process. Knows no server.

Everybody is asked on one base, which is in memory once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange.commands.asked import BASE, Asked, loss_on
from quickchange.commands.options import progress_of
from quickchange.upload import require_adapter

if TYPE_CHECKING:
    from adapters.base import Base
    from training.cases import Case
    from training.evaluation import Answered


def ask_reference(args: argparse.Namespace, cases: "Sequence[Case]") -> Asked:
    """All answers and losses of the adapters named, which are folders.

    Raises:
        AdapterDirectoryError: there is no adapter in a folder.
        AdapterError, BaseModelError, TrainingError: what cannot be loaded, or a row that cannot be asked.
    """
    from adapters.base import load_base
    from training.evaluation_page import SHOWN_ROWS
    from training.reference_model import ReferenceModel

    ours, theirs = _folder(args.adapter), _folder(args.against)
    base = load_base(
        args.base,
        purpose="train",
        quantization=args.quantization,
        double_quantization=args.double_quantization,
        dtype="float32",
        progress=progress_of(args),
    )
    _check_applicable(base, [ours, theirs])
    base_answers = (
        ReferenceModel(base, None, _limit(args)).answers(cases[:SHOWN_ROWS], progress=progress_of(args))
        if theirs is not None
        else ()
    )
    return Asked(
        ours=_answered(base, ours, args, cases),
        theirs=None if args.against is None else _answered(base, theirs, args, cases),
        base_answers=base_answers,
        who={
            "engine": "reference",
            "base": base.name,
            "fingerprint": base.fingerprint,
            "quantization": base.quantization,
            "dtype": "float32",
            "decoding": "greedy",
            "max_new_tokens": _limit(args),
        },
        loss=loss_on(base.name, base.quantization),
    )


def _folder(given: str | None) -> Path | None:
    if given in (None, BASE):
        return None
    require_adapter(folder := Path(str(given)))
    return folder


def _check_applicable(base: "Base", folders: Sequence[Path | None]) -> None:
    """Finds out before anybody is asked that each can be put on the base."""
    from training.applied import applied

    for folder in folders:
        with applied(base, folder):
            pass


def _answered(
    base: "Base", folder: Path | None, args: argparse.Namespace, cases: "Sequence[Case]"
) -> "Answered":
    from training.evaluation import Answered
    from training.reference_loss import reference_losses
    from training.reference_model import ReferenceModel

    progress = progress_of(args)
    answers = ReferenceModel(base, folder, _limit(args)).answers(cases, progress=progress)
    losses = reference_losses(base, folder, cases, progress=progress)
    return Answered(BASE if folder is None else str(folder), answers, losses)


def _limit(args: argparse.Namespace) -> int:
    """A server's own default if there is none."""
    from server.request import SamplingParams

    return args.max_new_tokens or SamplingParams().max_new_tokens
