"""`quickchange generate`: one prompt, one answer. Knows neither models nor gRPC."""

import argparse
import sys
from typing import TYPE_CHECKING, cast

from quickchange.commands.failure import MISUSED, CommandError
from quickchange.commands.interruptible import interruptible
from quickchange.commands.options import (
    add_command,
    add_json_option,
    add_retries_option,
    add_server_options,
    open_client,
)
from quickchange.commands.output import plain, print_json, print_json_line
from quickchange.requests import ChatMessage, GenerateOptions, Prompt

if TYPE_CHECKING:
    from quickchange.client import Client
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange generate "The capital of France is"
  quickchange generate --adapter sql@3 --stream "List all users"
  quickchange generate --n 4 --temperature 0.8 --seed 1 "Once upon a time"
  quickchange generate --adapter sql:prod --chat --system "Answer in SQL." "List all users"
  cat prompt.txt | quickchange generate --max-new-tokens 64 --json -"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "generate", "ask the model once", _EXAMPLES)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads standard input")
    add_sampling_options(parser)
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="report each token's log-probability and N alternatives (with --json)",
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt before the answer")
    parser.add_argument(
        "--n", type=int, default=1, metavar="N", help="so many answers; give a --temperature (1)"
    )
    parser.add_argument("--chat", action="store_true", help="PROMPT is a user's message in a chat")
    parser.add_argument("--system", metavar="TEXT", help="the system's message before it (with --chat)")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is produced")
    add_retries_option(parser)
    add_json_option(parser)
    add_server_options(parser)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What `chat` takes too."""
    parser.add_argument(
        "--adapter",
        metavar="REF",
        help="who answers: name, name@version, name:alias or sha256:… (default: the base)",
    )
    parser.add_argument(
        "--adapter-scale", type=float, metavar="X", help="multiplies what the adapter changes (1)"
    )
    parser.add_argument("--priority", type=int, metavar="P", help="-10 to 10, larger goes first (0)")
    parser.add_argument(
        "--cache-salt", metavar="TEXT", help="share cached prompts only with requests of the same salt"
    )
    group = parser.add_argument_group("sampling", "what is left out is the server's default")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (256)")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="0 always takes the likeliest token (0)"
    )
    group.add_argument("--top-p", type=float, metavar="P", help="likeliest tokens that add up to P (1)")
    group.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens (all)")
    group.add_argument("--min-p", type=float, metavar="P", help="tokens at least P times the likeliest (0)")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 against repetition (1)")
    group.add_argument("--seed", type=int, metavar="N", help="makes a random answer repeatable")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    with open_client(args) as client:
        if args.stream:
            _print_stream(client, prompt, args)
        else:
            _print_answer(client, prompt, args)
    return 0


def sampling_options(args: argparse.Namespace) -> GenerateOptions:
    """What was typed of the options that a request has."""
    names = GenerateOptions.__annotations__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return cast(GenerateOptions, given)


def _prompt(args: argparse.Namespace) -> Prompt:
    if args.system is not None and not args.chat:
        raise CommandError("--system goes with --chat; add it", MISUSED)
    text = _standard_input() if args.prompt == "-" else str(args.prompt)
    if not args.chat:
        return text
    messages: list[ChatMessage] = [{"role": "user", "content": text}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return messages


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise CommandError(f"standard input is no text: {error}") from error


def _print_answer(client: "Client", prompt: Prompt, args: argparse.Namespace) -> None:
    if args.n == 1:
        answer = client.generate(prompt, retries=args.retries, **sampling_options(args))
        print_json(answer) if args.json else print(answer.text)
        return
    answers = client.generate_many(prompt, args.n, retries=args.retries, **sampling_options(args))
    if args.json:
        print_json(answers)
        return
    for answer in answers:
        print(f"[{answer.index}] {answer.text}")


def _print_stream(client: "Client", prompt: Prompt, args: argparse.Namespace) -> None:
    if args.n != 1 and not args.json:
        raise CommandError("--stream prints one answer; leave --n out, or add --json", MISUSED)
    with client.stream(prompt, n=args.n, retries=args.retries, **sampling_options(args)) as stream:
        if args.json:
            for event in interruptible(stream):
                print_json_line({"event": type(event).__name__.lower()} | plain(event))
            return
        for piece in interruptible(stream.text()):
            print(piece, end="", flush=True)
        print()
