"""`quickchange chat`: a conversation that keeps its history and may change its adapter. Knows no gRPC."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quickchange.commands.generate import add_sampling_options, sampling_options
from quickchange.commands.interruptible import interruptible
from quickchange.commands.options import add_command, add_server_options, open_client
from quickchange.errors import QuickchangeError
from quickchange.types import Delta, Finished, FinishReason

if TYPE_CHECKING:
    from quickchange.client import Client, GenerationStream
    from quickchange.commands.options import Subparsers
    from quickchange.requests import ChatMessage, GenerateOptions

_EXAMPLES = """\
  quickchange chat --adapter support:prod --temperature 0.7
  quickchange chat --system "Answer in one sentence."

while chatting:
  /adapter REF   the next answers come from this adapter; without REF from the base
  /reset         forgets the conversation
  /exit          ends it, as the end of the input does
  Ctrl-C         stops an answer"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(subparsers, "chat", "talk with the model", _EXAMPLES)
    parser.add_argument("--system", metavar="TEXT", help="the system's message at the beginning")
    add_sampling_options(parser)
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    interactive = sys.stdin.isatty()
    with open_client(args) as client:
        chat = Chat(client, sampling_options(args), args.system)
        for line in _lines(interactive):
            try:
                if not chat.take(line):
                    break
            except QuickchangeError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)
    return 0


class Chat:
    """A conversation: its messages and who answers."""

    def __init__(self, client: "Client", options: "GenerateOptions", system: str | None) -> None:
        self._client = client
        self._options = options
        self._opening: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def take(self, line: str) -> bool:
        """Acts on one line of input; False ends the conversation."""
        command, _, argument = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._messages = list(self._opening)
            case "/adapter":
                self._change_adapter(argument.strip())
            case _ if command.startswith("/"):
                print(f"no command {command}; there are /adapter REF, /reset, /exit", file=sys.stderr)
            case _:
                self._ask(line.strip())
        return True

    def _change_adapter(self, reference: str) -> None:
        name = self._client.adapters.get(reference).reference if reference else "the base"
        self._options["adapter"] = reference
        print(f"{name} answers from here on", file=sys.stderr)

    def _ask(self, text: str) -> None:
        asked: ChatMessage = {"role": "user", "content": text}
        with self._client.stream([*self._messages, asked], **self._options) as stream:
            answer = _printed(stream)
        self._messages += [asked, {"role": "assistant", "content": answer}]


def _printed(stream: "GenerationStream") -> str:
    """Prints an answer as it comes; Ctrl-C keeps what there is."""
    pieces: list[str] = []
    try:
        for event in interruptible(stream):
            if isinstance(event, Delta):
                pieces.append(event.text)
                print(event.text, end="", flush=True)
            elif isinstance(event, Finished) and event.finish_reason is FinishReason.LENGTH:
                print(" […]", end="")
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    return "".join(pieces)


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from sys.stdin
        return
    import readline  # noqa: F401 - gives `input` a history and keys to edit with

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
