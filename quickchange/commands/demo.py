"""`quickchange demo`: the whole story on this machine. Imports torch only to run."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from quickchange.commands.failure import CommandError, needs_extra
from quickchange.commands.options import add_command

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange demo
  quickchange demo --keep
  quickchange demo --fast --out /tmp/demo"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers, "demo", "train adapters, serve them on one base, and swap one live", _EXAMPLES
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="where everything goes; a later run goes on from it (default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the server up at the end")
    parser.add_argument(
        "--fast", action="store_true", help="train on a quarter of the rows: quicker, and visibly worse"
    )


def run(args: argparse.Namespace) -> int:
    with needs_extra("demo"):
        from adapters.errors import AdapterError, BaseModelError
        from quickchange.demo.errors import DemoError
        from quickchange.demo.story import tell
        from training.errors import TrainingError
    signal.signal(signal.SIGTERM, _exit)  # as Ctrl-C does: the server that the demo started goes too
    try:
        tell(args.out, keep=args.keep, fast=args.fast)
    except (DemoError, TrainingError, AdapterError, BaseModelError) as error:
        raise CommandError(str(error)) from error
    return 0


def _exit(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
