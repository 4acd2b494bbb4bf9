"""The cells of a run: which scenarios at which loads. Knows no contender."""

from dataclasses import replace

from tests.bench.cells import Cell
from tests.bench.options import Options

SWEEP = (2, 4, 8)
FEWEST_REQUESTS = 4
PREFIX_ADAPTERS = 8
PREFIX_SHARE = 0.75
"""Of a prompt: 96 tokens of 128."""


def throughput_cells(options: Options) -> list[Cell]:
    """Closed-loop cells, in the order of the report."""
    chosen, cells = set(options.scenarios), []
    for name, adapters in (("base", 0), ("one", 1), ("distinct", options.adapters)):
        if name in chosen:
            cells += [closed_cell(options, adapters, clients) for clients in options.concurrency]
    if "sweep" in chosen:
        counts = [count for count in SWEEP if count < options.adapters]
        cells += [replace(closed_cell(options, count, options.at), peers=False) for count in counts]
    if "zipf" in chosen:
        cells.append(zipf_cell(options))
    if "prefix" in chosen:
        cells += prefix_cells(options)
    return cells


def closed_cell(options: Options, adapters: int, concurrency: int) -> Cell:
    return Cell(
        adapters=adapters,
        concurrency=concurrency,
        requests=max(FEWEST_REQUESTS, concurrency * options.rounds),
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
    )


def zipf_cell(options: Options) -> Cell:
    cell = closed_cell(options, options.many, options.at)
    return replace(cell, kind="zipf", exponent=options.exponent, peers=False)


def prefix_cells(options: Options) -> list[Cell]:
    """The same adapters and counts, with prompts of their own and with a prefix for each adapter."""
    adapters = min(PREFIX_ADAPTERS, options.adapters)
    own = replace(
        closed_cell(options, adapters, adapters), requests=4 * adapters, kind="own prompts", peers=False
    )
    prefix_tokens = int(options.prompt_tokens * PREFIX_SHARE)
    return [own, replace(own, kind="shared prefix", prefix_tokens=prefix_tokens)]


def resident_cells(options: Options) -> list[Cell]:
    """The base alone, for one client and for several."""
    return [closed_cell(options, 0, clients) for clients in sorted({1, options.at})]


def merged_cells(options: Options) -> list[Cell]:
    """No adapter is asked for, at every number of clients: weights that are read once serve all of them."""
    return [closed_cell(options, 0, clients) for clients in options.concurrency]


def open_cells(options: Options, tokens_per_second: float) -> list[Cell]:
    """Different adapters in turn, at parts of a rate that is known to be reached."""
    cell = replace(closed_cell(options, options.adapters, options.at), requests=options.open_requests)
    most = tokens_per_second / options.new_tokens
    return [cell.at_rate(most * factor, options.seed) for factor in options.load_factors]
