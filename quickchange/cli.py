"""The command line: what may be typed, who does it, and how failing looks. The commands are in commands/."""

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from quickchange import __version__
from quickchange.commands import (
    adapters,
    certify,
    chat,
    combine,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    generate,
    health,
    info,
    merge,
    plan,
    serve,
    store,
    study,
    tokens,
    train,
)
from quickchange.commands.failure import FAILED, CommandError
from quickchange.errors import QuickchangeError
from quickchange.threads import spin_briefly

INTERRUPTED = 130
PIPE_CLOSED = 141

COMMANDS: Mapping[str, ModuleType] = {
    "serve": serve,
    "generate": generate,
    "chat": chat,
    "adapters": adapters,
    "store": store,
    "tokens": tokens,
    "info": info,
    "health": health,
    "doctor": doctor,
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "study": study,
    "plan": plan,
    "merge": merge,
    "certify": certify,
    "extract": extract,
    "combine": combine,
    "export": export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is 0 only if it succeeded."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own notes would mix with ours on standard error
    spin_briefly(os.environ)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    args = _parser().parse_args(argv)
    try:
        exit_code: int = COMMANDS[args.command].run(args)
        sys.stdout.flush()  # a closed pipe shows here, not after the end
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return PIPE_CLOSED
    except CommandError as error:
        return _failed(error, error.exit_code)
    except (QuickchangeError, OSError) as error:
        return _failed(error, FAILED)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quickchange",
        description="One 4-bit base model resident, a LoRA adapter per request.",
        epilog="`quickchange COMMAND --help` shows each command's options and examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"quickchange {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    return parser


def _failed(error: Exception, exit_code: int) -> int:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return exit_code


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _forget_stdout() -> None:
    """Whoever read the output is gone; what is still buffered must not complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
