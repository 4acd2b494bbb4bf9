"""A server with an adapter merged in: it answers as the live adapter does, and refuses what is not exact."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from adapters.base import load_base
from quickchange import Client, FailedPreconditionError, NotFoundError, Started
from quickchange.types import Residency
from tests.adapters.builders import make_adapter
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, running
from tests.parity.oracle import Oracle
from training.merge import merge_adapter

PROMPTS = ("the quick brown", "SELECT name FROM", "once upon a time there was")
TOKENS = 12


@dataclass(frozen=True)
class Place:
    """A store with adapters of the bare base, and what the bare base's server said of them.

    Attributes:
        live: tokens of the adapter a, applied live, by prompt; bare those of the base.
    """

    store: Path
    settings: Mapping[str, object]
    bare_fingerprint: str
    live: Mapping[str, tuple[int, ...]]
    bare: Mapping[str, tuple[int, ...]]


def _tokens(client: Client, adapter: str = "") -> dict[str, tuple[int, ...]]:
    return {
        prompt: client.generate(prompt, adapter=adapter, max_new_tokens=TOKENS).token_ids
        for prompt in PROMPTS
    }


def _expected(oracle: Oracle, tokenizer: PreTrainedTokenizerFast, adapter: str) -> dict[str, tuple[int, ...]]:
    ids = {prompt: tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS}
    return {prompt: tuple(oracle.greedy(ids[prompt], adapter, TOKENS)) for prompt in PROMPTS}


def _declaring(folder: Path, copy: Path, fingerprint: str) -> Path:
    """The adapter with a manifest that says for which base it was made."""
    shutil.copytree(folder, copy)
    (copy / "quickchange.json").write_text(json.dumps({"format": 1, "base_fingerprint": fingerprint}))
    return copy


@pytest.fixture(scope="module")
def place(base: Path, adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("merged")
    settings = SMALL | {"base.cache_dir": folder / "cache"}
    with running(ServerProcess(base, folder / "store", settings)) as server, server.client() as client:
        fingerprint = client.server_info().base_fingerprint
        assert client.server_info().merged is None
        client.adapters.push(_declaring(adapters["a"], folder / "a", fingerprint), "a")
        client.adapters.alias("a", "prod", 1)
        client.adapters.pin("a")
        client.adapters.push(_declaring(adapters["b"], folder / "b", fingerprint), "b")
        client.adapters.push(adapters["c"], "c")
        return Place(folder / "store", settings, fingerprint, _tokens(client, "a"), _tokens(client))


@pytest.fixture(scope="module")
def merged(base: Path, place: Place) -> Iterator[ServerProcess]:
    flags = ("--merged", "a:prod", "--lora-info-gauge", "on")
    process = ServerProcess(base, place.store, place.settings, flags=flags)
    with running(process) as server:
        yield server


@pytest.fixture
def asked(merged: ServerProcess) -> Iterator[Client]:
    with merged.client() as client:
        yield client


def test_every_name_of_it_and_none_are_the_live_adapter(asked: Client, place: Place) -> None:
    assert all(place.live[prompt] != place.bare[prompt] for prompt in PROMPTS)
    digest = asked.adapters.get("a").digest
    for reference in ("", "a", "a@1", "a:prod", digest):
        assert _tokens(asked, reference) == place.live, reference
        answer = asked.generate(PROMPTS[0], adapter=reference, max_new_tokens=1).adapter
        assert (answer.name, answer.version, answer.digest) == ("a", 1, digest)
    with asked.stream(PROMPTS[0], max_new_tokens=1) as stream:
        started = next(event for event in stream if isinstance(event, Started))
    assert started.adapter.digest == digest


def test_it_is_shown(asked: Client, merged: ServerProcess, place: Place) -> None:
    info, digest = asked.server_info(), asked.adapters.get("a").digest
    assert info.merged is not None
    assert (info.merged.adapter.name, info.merged.adapter.version, info.merged.adapter.digest) == (
        "a",
        1,
        digest,
    )
    assert info.merged.into == "dequantized"
    assert info.merged.bare_base_fingerprint == place.bare_fingerprint != info.base_fingerprint
    base = next(model for model in asked.models() if model.is_base)
    assert (base.reference, base.adapter.name, base.adapter.digest) == ("", "a", digest)
    # In the weights: no load brings it nearer and no unload takes it away.
    assert asked.adapters.get("a").residency is Residency.DEVICE
    assert asked.adapters.load("a").residency is Residency.DEVICE
    assert asked.adapters.unload("a").residency is Residency.DEVICE
    assert [each.residency for each in asked.adapters.list(name="a")] == [Residency.DEVICE]
    with asked.adapters.watch(send_initial=True) as events:
        seen = next(event for event in events if event.adapter.name == "a")
    assert seen.adapter.residency is Residency.DEVICE
    assert "pinned adapter not loaded" not in merged.log


def test_routers_find_it(asked: Client, merged: ServerProcess) -> None:
    (info,) = (name for name in merged.scrape() if name.startswith("quickchange_lora_requests_info"))
    (running,) = re.findall(r'running_lora_adapters="([^"]*)"', info)
    assert "a@1" in running.split(",")
    assert 'waiting_lora_adapters=""' in info


def test_metrics_count_it_and_prompts_share_their_keys(asked: Client, merged: ServerProcess) -> None:
    series = 'quickchange_adapter_requests_total{adapter="a"}'
    before = merged.scrape().get(series, 0.0)
    prompt = "a prompt that is longer than a block of keys and values " * 2
    first = asked.generate(prompt, adapter="a", max_new_tokens=4)
    again = asked.generate(prompt, max_new_tokens=4)
    assert merged.scrape()[series] == before + 2
    assert again.usage.cached_tokens > 0
    assert first.token_ids == again.token_ids


@pytest.mark.parametrize("name", ["b", "c"])
def test_adapters_of_the_bare_base_are_refused_with_the_reason(
    asked: Client, place: Place, name: str
) -> None:
    """c does not say for which base it was made: a bare server takes it by its shapes, this one does not."""
    for call in (
        lambda: asked.generate(PROMPTS[0], adapter=name, max_new_tokens=1),
        lambda: asked.adapters.load(name),
    ):
        with pytest.raises(FailedPreconditionError) as refusal:
            call()
        assert "WRONG_BASE" in (refusal.value.reason, refusal.value.metadata.get("cause"))
        assert "a@1 merged into it" in str(refusal.value)
        assert "ask a server of the bare base" in str(refusal.value)
    assert asked.adapters.get(name).residency is Residency.DISK
    assert _tokens(asked) == place.live


def test_uploads_for_the_bare_base_are_refused(
    asked: Client, place: Place, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    for folder in (adapters["b"], _declaring(adapters["b"], tmp_path / "b", place.bare_fingerprint)):
        with pytest.raises(FailedPreconditionError) as refusal:
            asked.adapters.push(folder, "late")
        assert refusal.value.reason == "WRONG_BASE"
    with pytest.raises(NotFoundError):
        asked.adapters.get("late")


def test_its_strength_is_fixed(asked: Client, place: Place) -> None:
    for reference in ("", "a"):
        with pytest.raises(FailedPreconditionError, match="adapter_scale"):
            asked.generate(PROMPTS[0], adapter=reference, adapter_scale=0.5, max_new_tokens=1)
    answer = asked.generate(PROMPTS[0], adapter="a", adapter_scale=1.0, max_new_tokens=TOKENS)
    assert answer.token_ids == place.live[PROMPTS[0]]


def test_an_adapter_of_the_merged_model_is_served_on_it(
    asked: Client,
    place: Place,
    base: Path,
    adapters: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """`merge --dtype float32` writes the model that the server has: to train on, and with one fingerprint."""
    folder, cache = tmp_path / "model", Path(str(place.settings["base.cache_dir"]))
    merge_adapter(
        str(base),
        adapters["a"],
        folder,
        quantization="none",
        dtype="float32",
        cache_dir=cache,
        progress=False,
    )
    trained_on = load_base(str(folder), purpose="train", quantization="none", cache_dir=cache, progress=False)
    assert trained_on.fingerprint == asked.server_info().base_fingerprint
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = make_adapter(model, tmp_path / "plain", r=4, seed=9)
    asked.adapters.push(_declaring(plain, tmp_path / "second", trained_on.fingerprint), "second")
    oracle = Oracle(folder, {"second": plain})
    found = _tokens(asked, "second")
    assert found == _expected(oracle, tokenizer, "second") != place.live
    assert asked.generate(PROMPTS[0], adapter="second", max_new_tokens=1).adapter.name == "second"
    assert _tokens(asked) == place.live


@pytest.mark.parametrize(
    ("flag", "into"), [(("--merged-into", "requantized"), "requantized"), ((), "dequantized")]
)
def test_a_quantized_base_has_what_merge_writes(
    flag: tuple[str, ...],
    into: Any,
    base: Path,
    adapters: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """A folder outside the store; only if asked for are the weights in NF4 again."""
    model = tmp_path / "model"
    merge_adapter(
        str(base), adapters["a"], model, into=into, dtype="float32", cache_dir=tmp_path, progress=False
    )
    oracle = Oracle(model, {"b": adapters["b"]})
    settings = SMALL | {"base.cache_dir": tmp_path / "cache"}
    flags = ("--quantization", "nf4", "--merged", str(adapters["a"]), *flag)
    process = ServerProcess(base, tmp_path / "store", settings, flags=flags)
    with running(process) as server, server.client() as client:
        info, found = client.server_info(), _tokens(client)
        assert info.merged is not None
        by_digest = _tokens(client, info.merged.adapter.digest)
    assert (info.merged.adapter.name, info.merged.adapter.version) == (adapters["a"].name, 0)
    assert (info.merged.into, info.quantization) == (into, "nf4" if into == "requantized" else "none")
    assert ("not quite the live adapter" in server.log) == (into == "requantized")
    assert found == by_digest == _expected(oracle, tokenizer, "")


def test_what_no_server_applies_is_served_merged(
    base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dora = make_adapter(model, tmp_path / "dora", r=4, seed=5, use_dora=True)
    oracle = Oracle(base, {"dora": dora})
    settings = SMALL | {"base.cache_dir": tmp_path / "cache"}
    process = ServerProcess(base, tmp_path / "store", settings, flags=("--merged", str(dora)))
    with running(process) as server, server.client() as client:
        found = _tokens(client)
    assert found == _expected(oracle, tokenizer, "dora") != _expected(oracle, tokenizer, "")


def test_what_cannot_be_merged_ends_the_start_in_one_line(base: Path, tmp_path: Path) -> None:
    """Every reason has its test in tests/server/test_resident.py."""
    settings = SMALL | {"base.cache_dir": tmp_path / "cache"}
    expected = {
        ("--merged", "unheard-of"): "error: --merged unheard-of: there is no adapter 'unheard-of'; list the",
        ("--merged-into", "requantized"): "error: --merged-into requantized: there is nothing to merge",
    }
    for flags, line in expected.items():
        process = ServerProcess(base, tmp_path / "store", settings, flags=("--quantization", "nf4", *flags))
        assert process.wait(120) == 1
        assert line in process.log
        assert "Traceback" not in process.log
