"""How much memory the serving process takes, and for what, with few and with many registered adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quickchange import Client
from tests.bench.adapters import write_small_adapter
from tests.bench.ours import OurServer
from tests.bench.subject import Subject

FEW = 10
ASK_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one server process.

    Attributes:
        resident: of the process, all in all; mapped: files among them, libraries above all.
        base: weights of the base.
        kv_reserved: keys and values; pages that were never written take no memory yet.
        adapters: on the device.
        registered, loaded: how many adapters there are, and how many of them are on the device.
    """

    when: str
    registered: int
    loaded: int
    resident: int
    mapped: int
    base: int
    kv_reserved: int
    adapters: int

    @property
    def rest(self) -> int:
        """Python, torch, buffers and the pages of keys and values that were written."""
        return self.resident - self.mapped - self.base - self.adapters


def footprint(server: OurServer, subject: Subject, when: str) -> Footprint:
    resident, mapped = server.process.memory()
    series, capacity = server.series(), server.info().capacity
    with Client(server.address) as client:
        registered = sum(1 for _ in client.adapters.list())
    return Footprint(
        when=when,
        registered=registered,
        loaded=int(series.get("quickchange_adapters_resident", 0)),
        resident=resident,
        mapped=mapped,
        base=int(series["quickchange_base_model_bytes"]),
        kv_reserved=capacity.kv_tokens_total * subject.kv_bytes_per_token,
        adapters=capacity.adapter_device_bytes_used,
    )


def measure_registering(
    server: OurServer, subject: Subject, scratch: Path, *, count: int, tell: Callable[[str], None]
) -> list[Footprint]:
    """Few small adapters, then many, then every one of them asked once."""
    footprints = [footprint(server, subject, "started")]
    _register(server, subject, scratch, range(FEW))
    _ask(server, range(FEW))
    footprints.append(footprint(server, subject, f"{FEW} registered and asked"))
    tell(f"registering {count} adapters")
    _register(server, subject, scratch, range(FEW, count))
    footprints.append(footprint(server, subject, f"{count} registered"))
    _ask(server, range(count))
    return [*footprints, footprint(server, subject, f"{count} registered and asked")]


def _register(server: OurServer, subject: Subject, scratch: Path, seeds: range) -> None:
    with Client(server.address) as client:
        for seed in seeds:
            folder = write_small_adapter(scratch / "small" / _name(seed), subject.layout, seed=seed)
            client.adapters.push(folder, _name(seed))


def _ask(server: OurServer, seeds: range) -> None:
    with Client(server.address) as client:
        for seed in seeds:
            client.generate([70 + seed % 100] * ASK_TOKENS, adapter=_name(seed), max_new_tokens=1)


def _name(seed: int) -> str:
    return f"small-{seed:04d}"
