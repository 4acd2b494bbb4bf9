"""A whole adapter against a base: what passes, what does not, and what it is then called."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from adapters import measures
from adapters.bundle import Bundle, check_text, parse_bundle, read_bundle
from adapters.errors import AdapterError, InvalidAdapterError, UnsupportedAdapterError, WrongBaseError
from adapters.files import BUNDLE_FILE, CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from adapters.layout import BaseLayout
from adapters.origin import Origin
from adapters.spec import parse_spec
from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from adapters.weights import LoraPair, load_pairs
from tests.adapters.builders import FINGERPRINT, make_adapter


@pytest.fixture
def adapter(llama: PreTrainedModel, tmp_path: Path) -> Path:
    return make_adapter(llama, tmp_path / "adapter", use_rslora=True, rank_pattern={"v_proj": 8})


def _edit_tensors(directory: Path, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    save_file({name: edit(name, tensor) for name, tensor in tensors.items()}, directory / WEIGHTS_FILE)


def _edit_config(directory: Path, **fields: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _refusal(
    directory: Path, layout: BaseLayout, error: type[AdapterError] = InvalidAdapterError
) -> AdapterError:
    with pytest.raises(error) as refusal:
        validate_adapter(directory, layout, max_rank=64)
    assert str(directory) not in str(refusal.value), "a message goes to the client and names no path"
    return refusal.value


def test_facts_are_what_the_adapter_is(adapter: Path, layout: BaseLayout) -> None:
    facts = validate_adapter(adapter, layout, max_rank=64)

    spec = parse_spec((adapter / CONFIG_FILE).read_bytes())
    pairs = load_pairs(adapter / WEIGHTS_FILE, spec, layout)
    dense = [
        (pair.b_OR.double() @ pair.a_RD.double()).norm().item() * spec.scaling_of(module)
        for module, pair in pairs.items()
    ]
    assert facts.delta_norm == pytest.approx(math.hypot(*dense), rel=1e-9)
    assert facts.matched_modules == spec.targets(layout) == tuple(pairs)
    assert (facts.method, facts.rank, facts.alpha, facts.dtype) == ("rslora", 8, 8.0, "F32")
    assert facts.target_modules == ("down_proj", "q_proj", "v_proj")
    assert facts.base_fingerprint == FINGERPRINT
    assert facts.size_bytes == sum(path.stat().st_size for path in adapter.iterdir())
    assert facts.parameter_count == sum(
        tensor.numel() for tensor in load_file(adapter / WEIGHTS_FILE).values()
    )


def test_the_digest_is_of_content_not_of_form(adapter: Path, layout: BaseLayout) -> None:
    digest = validate_adapter(adapter, layout, max_rank=64).digest
    assert digest.startswith("sha256:")
    assert len(digest) == 71

    config = json.loads((adapter / CONFIG_FILE).read_text())
    config["target_modules"].reverse()
    config["peft_version"] = "0.99"
    (adapter / CONFIG_FILE).write_text(json.dumps(dict(reversed(config.items())), separators=(",", ":")))
    tensors = load_file(adapter / WEIGHTS_FILE)
    before = (adapter / WEIGHTS_FILE).read_bytes()
    _write_reversed(adapter / WEIGHTS_FILE, tensors)
    assert (adapter / WEIGHTS_FILE).read_bytes() != before
    assert validate_adapter(adapter, layout, max_rank=64).digest == digest

    _edit_config(adapter, lora_alpha=9)
    changed_config = validate_adapter(adapter, layout, max_rank=64).digest
    _edit_config(adapter, lora_alpha=8)
    _edit_tensors(adapter, lambda name, tensor: tensor * (1.0001 if "v_proj.lora_B" in name else 1))
    changed_tensor = validate_adapter(adapter, layout, max_rank=64).digest
    (adapter / BUNDLE_FILE).write_text(Bundle(FINGERPRINT, chat_template="{{ messages }}").to_json())
    changed_template = validate_adapter(adapter, layout, max_rank=64).digest
    assert len({digest, changed_config, changed_tensor, changed_template}) == 4


def _write_reversed(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The same tensors with header and data in reverse order, which safetensors' own writer never does."""
    header, data = {}, b""
    for name in sorted(tensors, reverse=True):
        raw = tensors[name].numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def test_storage_types_are_reported(llama: PreTrainedModel, layout: BaseLayout, tmp_path: Path) -> None:
    directory = make_adapter(llama, tmp_path, dtype=torch.bfloat16)
    assert validate_adapter(directory, layout, max_rank=64).dtype == "BF16"
    _edit_tensors(directory, lambda name, tensor: tensor.half() if "lora_A" in name else tensor)
    assert validate_adapter(directory, layout, max_rank=64).dtype == "BF16+F16"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, adapter: Path, layout: BaseLayout
) -> None:
    def poison(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "layers.1.self_attn.q_proj.lora_B" in name:
            tensor[-1, -1] = value
        return tensor.to(dtype)

    _edit_tensors(adapter, poison)
    refusal = _refusal(adapter, layout)
    assert refusal.reason == "NOT_FINITE"
    assert "model.layers.1.self_attn.q_proj.lora_B.weight" in str(refusal)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_does_nothing_is_refused_but_one_idle_module_is_not(
    factor: str, adapter: Path, layout: BaseLayout
) -> None:
    _edit_tensors(adapter, lambda name, tensor: tensor * 0 if "q_proj" in name and factor in name else tensor)
    assert validate_adapter(adapter, layout, max_rank=64).delta_norm > 0
    _edit_tensors(adapter, lambda name, tensor: tensor * 0 if factor in name else tensor)
    assert _refusal(adapter, layout).reason == "ALL_ZERO"


@pytest.mark.parametrize(("factor", "scale"), [("lora_A", 1e30), ("lora_B", 1e35), ("lora_", 1e8)])
def test_absurd_magnitudes_are_refused(factor: str, scale: float, adapter: Path, layout: BaseLayout) -> None:
    _edit_tensors(adapter, lambda name, tensor: tensor * (scale if factor in name else 1))
    refusal = _refusal(adapter, layout)
    assert refusal.reason == "TOO_LARGE"
    assert "model.layers.0" in str(refusal)


def test_the_norm_of_a_large_rank_is_that_of_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is summed up in blocks of ranks, the last of them smaller."""
    monkeypatch.setattr(measures, "_BLOCK_RANKS", 16)
    pair = LoraPair(a_RD=torch.randn(50, 12), b_OR=torch.randn(20, 50))
    expected = (pair.b_OR.double() @ pair.a_RD.double()).norm().item() * 3.0
    assert measures._module_norm("m", pair, 3.0) == pytest.approx(expected)


def test_factors_far_apart_in_size_are_no_reason_to_refuse(adapter: Path, layout: BaseLayout) -> None:
    norm = validate_adapter(adapter, layout, max_rank=64).delta_norm
    _edit_tensors(adapter, lambda name, tensor: tensor * (2.0**-20 if "lora_A" in name else 2.0**20))
    assert validate_adapter(adapter, layout, max_rank=64).delta_norm == pytest.approx(norm)


def test_rank_above_the_servers_is_refused(adapter: Path, layout: BaseLayout) -> None:
    with pytest.raises(
        InvalidAdapterError, match=r"v_proj has rank 8, this server takes at most 7"
    ) as refusal:
        validate_adapter(adapter, layout, max_rank=7)
    assert refusal.value.reason == "RANK_TOO_LARGE"


def test_a_rank_other_than_configured_is_refused(adapter: Path, layout: BaseLayout) -> None:
    _edit_config(adapter, rank_pattern={})
    assert _refusal(adapter, layout).reason == "SHAPE_MISMATCH"


class Canary:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "x.pkl"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_pickle_is_refused_unread(
    name: str, beside: bool, adapter: Path, layout: BaseLayout, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    (adapter / name).write_bytes(pickle.dumps(Canary(canary)))
    if not beside:
        (adapter / WEIGHTS_FILE).unlink()
    refusal = _refusal(adapter, layout)
    assert refusal.reason == "PICKLE_REFUSED"
    assert "safe_serialization=True" in str(refusal)
    assert not canary.exists()


def test_a_pickle_under_the_right_name_is_refused(adapter: Path, layout: BaseLayout, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (adapter / WEIGHTS_FILE).write_bytes(pickle.dumps(Canary(canary)))
    assert "pickle" in str(_refusal(adapter, layout))
    torch.save(Canary(canary), adapter / WEIGHTS_FILE)
    assert "pickle" in str(_refusal(adapter, layout))
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["README.md", "tokenizer.json", "adapter_config.json.bak", "ADAPTER_CONFIG.JSON"]
)
def test_other_files_are_refused(name: str, adapter: Path, layout: BaseLayout) -> None:
    (adapter / name).write_text("x")
    assert _refusal(adapter, layout).reason == "UNEXPECTED_FILE"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(name: str, adapter: Path, layout: BaseLayout) -> None:
    (adapter / name).unlink()
    refusal = _refusal(adapter, layout)
    assert (refusal.reason, str(refusal)) == ("MISSING_FILE", f"{name} is missing")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, BUNDLE_FILE])
@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "pipe"])
def test_what_is_not_a_regular_file_is_refused(
    name: str, kind: str, adapter: Path, layout: BaseLayout, tmp_path: Path
) -> None:
    path = adapter / name
    elsewhere = tmp_path / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.write_text(Bundle(FINGERPRINT).to_json())
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert _refusal(adapter, layout).reason == "NOT_A_FILE"


def test_the_bundle_ties_an_adapter_to_its_base(adapter: Path, layout: BaseLayout) -> None:
    bundle = Bundle(FINGERPRINT, chat_template="{{ messages }}", data_sha256="ab" * 32, seed=7)
    (adapter / BUNDLE_FILE).write_text(bundle.to_json())
    assert read_bundle(adapter) == bundle
    assert validate_adapter(adapter, layout, max_rank=64).base_fingerprint == FINGERPRINT

    other = "sha256:" + "0" * 64
    with pytest.raises(WrongBaseError, match=f"{FINGERPRINT}.*{other}"):
        validate_adapter(adapter, BaseLayout(layout.modules, layout.head, other), max_rank=64)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({"format": 2}, UnsupportedAdapterError),
        ({"format": None}, UnsupportedAdapterError),
        ({"base_fingerprint": "sha256:xyz"}, InvalidAdapterError),
        ({"base_fingerprint": None}, InvalidAdapterError),
        ({"chat_template": 3}, InvalidAdapterError),
        ({"chat_template": ""}, InvalidAdapterError),
        ({"chat_template": "x" * 70_000}, InvalidAdapterError),
        ({"data_sha256": "AB" * 32}, InvalidAdapterError),
        ({"seed": -1}, InvalidAdapterError),
        ({"seed": True}, InvalidAdapterError),
        ({"code": "import os"}, InvalidAdapterError),
        ({"eos_token_ids": []}, InvalidAdapterError),
        ({"eos_token_ids": [2, True]}, InvalidAdapterError),
        ({"eos_token_ids": [5, 2]}, InvalidAdapterError),
        ({"eos_token_ids": list(range(65))}, InvalidAdapterError),
        ({"training": []}, InvalidAdapterError),
        ({"training": {"host": "mine"}}, InvalidAdapterError),
        ({"training": {"eval_data_sha256": "AB" * 32}}, InvalidAdapterError),
        ({"training": {"recipe": {"rank": {"of": 3}}}}, InvalidAdapterError),
        ({"training": {"recipe": {"data": "x" * 33_000}}}, InvalidAdapterError),
        ({"training": {"recipe": {"a name": 1}}}, InvalidAdapterError),
        ({"training": {"metrics": {"loss": "low"}}}, InvalidAdapterError),
        ({"training": {"metrics": {"loss": True}}}, InvalidAdapterError),
        ({"training": {"metrics": {f"m{n}": n for n in range(65)}}}, InvalidAdapterError),
        ({"training": {"versions": {"torch": 2}}}, InvalidAdapterError),
        ({"training": {"versions": {"torch": "2" * 129}}}, InvalidAdapterError),
        ({"training": {"versions": {f"p{n}": "1" for n in range(33)}}}, InvalidAdapterError),
    ],
)
def test_a_bad_bundle_is_refused_by_field(
    members: dict[str, Any], error: type[AdapterError], adapter: Path, layout: BaseLayout
) -> None:
    whole = {"format": 1, "base_fingerprint": FINGERPRINT} | members
    (adapter / BUNDLE_FILE).write_text(json.dumps(whole))
    assert next(iter(members)) in str(_refusal(adapter, layout, error))


def test_a_bundle_with_all_that_travels_comes_back_and_counts_in_the_digest(
    adapter: Path, layout: BaseLayout
) -> None:
    origin = Origin(
        "cd" * 32, {"method": "qlora", "target_modules": ["q_proj"], "packing": False, "epochs": 1.5},
        {"final_loss": 0.25, "steps": 7}, {"torch": "2.13.0"},
    )  # fmt: skip
    bundle = Bundle(FINGERPRINT, seed=7, eos_token_ids=(2, 9), training=origin)
    (adapter / BUNDLE_FILE).write_text(bundle.to_json())
    assert read_bundle(adapter) == bundle
    digest = validate_adapter(adapter, layout, max_rank=64).digest
    (adapter / BUNDLE_FILE).write_text(Bundle(FINGERPRINT, seed=7).to_json())
    assert validate_adapter(adapter, layout, max_rank=64).digest != digest


def test_a_manifest_as_it_was_before_means_what_it_meant() -> None:
    """Stored digests are over these members: nothing may be added to a manifest that does not have it."""
    members = {"format": 1, "base_fingerprint": FINGERPRINT, "data_sha256": "ab" * 32, "seed": 7}
    assert parse_bundle(json.dumps(members).encode()).canonical() == members


def test_text_is_compared_with_the_base() -> None:
    bundle = Bundle(FINGERPRINT, chat_template="{{ a }}", eos_token_ids=(2, 9))
    assert check_text(bundle, {2, 9, 11}, "{{ a }}") == (
        "answers end at 2, 9; chats are rendered with the base's template"
    )
    assert check_text(bundle, {2, 9}, None).endswith("rendered with the adapter's own template")
    with pytest.raises(WrongBaseError, match=r"ended at 2, 9 in training, .* does not stop at 9 but at 2;"):
        check_text(bundle, {2}, "{{ a }}")
    assert check_text(Bundle(FINGERPRINT), {2}, None) == (
        "it does not say where answers end; chats are rendered with the base's template"
    )


def test_only_a_file_that_is_named_may_lie_beside_an_adapter(adapter: Path, layout: BaseLayout) -> None:
    alone = validate_adapter(adapter, layout, max_rank=64)
    (adapter / CARD_FILE).write_text("# about it")
    assert validate_adapter(adapter, layout, max_rank=64, beside=(CARD_FILE,)) == alone
    assert _refusal(adapter, layout).reason == "UNEXPECTED_FILE"  # as a server sees it


def test_a_bundle_that_would_not_be_read_is_not_written() -> None:
    with pytest.raises(InvalidAdapterError, match="seed"):
        Bundle(FINGERPRINT, seed=-1).to_json()


def test_an_adapter_for_another_architecture_is_refused(
    adapter: Path, layout: BaseLayout, tmp_path: Path
) -> None:
    half = {name: shape for name, shape in layout.modules.items() if "layers.0" in name}
    assert _refusal(adapter, BaseLayout(half, None, FINGERPRINT)).reason == "UNKNOWN_TENSOR"


def test_a_checked_adapter_is_published_and_loaded_from_the_store(
    adapter: Path, layout: BaseLayout, store: AdapterStore
) -> None:
    staged = store.new_staging()
    for path in adapter.iterdir():
        shutil.copyfile(path, staged / path.name)
    facts = validate_adapter(staged, layout, max_rank=64)
    record, _ = store.publish("sql", staged, facts)
    assert record.facts == facts

    folder = store.path_of(store.resolve("sql").facts.digest)
    store.verify(facts.digest)
    assert validate_adapter(folder, layout, max_rank=64) == facts
    pairs = load_pairs(folder / WEIGHTS_FILE, parse_spec((folder / CONFIG_FILE).read_bytes()), layout)
    assert tuple(pairs) == facts.matched_modules
