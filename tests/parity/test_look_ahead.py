"""While as many run as may, the adapters of those who wait are loaded; nobody's tokens change by it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.base import Base, load_base
from adapters.factors import bytes_of
from adapters.validate import validate_adapter
from tests.adapters.builders import make_adapter, tiny_model
from tests.parity.harness import Ask, Harness

PROMPT = tuple(range(5, 12))


@pytest.fixture
def base_and_adapters(tmp_path: Path) -> tuple[Base, dict[str, Path]]:
    model = tiny_model(tmp_path / "base")
    adapters = {name: make_adapter(model, tmp_path / name, seed=i) for i, name in enumerate("abc")}
    base = load_base(
        str(tmp_path / "base"), quantization="none", dtype="float32", device="cpu", progress=False
    )
    return base, adapters


def step_until(harness: Harness, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        harness.core.step()


def where(harness: Harness) -> dict[str, str]:
    return {
        name: harness.core.residency.whereabouts(identity.digest)
        for name, identity in harness.identities.items()
    }


def test_an_adapter_comes_while_its_request_waits_for_a_place(
    base_and_adapters: tuple[Base, dict[str, Path]], tmp_path: Path
) -> None:
    base, adapters = base_and_adapters
    harness = Harness(base, tmp_path / "store", adapters, block_tokens=4, max_running_requests=1)
    expected = [list(harness.run([Ask(PROMPT, name, 12)])[0].token_ids) for name in ("", "a", "b")]
    for name in "ab":
        assert harness.core.residency.evict(harness.identities[name].digest)
    running = harness.answers_to(Ask(PROMPT, "", 400, priority=2))
    harness.core.add(running)
    harness.core.step()
    asks = [Ask(PROMPT, "", 12, priority=1), Ask(PROMPT, "a", 12), Ask(PROMPT, "b", 12)]
    waiting = [harness.answers_to(ask) for ask in asks]
    for group in waiting:
        harness.core.add(group)
    step_until(harness, lambda: where(harness)["a"] == "device")
    assert running[0].sequence in harness.core.scheduler.running
    assert where(harness)["b"] == "disk"  # no more than may run at once
    harness.core.cancel(running)
    step_until(harness, lambda: harness.core.is_empty)
    assert [group[0].sequence.output_ids for group in waiting] == expected
    assert waiting[1][0].sequence.adapter_wait_s == 0.0
    harness.close()


def test_what_runs_and_what_is_needed_sooner_stays_on_the_device(
    base_and_adapters: tuple[Base, dict[str, Path]], tmp_path: Path
) -> None:
    base, adapters = base_and_adapters
    facts = validate_adapter(adapters["a"], base.layout, max_rank=64)
    harness = Harness(
        base,
        tmp_path / "store",
        adapters,
        block_tokens=4,
        max_running_requests=2,
        adapter_device_bytes=2 * bytes_of(facts, base.layout, torch.float32),  # all three are of one size
    )
    harness.run([Ask(PROMPT, name, 1) for name in "ab"])
    running = [harness.answers_to(Ask(PROMPT, name, 60)) for name in ("a", "")]
    for group in running:
        harness.core.add(group)
    step_until(harness, lambda: len(harness.core.scheduler.running) == 2)
    for name in "bc":
        harness.core.add(harness.answers_to(Ask(PROMPT, name, 4)))
    for _ in range(20):
        harness.core.step()
        assert where(harness) == {"a": "device", "b": "device", "c": "disk"}
        assert not harness.core.residency.is_loading(harness.identities["c"].digest)
    assert len(harness.core.scheduler.running) == 2
    assert harness.evictions == 0
    step_until(harness, lambda: harness.core.is_empty)
    harness.close()
