"""What happens in a batch when one of its requests goes wrong: the others' tokens do not change."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.base import load_base
from adapters.copies import FactorCopies
from adapters.errors import AdapterCorruptError, CapacityError
from adapters.factors import AdapterFactors
from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from server.batch import Batch
from server.errors import AdapterLoadError, DeadlineError, RequestFailedError
from server.request import AdapterIdentity, Failed, Finished, FinishReason, Request, SamplingParams
from tests.adapters.builders import make_adapter, tiny_model
from tests.parity.harness import Ask, Harness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    model = tiny_model(tmp_path / "base")
    adapters = {name: make_adapter(model, tmp_path / name, seed=i) for i, name in enumerate("ab")}
    base = load_base(
        str(tmp_path / "base"), quantization="none", dtype="float32", device="cpu", progress=False
    )
    harness = Harness(base, tmp_path / "store", adapters, block_tokens=4, kv_bytes=2**20)
    yield harness
    harness.close()


def good_asks() -> list[Ask]:
    return [Ask(tuple(range(5, 12)), name, 20) for name in ("", "a", "b")]


def run_with(harness: Harness, request: Request, asks: list[Ask]) -> tuple[list[Any], Any]:
    """Runs the asks beside one more request; returns their token ids and that request's last event."""
    victim = harness.answers_of(request)
    groups = [harness.answers_to(ask) for ask in asks]
    for group in [victim, *groups]:
        harness.core.add(group)
    last, deadline_s = None, time.monotonic() + 60
    while not harness.core.is_empty:
        assert time.monotonic() < deadline_s
        harness.core.step()
        for stream, event in harness.core.take_events():
            if stream is victim[0].stream:
                last = event
    return [group[0].sequence.output_ids for group in groups], last


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_an_adapter_with_absurd_values_spoils_nobody_else(
    value: float, harness: Harness, tmp_path: Path
) -> None:
    """Forced past every check, and its blocks reused afterwards."""
    asks = good_asks()
    expected = [list(answer.token_ids) for answer in harness.run(asks)]
    identity = publish_poison(harness.store, tmp_path / "b", value)
    poison = Request("poison", tuple(range(20)), SamplingParams(max_new_tokens=8), identity)
    for _ in range(3):
        tokens, last = run_with(harness, poison, asks)
        assert tokens == expected
        assert isinstance(last, Failed)
        assert isinstance(last.error, RequestFailedError)
    for layer in harness.core.runner.cache.layers.values():
        assert torch.isfinite(layer.k_NSKE).all()
        assert torch.isfinite(layer.v_NSKE).all()


def publish_poison(store: AdapterStore, victim: Path, value: float = float("nan")) -> AdapterIdentity:
    """Publishes such values under the facts of a good adapter, as if the check had missed them."""
    facts = store.resolve("b").facts
    staged = store.new_staging()
    for file in victim.iterdir():
        (staged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(victim / "adapter_model.safetensors")
    poisoned = {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}
    save_file(poisoned, staged / "adapter_model.safetensors", metadata={"format": "pt"})
    fake = "sha256:" + "f" * 64
    record, _ = store.publish("poison", staged, replace(facts, digest=fake))
    return AdapterIdentity("poison", record.version, fake)


def test_a_forward_pass_that_fails_for_one_request_fails_that_one_only(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = good_asks()
    expected = [list(answer.token_ids) for answer in harness.run(asks)]
    original = harness.core.runner.run

    def run(batch: Batch) -> torch.Tensor:
        if any(row.sequence.request.request_id == "victim" for row in batch.rows):
            raise RuntimeError("out of memory")
        return original(batch)

    monkeypatch.setattr(harness.core.runner, "run", run)
    tokens, last = run_with(harness, Request("victim", (1, 2, 3)), asks)
    assert tokens == expected
    assert isinstance(last, Failed)
    assert isinstance(last.error, RequestFailedError)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_pass_that_fails_for_one_answer_fails_its_request_and_no_other(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    expected = list(harness.run([Ask((1, 2, 3), "", 9)])[0].token_ids)
    answers = harness.answers_of(Request("victim", tuple(range(9)), SamplingParams(max_new_tokens=50), n=3))
    original = harness.core.runner.run

    def run(batch: Batch) -> torch.Tensor:
        victim = answers[bad].sequence
        if victim.output_length > 2 and any(row.sequence is victim for row in batch.rows):
            raise RuntimeError("out of memory")
        return original(batch)

    monkeypatch.setattr(harness.core.runner, "run", run)
    other = harness.answers_to(Ask((1, 2, 3), "", 9))
    harness.core.add(answers), harness.core.add(other)
    events, deadline_s = [], time.monotonic() + 60
    while not harness.core.is_empty:
        assert time.monotonic() < deadline_s
        harness.core.step()
        events += harness.core.take_events()
    ends = [event for stream, event in events if stream is answers[0].stream]
    assert isinstance(ends[-1], Failed)
    assert sum(isinstance(event, Failed) for event in ends) == 1
    assert other[0].sequence.output_ids == expected
    assert harness.core.scheduler.blocks.used_ratio == 0


def test_a_damaged_adapter_fails_its_requests_only(harness: Harness) -> None:
    identity = harness.identities["a"]
    path = harness.store.path_of(identity.digest) / "adapter_model.safetensors"
    path.chmod(0o600)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    tokens, last = run_with(harness, Request("r", (1, 2, 3), adapter=identity), [Ask((1, 2, 3), "b", 5)])
    assert len(tokens[0]) == 5
    assert isinstance(last, Failed)
    assert isinstance(last.error, AdapterLoadError)
    assert isinstance(last.error.cause, AdapterCorruptError)


def test_a_deadline_ends_a_request_and_gives_everything_back(harness: Harness) -> None:
    identity = harness.identities["a"]
    request = Request(
        "late",
        (1, 2, 3),
        SamplingParams(max_new_tokens=400, ignore_eos=True),
        identity,
        deadline_s=time.monotonic() + 0.05,
    )
    _, last = run_with(harness, request, good_asks())
    assert isinstance(last, Failed)
    assert isinstance(last.error, DeadlineError)
    assert harness.core.scheduler.blocks.used_ratio == 0
    assert harness.core.residency.evict(identity.digest), "no reference may be left"


def test_cancel_takes_effect_within_one_step(harness: Harness) -> None:
    answers = harness.answers_to(Ask((1, 2, 3), "a", 400))
    harness.core.add(answers)
    while answers[0].sequence.output_length < 3:
        harness.core.step()
    harness.core.take_events()
    harness.core.cancel(answers)
    harness.core.cancel(answers)  # harmless
    events = [event for _, event in harness.core.take_events()]
    assert len(events) == 1
    assert isinstance(events[0], Finished)
    assert events[0].reason is FinishReason.CANCELLED
    assert harness.core.scheduler.blocks.used_ratio == 0
    assert not harness.core.step()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancel_ends_every_answer_of_a_request(harness: Harness, steps: int) -> None:
    answers = harness.answers_of(Request("r", (1, 2, 3), SamplingParams(max_new_tokens=400), n=3))
    harness.core.add(answers)
    for _ in range(steps):
        harness.core.step()
    harness.core.take_events()
    harness.core.cancel(answers)
    ends = [event for _, event in harness.core.take_events()]
    assert sorted(end.index for end in ends if isinstance(end, Finished)) == [0, 1, 2]
    assert (harness.core.is_empty, harness.core.waiting) == (True, 0)
    assert harness.core.scheduler.blocks.used_ratio == 0


def test_one_failed_answer_fails_its_request_once(harness: Harness, tmp_path: Path) -> None:
    identity = publish_poison(harness.store, tmp_path / "b")
    request = Request("poison", tuple(range(20)), SamplingParams(max_new_tokens=8), identity, n=3)
    harness.core.add(harness.answers_of(request))
    events, deadline_s = [], time.monotonic() + 60
    while not harness.core.is_empty:
        assert time.monotonic() < deadline_s
        harness.core.step()
        events += [event for _, event in harness.core.take_events()]
    assert len(events) == 1
    assert isinstance(events[0], Failed)
    assert harness.core.waiting == 0


def test_a_deleted_adapter_leaves_no_keys_and_values(harness: Harness) -> None:
    harness.run([Ask(tuple(range(5, 30)), "a", 4)])
    assert any(layer.k_NSKE.any() for layer in harness.core.runner.cache.layers.values())
    harness.core.forget(harness.identities["a"].digest, lambda: None)
    harness.core.step()
    answer = harness.run([Ask(tuple(range(5, 30)), "a", 4)])[0]
    assert answer.finished.cached_tokens == 0


def test_forget_waits_for_running_requests(harness: Harness) -> None:
    digest = harness.identities["a"].digest
    answers = harness.answers_to(Ask((1, 2, 3), "a", 10))
    harness.core.add(answers)
    while not answers[0].sequence.output_length:
        harness.core.step()
    done: list[bool] = []
    harness.core.forget(digest, lambda: done.append(True))
    harness.core.step()
    assert not done
    while not harness.core.is_empty:
        harness.core.step()
    harness.core.step()
    assert done
    assert not harness.core.residency.is_resident(digest)


@pytest.mark.parametrize("problem", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_no_memory_for_an_adapter_fails_its_requests_only(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def full(self: FactorCopies, factors: AdapterFactors) -> AdapterFactors:
        raise problem

    asks = [Ask(tuple(range(5, 12)), name, 20) for name in ("", "b")]
    expected = [list(answer.token_ids) for answer in harness.run(asks)]
    identity = harness.identities["a"]
    request = Request("r", (1, 2, 3), SamplingParams(max_new_tokens=5), identity)
    with monkeypatch.context() as broken:
        broken.setattr(FactorCopies, "to_device", full)
        tokens, last = run_with(harness, request, asks)
    assert tokens == expected
    assert isinstance(last, Failed)
    assert isinstance(last.error, AdapterLoadError)
    assert isinstance(last.error.cause, CapacityError)
    _, last = run_with(harness, request, asks)  # there is memory again
    assert isinstance(last, Finished)


def test_an_adapter_larger_than_all_room_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "base")
    path = make_adapter(model, tmp_path / "a")
    base = load_base(
        str(tmp_path / "base"), quantization="none", dtype="float32", device="cpu", progress=False
    )
    harness = Harness(base, tmp_path / "store", {"a": path}, adapter_device_bytes=64)
    request = Request("r", (1, 2, 3), adapter=harness.identities["a"])
    tokens, last = run_with(harness, request, [Ask((1, 2, 3), "", 5)])
    assert len(tokens[0]) == 5
    assert isinstance(last, Failed)
    assert "--adapter-device-bytes" in str(last.error)
    assert validate_adapter(path, base.layout, max_rank=8).digest == harness.identities["a"].digest
    harness.close()
