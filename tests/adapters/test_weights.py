"""Reading tensors: exactly PEFT's, or a precise refusal, whatever the bytes."""

import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from transformers import PreTrainedModel

from adapters.errors import AdapterError, InvalidAdapterError, UnsupportedAdapterError
from adapters.layout import BaseLayout
from adapters.spec import AdapterSpec, parse_spec
from adapters.weights import CONFIG_FILE, MAX_HEADER_BYTES, WEIGHTS_FILE, load_pairs, read_header
from tests.adapters.builders import make_adapter

FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def adapter(llama: PreTrainedModel, tmp_path: Path) -> Path:
    return make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


def _spec(directory: Path) -> AdapterSpec:
    return parse_spec((directory / CONFIG_FILE).read_bytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pairs_are_the_saved_tensors_bit_for_bit(
    dtype: torch.dtype, llama: PreTrainedModel, layout: BaseLayout, tmp_path: Path
) -> None:
    directory = make_adapter(llama, tmp_path, target_modules="all-linear", dtype=dtype)
    theirs = load_file(directory / WEIGHTS_FILE)

    pairs = load_pairs(directory / WEIGHTS_FILE, _spec(directory), layout)

    ours = {f"base_model.model.{module}.lora_A.weight": pair.a_RD for module, pair in pairs.items()}
    ours |= {f"base_model.model.{module}.lora_B.weight": pair.b_OR for module, pair in pairs.items()}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, theirs[name])


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (FIRST_A.replace("lora_A.weight", "lora_magnitude_vector"), UnsupportedAdapterError, "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", UnsupportedAdapterError, "embedding"),
        (
            "base_model.model.lm_head.base_layer.weight",
            UnsupportedAdapterError,
            "save_embedding_layers=False",
        ),
        (FIRST_B.replace(".weight", ".bias"), UnsupportedAdapterError, "lora_bias=false"),
        (FIRST_A.replace("q_proj", "k_proj"), InvalidAdapterError, "does not target"),
        (FIRST_A.replace("q_proj", "w_proj"), InvalidAdapterError, "no such linear module"),
        (FIRST_A.replace("weight", "default.weight"), InvalidAdapterError, "not called"),
        ("x" * 100_000, InvalidAdapterError, "no such linear module"),
        ("\x00\n\u202e", InvalidAdapterError, "no such linear module"),
    ],
)
def test_a_tensor_too_many_is_refused_and_named(
    name: str, error: type[AdapterError], message: str, adapter: Path, layout: BaseLayout
) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    _save(adapter / WEIGHTS_FILE, tensors | {name: torch.zeros(4, 64)})
    with pytest.raises(error, match=message) as refusal:
        load_pairs(adapter / WEIGHTS_FILE, _spec(adapter), layout)
    assert repr(name)[:60] in str(refusal.value)
    assert len(str(refusal.value)) < 600
    assert str(refusal.value).isprintable()


def test_a_missing_tensor_is_named(adapter: Path, layout: BaseLayout) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    del tensors[FIRST_B]
    _save(adapter / WEIGHTS_FILE, tensors)
    with pytest.raises(InvalidAdapterError, match=FIRST_B) as refusal:
        load_pairs(adapter / WEIGHTS_FILE, _spec(adapter), layout)
    assert refusal.value.reason == "MISSING_TENSOR"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (FIRST_A, (5, 64)),
        (FIRST_A, (4, 65)),
        (FIRST_B, (63, 4)),
        (FIRST_B, (4, 64)),
        (FIRST_A, (256,)),
        (FIRST_A, (0, 64)),
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], adapter: Path, layout: BaseLayout) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    _save(adapter / WEIGHTS_FILE, tensors | {name: torch.ones(shape)})
    with pytest.raises(InvalidAdapterError, match=name) as refusal:
        load_pairs(adapter / WEIGHTS_FILE, _spec(adapter), layout)
    assert refusal.value.reason == "SHAPE_MISMATCH"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_another_dtype_is_refused(dtype: torch.dtype, adapter: Path, layout: BaseLayout) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    _save(adapter / WEIGHTS_FILE, tensors | {FIRST_A: tensors[FIRST_A].to(dtype)})
    with pytest.raises(InvalidAdapterError, match=FIRST_A) as refusal:
        read_header(adapter / WEIGHTS_FILE)
    assert refusal.value.reason == "BAD_DTYPE"


def _file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(start: int, end: int, shape: list[Any], dtype: str = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]} | more


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\x01\x00", "2 bytes"),
        (_file({}, length=2**64 - 1), "announces a header of"),
        (_file({}, length=3), "announces a header of"),
        (_file(b" " * 10, length=MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES), "announces a header of"),
        (_file(b'  {"a":1}'), "does not start with"),
        (_file(b'{"a":' * 20_000), "nested too deeply"),
        (_file(b'{"a":1,"a":2}'), "'a' appears twice"),
        (_file({"__metadata__": {"a": 1}}), "__metadata__"),
        (_file({"a": 3}), "exactly dtype, shape and data_offsets"),
        (_file({"a": _entry(0, 4, [1], more=1)}, bytes(4)), "exactly dtype, shape and data_offsets"),
        (_file({"a": _entry(0, 4, [True])}, bytes(4)), "has shape"),
        (_file({"a": _entry(0, 4, [1.0])}, bytes(4)), "has shape"),
        (_file({"a": _entry(0, 4, [-1])}, bytes(4)), "has shape"),
        (_file({"a": _entry(0, 4, [1] * 9)}, bytes(4)), "has shape"),
        (_file({"a": _entry(0, 0, [2**62, 2**62, 2**62])}), "has 0 bytes"),
        (_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)), "has data_offsets"),
        (_file({"a": _entry(0, 8, [1])}, bytes(8)), "has 8 bytes"),
        (_file({"a": _entry(4, 0, [1])}, bytes(4)), "has -4 bytes"),
        (_file({"a": _entry(0, 4, [1]), "b": _entry(2, 6, [1])}, bytes(6)), "overlap or a gap"),
        (_file({"a": _entry(0, 4, [1]), "b": _entry(0, 4, [1])}, bytes(4)), "overlap or a gap"),
        (_file({"a": _entry(0, 4, [1]), "b": _entry(8, 12, [1])}, bytes(12)), "overlap or a gap"),
        (_file({"a": _entry(4, 8, [1])}, bytes(8)), "overlap or a gap"),
        (_file({"a": _entry(0, 4, [1])}, bytes(3)), "is it complete"),
        (_file({"a": _entry(0, 4, [1])}, bytes(5)), "is it complete"),
        (_file({"a": _entry(0, 2**40, [2**38])}, bytes(4)), "is it complete"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (pickle.dumps({"a": 1}) + bytes(100), "pickle"),
        (pickle.dumps({"a": 1}, protocol=2) + bytes(100), "pickle"),
    ],
)
def test_a_broken_header_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(content)
    with pytest.raises(InvalidAdapterError, match=message):
        read_header(path)


def test_tensors_may_lie_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(_file({"b": _entry(8, 10, [1], "BF16"), "a": _entry(0, 8, [2, 1])}, bytes(10)))
    header = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "a": ("F32", (2, 1)),
        "b": ("BF16", (1,)),
    }
    assert header["a"].offset + 8 == header["b"].offset


@pytest.mark.parametrize("padding", range(0, 256, 8))
def test_no_length_of_header_is_taken_for_something_else(padding: int, tmp_path: Path) -> None:
    """The length stands in the first bytes, where other formats have their signature."""
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(_file(json.dumps({"a": _entry(0, 4, [1])}).encode().ljust(256 + padding), bytes(4)))
    assert read_header(path)["a"].shape == (1,)


def test_links_and_pipes_are_not_opened(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(_file({}))
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(InvalidAdapterError) as refusal:
            read_header(tmp_path / name)
        assert refusal.value.reason == "NOT_A_FILE"
    assert read_header(real) == {}


VALID = _file(
    {
        "__metadata__": {"format": "pt"},
        "a.lora_A": _entry(0, 16, [2, 2]),
        "b.lora_B": _entry(16, 20, [2, 1], "F16"),
        "c": _entry(20, 24, [2], "BF16"),
    },
    bytes(range(24)),
)
HEADER_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "", None]) | HEADER_VALUES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | HEADER_VALUES,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | HEADER_VALUES,
    },
)
FILES = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda cuts, at, byte: (VALID[:at] + bytes([byte]) + VALID[at + 1 :])[: len(VALID) - cuts],
        st.sampled_from([0, 0, 0, 1, 24, 60]),
        st.integers(0, len(VALID) - 1),
        st.integers(0, 255),
    ),
    st.builds(_file, st.dictionaries(st.text(max_size=5), TENSORS, max_size=3), st.binary(max_size=40)),
    st.builds(
        lambda length, tail: struct.pack("<Q", length) + tail,
        st.integers(0, 2**64 - 1),
        st.binary(max_size=60),
    ),
)


@given(content=FILES)
@settings(max_examples=1000, deadline=None)
def test_any_bytes_give_a_header_or_an_adapter_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except AdapterError:
        return
    # What is let in, the reference implementation lets in too, with the same tensors.
    try:
        theirs = load(content)
    except SafetensorError as error:
        pytest.fail(f"safetensors refuses what was let in: {error}")
    assert {name: info.shape for name, info in header.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
        b'{"a":[' + b"[]," * 300_000 + b"[]]}",
        b'{"a":"' + b"\\\\" * 1_000_000 + b'"}',
        b"{" + b",".join(b'"%d":{}' % index for index in range(50_000)) + b"}",
    ],
)
def test_a_hostile_header_takes_bounded_memory(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(_file(header))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidAdapterError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 50 * len(header) + 1_000_000
    finally:
        tracemalloc.stop()
