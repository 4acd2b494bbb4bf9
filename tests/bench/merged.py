"""One adapter in three places: beside the base, in its weights in 4 bits, in its weights not quantised."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.answers import Ask, Load
from tests.bench.cells import Cell
from tests.bench.contender import Contender
from tests.bench.ours import OurServer, our_server
from tests.bench.processes import Process
from tests.bench.subject import Pool, Subject

BARE = "bare base"
LIVE = "live adapter"


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """A server that is asked for an adapter, in cells that ask for none."""

    server: OurServer
    adapter: str
    name: str = LIVE

    @property
    def process(self) -> Process:
        return self.server.process

    def takes(self, cell: Cell) -> bool:
        return self.server.takes(cell)

    def measure(self, cell: Cell, asks: Sequence[Ask]) -> Load:
        return self.server.measure(cell, [replace(ask, adapter=self.adapter) for ask in asks])


@contextmanager
def adapter_in_three_places(
    subject: Subject, pool: Pool, scratch: Path, cache: Path, tell: Callable[[str], None]
) -> Iterator[list[Contender]]:
    """The bare base, and its adapter in three places; the first two are one process.

    Args:
        pool: of one adapter.
        cache: where merged bases are kept.
    """
    ((adapter, folder),) = pool.folders.items()
    with ExitStack() as stack:
        bare = stack.enter_context(our_server(subject, scratch, pool=pool, name=BARE))
        contenders: list[Contender] = [bare, LiveAdapter(bare, adapter)]
        for into in ("requantized", "dequantized"):
            tell(f"merging into {into} weights")
            flags = ("--merged", str(folder.resolve()), "--merged-into", into, "--cache-dir", str(cache))
            server = our_server(subject, scratch, *flags, name=f"merged, {into}")
            contenders.append(stack.enter_context(server))
        yield contenders
