"""Adapters are swapped under load for minutes: memory stays flat, and no token is wrong.

SOAK_MINUTES says for how long.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.swapping import Expected, Streams, Swapper
from tests.e2e.test_hot_swap import (  # noqa: F401  # fixtures that are asked for by name
    LARGEST_BYTES,
    expected,
    folders,
    layout,
    model,
)

MINUTES = float(os.environ.get("SOAK_MINUTES", "3"))
ROUND_SWAPS = 20
GROWTH_KIB = 16 * 1024
REFERENCES = ["live", "live:prod", "doomed", "steady", ""]


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_memory_stays_flat(
    own_server: Callable[..., ServerProcess],
    folders: Mapping[str, Path],  # noqa: F811  # the fixture
    expected: Expected,  # noqa: F811  # the fixture
    record_property: Callable[[str, Any], None],
) -> None:
    server = own_server(engine__adapter_device_bytes=LARGEST_BYTES, engine__adapter_host_bytes=LARGEST_BYTES)
    samples: list[tuple[float, int]] = []
    with server.client() as client:
        client.adapters.push(next(iter(folders.values())), "steady")
        swapper = Swapper(client, folders, expected)
        swapper.begin()
        began_s = time.monotonic()
        with Streams(server, expected, REFERENCES) as streams:
            while time.monotonic() < began_s + MINUTES * 60:
                swapper.swap_until(swapper.swaps + ROUND_SWAPS)
                samples.append((time.monotonic() - began_s, server.memory_kib))
    assert streams.problems == []
    assert set(streams.missing) <= {"doomed"}
    settled = [(at_s, kib) for at_s, kib in samples if at_s > MINUTES * 60 / 4]
    half = len(settled) // 2
    early, late = (statistics.median(kib for _, kib in part) for part in (settled[:half], settled[half:]))
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope
    facts = {
        "swaps": swapper.swaps,
        "streams": streams.answers.total(),
        "first_kib": samples[0][1],
        "early_kib": early,
        "late_kib": late,
        "kib_per_minute": round(slope * 60, 1),
        "kib_in_tenths": [kib for _, kib in samples[:: max(1, len(samples) // 10)]],
    }
    record_property("soak", facts)
    print(facts)
    assert late - early < GROWTH_KIB, samples
