"""What loading an adapter costs from disk and from the host, and what each eviction policy makes of that.

`python -m tests.bench.tiers` loads adapters of several ranks with the server's own loader, on layers of the
shapes of SmolLM2-135M, then plays traces of requests through a tier and the real policies with those costs.
Prints tables, writes JSON. Nothing is served: the costs are measured, the traces are made up.
"""

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from adapters.copies import FactorCopies
from adapters.eviction import CostAware, EvictionPolicy, LeastRecentlyUsed, Popularity
from adapters.factors import bytes_of
from adapters.layout import BaseLayout, ModuleShape
from adapters.loader import AdapterLoader
from adapters.store import AdapterStore
from adapters.tier import Tier
from adapters.validate import validate_adapter
from tests.bench.adapters import write_random_adapter
from tests.bench.arrivals import in_turn, zipf_choices
from tests.bench.machine import machine

RANKS = (4, 8, 16, 32, 64)
LAYERS = 30
Sizes = Literal["mixed", "equal"]
SHAPES = {
    "self_attn.q_proj": ModuleShape(576, 576),
    "self_attn.k_proj": ModuleShape(576, 192),
    "self_attn.v_proj": ModuleShape(576, 192),
    "self_attn.o_proj": ModuleShape(576, 576),
    "mlp.gate_proj": ModuleShape(576, 1536),
    "mlp.up_proj": ModuleShape(576, 1536),
    "mlp.down_proj": ModuleShape(1536, 576),
}


# What a load costs


@dataclass(frozen=True)
class LoadCost:
    """Median milliseconds to the device: from disk, with the file in the page cache or not; from the host."""

    rank: int
    size_bytes: int
    disk_ms: float
    cold_disk_ms: float
    host_ms: float


def measure_loads(device: torch.device, repeats: int) -> list[LoadCost]:
    """With the loader of the server, in bfloat16."""
    modules = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    layout = BaseLayout(modules, None, "sha256:" + "0" * 64)
    with (
        tempfile.TemporaryDirectory(prefix="quickchange-bench.") as folder,
        AdapterStore(Path(folder) / "store") as store,
        closing(AdapterLoader(store, layout, FactorCopies(device), torch.bfloat16)) as loader,
    ):
        return [_cost_of(rank, Path(folder), store, layout, loader, repeats) for rank in RANKS]


def _cost_of(
    rank: int, folder: Path, store: AdapterStore, layout: BaseLayout, loader: AdapterLoader, repeats: int
) -> LoadCost:
    written = write_random_adapter(folder / str(rank), layout, rank=rank, seed=rank)
    facts = validate_adapter(written, layout, max_rank=max(RANKS))
    staged = store.new_staging()
    for file in written.iterdir():
        (staged / file.name).write_bytes(file.read_bytes())
    store.publish(f"rank-{rank}", staged, facts)
    on_host = loader.read(facts.digest, "host")
    on_host.result()

    def median_ms(load: Callable[[], object], prepare: Callable[[], None] = lambda: None) -> float:
        times = []
        for _ in range(repeats):
            prepare()
            began_s = time.perf_counter()
            load()
            times.append((time.perf_counter() - began_s) * 1e3)
        return statistics.median(times)

    return LoadCost(
        rank,
        bytes_of(facts, layout, torch.bfloat16),
        median_ms(lambda: loader.read(facts.digest, "device").result()),
        median_ms(lambda: loader.read(facts.digest, "device").result(), lambda: _drop(store, facts.digest)),
        median_ms(lambda: loader.promote(facts.digest, on_host).result()),
    )


def _drop(store: AdapterStore, digest: str) -> None:
    """Takes an adapter's files out of the page cache."""
    for file in store.path_of(digest).iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# What a policy makes of it


class Forgetting(Popularity):
    """Popularity that ends with a stay."""

    def __init__(self) -> None:
        self._uses: Counter[str] = Counter()

    def count(self, key: str) -> float:
        return self._uses[key]

    def use(self, key: str) -> None:
        self._uses[key] += 1

    def forget(self, key: str) -> None:
        del self._uses[key]


class CostAwareAsPublished(CostAware):
    """GreedyDual-Size-Frequency word for word: whoever leaves begins anew."""

    def __init__(self) -> None:
        self._uses = Forgetting()
        super().__init__(self._uses)

    def leave(self, key: str, *, evicted: bool) -> None:
        super().leave(key, evicted=evicted)
        self._uses.forget(key)


POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "cost": lambda: CostAware(Popularity()),
    "as published": CostAwareAsPublished,
}


@dataclass(frozen=True)
class Played:
    """One trace through one policy.

    Attributes:
        room: part of all adapters' bytes that fits.
        noise: of the costs that the policy sees, as a standard deviation of their logarithm.
        hits: part of the requests whose adapter was there.
    """

    sizes: Sizes
    room: float
    trace: str
    policy: str
    noise: float
    hits: float
    loaded_bytes: float
    loading_s: float


def play(
    policy: EvictionPolicy,
    trace: Sequence[str],
    sizes: Mapping[str, int],
    seconds: Mapping[str, float],
    budget_bytes: int,
    noise: float,
) -> tuple[float, float, float]:
    """Part of hits, bytes loaded, seconds spent loading; no two requests at once."""
    tier: Tier[None] = Tier(budget_bytes, policy, frozenset())
    generator, hits, loaded_bytes, loading_s = random.Random(0), 0, 0, 0.0
    for key in trace:
        if key in tier:
            hits += 1
        else:
            for victim in tier.victims_for(sizes[key]) or ():
                tier.take(victim, evicted=True)
            tier.reserve(key, sizes[key])
            tier.settle(key, None, seconds[key] * math.exp(generator.gauss(0, noise)))
            loaded_bytes += sizes[key]
            loading_s += seconds[key]
        tier.use(key)
    return hits / len(trace), loaded_bytes, loading_s


def traces(names: Sequence[str], count: int) -> dict[str, list[str]]:
    """Stationary, changing, without any pattern, and as unkind to caches as can be."""
    shuffled = random.Random(1)

    def reordered() -> list[str]:
        return shuffled.sample(names, len(names))

    made = {f"Zipf {each:g}": zipf_choices(reordered(), count, each, seed=2) for each in (0.7, 1.0, 1.3)}
    shift = 10 * len(names)
    made["Zipf 1, others every 2000"] = [
        name
        for start in range(0, count, shift)
        for name in zipf_choices(reordered(), min(shift, count - start), 1.0, seed=start)
    ]
    made["all alike"] = shuffled.choices(names, k=count)
    made["in turn"] = in_turn(names, count)
    return made


def simulate(costs: Sequence[LoadCost], adapters: int, requests: int) -> list[Played]:
    names = [f"a{index}" for index in range(adapters)]
    choose = random.Random(0)
    played = []
    by_name: dict[Sizes, dict[str, LoadCost]] = {
        "mixed": {name: choose.choice(costs) for name in names},
        "equal": dict.fromkeys(names, costs[len(costs) // 2]),
    }
    for kind, cost_of in by_name.items():
        sizes = {name: cost.size_bytes for name, cost in cost_of.items()}
        seconds = {name: cost.disk_ms / 1e3 for name, cost in cost_of.items()}
        for room in (0.1, 0.3):
            budget_bytes = int(sum(sizes.values()) * room)
            for label, trace in traces(names, requests).items():
                for policy, noise in (*((name, 0.0) for name in POLICIES), ("cost", 0.7)):
                    result = play(POLICIES[policy](), trace, sizes, seconds, budget_bytes, noise)
                    played.append(Played(kind, room, label, policy, noise, *result))
    return played


# Report


def cost_table(costs: Sequence[LoadCost]) -> str:
    head = f"{'rank':>6}{'MB':>8}{'disk ms':>9}{'not cached':>12}{'host ms':>9}"
    rows = [
        f"{c.rank:>6}{c.size_bytes / 1e6:>8.1f}{c.disk_ms:>9.1f}{c.cold_disk_ms:>12.1f}{c.host_ms:>9.2f}"
        for c in costs
    ]
    return "\n".join([head, *rows])


def played_table(played: Sequence[Played]) -> str:
    """A line to a trace: hits and seconds of each policy."""
    lines: dict[tuple[str, float, str], list[str]] = {}
    for each in played:
        cell = f"{each.hits:>6.1%}{each.loaded_bytes / 1e9:>7.1f}{each.loading_s:>7.1f}"
        lines.setdefault((each.sizes, each.room, each.trace), []).append(cell)
    policies = list(dict.fromkeys(each.policy + " ~" * (each.noise > 0) for each in played))
    head = f"{'ranks':<7}{'room':>5}  {'trace':<28}" + "".join(f"{name:>20} │" for name in policies)
    under = f"{'':<42}" + f"{'hits':>6}{'GB':>7}{'s':>7} │" * len(policies)
    rows = [
        f"{sizes:<7}{room:>5.0%}  {trace:<28}" + "".join(f"{cell} │" for cell in cells)
        for (sizes, room, trace), cells in lines.items()
    ]
    return "\n".join([head, under, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tiers", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="loads of each kind (default: 9)")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    costs = measure_loads(torch.device(options.device), options.repeats)
    print(cost_table(costs), end="\n\n")
    played = simulate(costs, options.adapters, options.requests)
    print(played_table(played))
    options.out.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "loads": [asdict(cost) for cost in costs],
        "played": [asdict(each) for each in played],
    }
    (options.out / "tiers.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
