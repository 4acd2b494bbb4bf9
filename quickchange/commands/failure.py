"""How a command fails: one line for the user. Knows no command."""

from collections.abc import Iterator
from contextlib import contextmanager

FAILED = 1
MISUSED = 2
DIVERGED = 3  # a training run's loss is no number any more: a lower learning rate may do
STOPPED = 130  # as shells report what Ctrl-C ended

_OURS = frozenset({"quickchange", "server", "adapters", "training", "kernels"})


class CommandError(Exception):
    """The command cannot go on; the message is what the user reads, with the remedy."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around the imports of a command that needs more than the client does.

    Raises:
        CommandError: a package of that extra is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _OURS:
            raise  # a broken installation of ours, not a missing extra
        raise CommandError(
            f"this command needs the package {missing}: pip install 'quickchange[{extra}]'"
        ) from error
