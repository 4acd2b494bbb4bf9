"""How far a transfer is: told to a function or as a bar. Knows nothing of what is transferred."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
"""Called with the bytes so far and the bytes in all."""

Progress = bool | Report
"""False: silent. True: a bar on standard error. A function: called as a Report."""


@contextmanager
def reporting(progress: Progress, what: str) -> Iterator[Report]:
    """The function to call after each piece."""
    if progress is True:
        with _bar(what) as report:
            yield report
    elif progress is False:
        yield lambda sent_bytes, total_bytes: None
    else:
        yield progress


@contextmanager
def _bar(what: str) -> Iterator[Report]:
    from tqdm import tqdm  # only whoever wants a bar pays for its import

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def report(sent_bytes: int, total_bytes: int) -> None:
            if bar.total is None:
                bar.initial = bar.n = sent_bytes  # what an earlier process sent says nothing about the speed
            bar.total = total_bytes
            bar.update(sent_bytes - bar.n)  # goes back when an upload goes on from what the server has

        yield report
