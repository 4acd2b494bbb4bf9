"""Canaries over the socket: an adapter that answers otherwise than in training is never seen by anybody."""

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from adapters.base import Base, load_base
from adapters.bundle import Bundle
from quickchange import (
    CheckOutcome,
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    Started,
    UnavailableError,
    ValidationCheck,
    ValidationReport,
)
from quickchange.upload import UploadPlan
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.spoiling import MANIFEST
from tests.e2e.test_lifecycle import first_tokens
from tests.e2e.test_uploads import contents
from training.canary import record_canary

RECEIVED = "quickchange_adapter_upload_bytes_total"
PROMPTS = [(40, 41, 42, 43), tuple(range(60, 80)), (7,)]


@pytest.fixture(scope="module")
def trainer(base: Path) -> Base:
    """The base as a training run holds it."""
    return load_base(
        str(base), purpose="train", quantization="none", dtype="float32", device="cpu", progress=False
    )


@pytest.fixture(scope="module")
def with_canaries(
    trainer: Base, adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """The adapters, each with what it answers to the prompts, as training records it."""
    folder = tmp_path_factory.mktemp("canaries")
    return {name: _with_canary(trainer, path, folder / name) for name, path in adapters.items()}


def _with_canary(trainer: Base, adapter: Path, folder: Path) -> Path:
    shutil.copytree(adapter, folder)
    model = PeftModel.from_pretrained(trainer.model, adapter)
    try:
        canary = record_canary(model, trainer, PROMPTS)
    finally:
        model.unload()
    bundle = Bundle(trainer.fingerprint, seed=len(folder.name), canary=canary)
    (folder / MANIFEST).write_text(bundle.to_json())
    return folder


@pytest.fixture
def mixed_up(with_canaries: Mapping[str, Path], tmp_path: Path) -> Path:
    """Adapter a with the canary of b."""
    folder = Path(shutil.copytree(with_canaries["a"], tmp_path / "mixed"))
    shutil.copyfile(with_canaries["b"] / MANIFEST, folder / MANIFEST)
    return folder


def edited(folder: Path, out: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose canary is changed."""
    shutil.copytree(folder, out)
    members = json.loads((out / MANIFEST).read_text())
    edit(members["canary"])
    (out / MANIFEST).write_text(json.dumps(members))
    return out


def blobs(server: ServerProcess) -> set[str]:
    return {path.name for path in (server.store / "blobs/sha256").iterdir()}


def canary_of(report: ValidationReport | None) -> ValidationCheck:
    assert report is not None
    check = report.check("canary")
    assert check is not None
    return check


def traces(server: ServerProcess, client: Client) -> dict[str, Any]:
    """What a replay might leave behind."""
    scraped = server.scrape()
    return {
        "files": contents(server.store),
        "versions": [adapter.etag for adapter in client.adapters.list()],
        "device": client.server_info().capacity.adapter_device_bytes_used,
        "kv": scraped["quickchange_kv_blocks_used_ratio"],
        "series": sorted(name for name in scraped if name.startswith("quickchange_adapter_loaded")),
    }


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_an_adapter_that_answers_as_it_was_trained_is_taken(
    name: str, client: Client, with_canaries: Mapping[str, Path]
) -> None:
    result = client.adapters.push(with_canaries[name], f"canary-{name}")
    check = canary_of(result.report)
    assert (check.outcome, check.reason) == (CheckOutcome.PASSED, "")
    assert check.detail.startswith("36 tokens of 3 prompts: log-probabilities differ by at most 0.00")
    assert client.generate("x", adapter=f"canary-{name}", max_new_tokens=1).adapter.version == 1
    again = client.adapters.push(with_canaries[name], f"canary-{name}")
    assert not again.created
    assert canary_of(again.report).outcome is CheckOutcome.PASSED
    client.adapters.delete(f"canary-{name}", all_versions=True)


@pytest.mark.parametrize("validate_only", [True, False])
def test_one_that_answers_otherwise_is_refused_and_leaves_nothing(
    validate_only: bool, client: Client, server: ServerProcess, pushed: Mapping[str, str], mixed_up: Path
) -> None:
    before = traces(server, client)
    with pytest.raises(FailedPreconditionError) as caught:
        client.adapters.push(mixed_up, "mixed-up", validate_only=validate_only)
    error = caught.value
    assert error.reason == "CANARY_MISMATCH"
    assert "does not answer as it was trained" in error.message
    check = canary_of(error.report)
    assert (check.outcome, check.reason) == (CheckOutcome.FAILED, "CANARY_MISMATCH")
    assert error.report is not None
    assert {c.outcome for c in error.report.checks[:-1]} == {CheckOutcome.PASSED}
    eventually(lambda: traces(server, client) == before)
    with pytest.raises(NotFoundError):
        client.generate("x", adapter="mixed-up", max_new_tokens=1)


def test_a_validation_replays_and_leaves_nothing(
    client: Client, server: ServerProcess, with_canaries: Mapping[str, Path]
) -> None:
    before = traces(server, client)
    result = client.adapters.push(with_canaries["a"], "dry", validate_only=True)
    assert canary_of(result.report).outcome is CheckOutcome.PASSED
    eventually(lambda: traces(server, client) == before)
    with pytest.raises(NotFoundError):
        client.generate("x", adapter=result.adapter.digest, max_new_tokens=1)


def test_without_a_canary_nothing_is_replayed(client: Client, adapters: Mapping[str, Path]) -> None:
    check = canary_of(client.adapters.push(adapters["a"], "none", validate_only=True).report)
    assert (check.outcome, check.detail) == (CheckOutcome.SKIPPED, "the adapter has none")


def test_a_canary_of_another_base_says_nothing(
    client: Client, with_canaries: Mapping[str, Path], tmp_path: Path
) -> None:
    other = "sha256:" + "0" * 64
    folder = edited(with_canaries["a"], tmp_path / "x", lambda canary: canary.update(base_fingerprint=other))
    check = canary_of(client.adapters.push(folder, "other", validate_only=True).report)
    assert (check.outcome, check.detail) == (
        CheckOutcome.SKIPPED,
        f"it was recorded on another base, {other}",
    )


def test_a_canary_that_could_not_fail_is_not_called_passed(
    client: Client, with_canaries: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = edited(with_canaries["a"], tmp_path / "x", lambda canary: canary.update(base_distance=0.01))
    check = canary_of(client.adapters.push(folder, "weak", validate_only=True).report)
    assert check.outcome is CheckOutcome.SKIPPED
    assert "cannot tell the adapter from the bare base" in check.detail


def test_a_canary_longer_than_the_context_says_nothing(
    own_server: Callable[..., ServerProcess], with_canaries: Mapping[str, Path]
) -> None:
    with own_server(engine__max_context_tokens=20).client() as client:
        check = canary_of(client.adapters.push(with_canaries["a"], "long").report)
    assert (check.outcome, check.detail) == (
        CheckOutcome.SKIPPED,
        "it needs a context of 32 tokens, this server has 20",
    )


def test_a_canary_with_a_token_that_is_none_is_refused(
    client: Client, server: ServerProcess, with_canaries: Mapping[str, Path], tmp_path: Path
) -> None:
    def spoil(canary: dict[str, Any]) -> None:
        canary["probes"][1]["prompt_token_ids"][0] = 100_000

    before = traces(server, client)
    with pytest.raises(InvalidArgumentError, match="100000 is not a token") as caught:
        client.adapters.push(edited(with_canaries["a"], tmp_path / "x", spoil), "bad")
    assert caught.value.reason == "BAD_BUNDLE"
    eventually(lambda: traces(server, client) == before)


def test_a_server_that_answers_slightly_otherwise_is_within_what_rounding_explains(
    base: Path, tmp_path: Path, with_canaries: Mapping[str, Path], mixed_up: Path
) -> None:
    """It stores in bfloat16 and, where there is such a kernel, multiplies so, instead of in float32."""
    loose = ServerProcess(base, tmp_path / "store", SMALL, flags=("--dtype", "auto"))
    with running(loose), loose.client() as client:
        for name, folder in with_canaries.items():
            assert canary_of(client.adapters.push(folder, name).report).outcome is CheckOutcome.PASSED
        with pytest.raises(FailedPreconditionError, match="does not answer as it was trained"):
            client.adapters.push(mixed_up, "mixed-up")


def test_a_busy_server_keeps_its_requests_and_asks_to_come_back(
    own_server: Callable[..., ServerProcess], adapters: Mapping[str, Path], with_canaries: Mapping[str, Path]
) -> None:
    """All places are taken for longer than a replay may take: nothing is published, nobody is held up."""
    server = own_server(engine__max_running_requests=2, grpc__canary_timeout_s=3)
    with server.client() as client, ExitStack() as streams:
        client.adapters.push(adapters["b"], "b")
        before, before_blobs = contents(server.store), blobs(server)
        alone = client.generate("busy", adapter="b", max_new_tokens=64, ignore_eos=True).token_ids
        busy = [
            streams.enter_context(client.stream("busy", adapter="b", max_new_tokens=15_000, ignore_eos=True))
            for _ in range(2)
        ]
        for stream in busy:
            assert isinstance(next(stream), Started)
        with pytest.raises(DeadlineExceededError):
            client.adapters.push(
                with_canaries["a"], "late", upload_id="late", timeout_s=1
            )  # gives up halfway
        client.adapters.cancel_upload("late")
        eventually(lambda: contents(server.store) == before)
        with pytest.raises(ResourceExhaustedError) as caught:
            client.adapters.push(with_canaries["a"], "late")
        assert caught.value.reason == "CANARY_NOT_REPLAYED"
        assert caught.value.retry_after_s is not None
        with pytest.raises(NotFoundError):
            client.adapters.get("late")
        assert client.server_info().capacity.requests_running == 2
        assert [first_tokens(stream, 64)[:64] for stream in busy] == [list(alone)] * 2
        streams.close()
        received = server.scrape()[RECEIVED]
        result = client.adapters.push(with_canaries["a"], "late", upload_id=caught.value.upload_id)
        assert canary_of(result.report).outcome == "passed"
        assert server.scrape()[RECEIVED] == received, "the server had every byte"
        client.adapters.delete("late@1")
        eventually(lambda: blobs(server) == before_blobs)


def test_a_busy_server_is_asked_again_with_what_it_has(
    own_server: Callable[..., ServerProcess], with_canaries: Mapping[str, Path]
) -> None:
    """The client comes back as often as it may; the bytes are sent once."""
    server = own_server(engine__max_running_requests=1, grpc__canary_timeout_s=1)
    with server.client() as client, client.stream("busy", max_new_tokens=15_000, ignore_eos=True) as busy:
        assert isinstance(next(busy), Started)
        with pytest.raises(ResourceExhaustedError) as caught:
            client.adapters.push(with_canaries["a"], "late", retries=1)
        assert caught.value.reason == "CANARY_NOT_REPLAYED"
    scraped = server.scrape()
    assert scraped['quickchange_adapter_uploads_total{result="CANARY_NOT_REPLAYED"}'] == 2
    assert scraped[RECEIVED] == UploadPlan.of(with_canaries["a"]).size_bytes


def test_a_server_that_goes_away_before_it_could_decide_keeps_the_bytes(
    own_server: Callable[..., ServerProcess], with_canaries: Mapping[str, Path]
) -> None:
    first = own_server(engine__max_running_requests=1, grpc__drain_grace_s=1)
    with first.client() as client, client.stream("busy", max_new_tokens=15_000, ignore_eos=True) as busy:
        assert isinstance(next(busy), Started)
        with ThreadPoolExecutor() as pool:
            pushing = pool.submit(client.adapters.push, with_canaries["a"], "moved", upload_id="moved")
            eventually(lambda: blobs(first))  # all checks but the canary have passed
            first.signal(signal.SIGTERM)
            with pytest.raises(UnavailableError) as caught:
                pushing.result()
    assert caught.value.upload_id == "moved"
    assert first.wait() == 0
    second = own_server(store=first.store)
    with second.client() as client:
        result = client.adapters.push(with_canaries["a"], "moved", upload_id="moved")
        assert canary_of(result.report).outcome is CheckOutcome.PASSED
    assert second.scrape().get(RECEIVED, 0.0) == 0.0
