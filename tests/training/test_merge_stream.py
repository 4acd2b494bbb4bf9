"""Merging some rows at a time: the bytes that a merge in memory would save, and little memory."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adapters.base import dequantized_base, dequantized_model
from adapters.errors import BaseModelError
from adapters.fold import Target
from adapters.quantize import Scheme, recoded
from adapters.skeleton import Skeleton, skeleton_of
from tests.adapters.bases import save_tied_llama
from tests.adapters.builders import make_adapter
from tests.models import ARCHITECTURES, Architecture, build_tiny_model, build_tokenizer
from training.merge import SHARD_BYTES, merge_adapter

SHARDS = (30_000, 150_000, SHARD_BYTES)
"""Every weight or two, some weights, and all of a tiny model in one file."""
LIBRARIES_MIB = 450
"""Of a process that has imported all that a merge needs, and has not begun."""
WORK_MIB = 150
"""What a merge needs besides, however large the model: rows of one weight, its codes, a pair of factors."""


@pytest.fixture
def merge(base_cache: Path) -> Callable[..., None]:
    def merge(source: Path, adapter: Path, out: Path, **options: Any) -> None:
        merge_adapter(str(source), adapter, out, cache_dir=base_cache, progress=False, **options)

    return merge


@pytest.fixture
def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.tensor_rows.BLOCK_WEIGHTS", 1)  # 64 rows, at which tiny weights are cut


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@torch.no_grad()
def merged_in_memory(plain: Any, adapter: Path) -> Any:
    """Whole layers in float64, rounded once; DoRA and IA³ as PEFT merges them."""
    adapted = PeftModel.from_pretrained(plain, adapter)
    if adapted.peft_config["default"].peft_type != "LORA" or adapted.peft_config["default"].use_dora:
        return adapted.merge_and_unload()
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            inner = layer.get_base_layer()
            a_RD, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = (b_OR.double() @ a_RD.double()) * layer.scaling["default"]
            inner.weight.data = ((delta.T if isinstance(inner, Conv1D) else delta) + inner.weight).float()
    return adapted.unload()


def saved(model: Any, folder: Path, shard_bytes: int = SHARD_BYTES) -> dict[str, bytes]:
    """What transformers writes."""
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return weights_of(folder)


@pytest.mark.usefixtures("in_small_blocks")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_shard_size_gives_the_bytes_of_a_merge_in_memory(
    architecture: Architecture, tmp_path: Path, base_cache: Path, merge: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = build_tiny_model(tmp_path / "base", architecture)
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    adapter = make_adapter(plain, tmp_path / "adapter", target_modules="all-linear")
    merged = merged_in_memory(plain, adapter).to(torch.bfloat16)
    for shard_bytes in SHARDS:
        expected = saved(merged, tmp_path / f"memory-{shard_bytes}", shard_bytes)
        assert (len(expected) == 1) == (shard_bytes == SHARD_BYTES)
        merge(folder, adapter, tmp_path / f"out-{shard_bytes}", shard_bytes=shard_bytes)
        assert weights_of(tmp_path / f"out-{shard_bytes}") == expected
    assert "is read into memory" not in caplog.text


@pytest.mark.usefixtures("in_small_blocks")
@pytest.mark.parametrize("kind", ["head", "dora", "ia3"])
@pytest.mark.parametrize("architecture", ["tied llama", "qwen2", "gpt2"])
def test_heads_and_what_peft_merges(
    kind: str, architecture: Any, tmp_path: Path, base_cache: Path, merge: Callable[..., None]
) -> None:
    """IA³ scales biases too, GPT-2's layers are transposed, and the tied head becomes a weight of its own."""
    tied = architecture == "tied llama"
    folder = save_tied_llama(tmp_path / "base") if tied else build_tiny_model(tmp_path / "base", architecture)
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    targets = ["c_attn", "c_proj"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    if kind == "head":
        adapter = make_adapter(plain, tmp_path / "adapter", target_modules=["lm_head", *targets])
    else:
        adapter = random_adapter(plain, kind, targets, tmp_path / "adapter")
    if kind == "head" and tied:
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
        plain.config.tie_word_embeddings, plain.all_tied_weights_keys = False, {}
    expected = saved(merged_in_memory(plain, adapter).to(torch.bfloat16), tmp_path / "memory", SHARDS[0])
    merge(folder, adapter, tmp_path / "out", shard_bytes=SHARDS[0])
    assert weights_of(tmp_path / "out") == expected


def random_adapter(plain: Any, kind: str, targets: list[str], folder: Path) -> Path:
    config: Any = LoraConfig(r=4, use_dora=True, target_modules=targets, task_type="CAUSAL_LM")
    if kind == "ia3":
        config = IA3Config(target_modules=targets, feedforward_modules=targets[1:], task_type="CAUSAL_LM")
    adapted = get_peft_model(plain, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    adapted.unload()
    return folder


@pytest.mark.parametrize(
    ("options", "into"),
    [
        ({"quantization": "nf4"}, "requantized"),
        ({"quantization": "nf4"}, "original"),
        ({"quantization": "fp4", "double_quantization": False}, "requantized"),
        ({"quantization": "int8"}, "dequantized"),
        ({"quantization": "none"}, "dequantized"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_target_and_scheme(
    architecture: Architecture, options: Any, into: Target, tmp_path: Path, base_cache: Path,
    merge: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = build_tiny_model(tmp_path / "base", architecture)
    taken = options if into == "dequantized" else {"quantization": "none"}  # else the source's own weights
    plain = dequantized_base(str(folder), cache_dir=base_cache, progress=False, **taken).model
    targets = ["c_attn", "c_proj"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    adapter = make_adapter(plain, tmp_path / "adapter", target_modules=targets)
    merged = merged_in_memory(plain, adapter)
    if into == "requantized":
        requantize(merged, Scheme(options["quantization"], options.get("double_quantization", True)))
    expected = saved(merged.to(torch.bfloat16), tmp_path / "memory")
    monkeypatch.setattr("adapters.tensor_rows.BLOCK_WEIGHTS", 1)
    merge(folder, adapter, tmp_path / "out", into=into, **options)
    assert weights_of(tmp_path / "out") == expected


def requantize(model: Any, scheme: Scheme) -> None:
    """Each layer as a whole."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | Conv1D) and name != "lm_head":
            transposed = isinstance(layer, Conv1D)
            weight = layer.weight.data.T if transposed else layer.weight.data
            (again,) = recoded([weight], scheme)
            layer.weight.data = again.T.contiguous() if transposed else again


def test_trained_biases(tmp_path: Path, base_cache: Path, merge: Callable[..., None]) -> None:
    folder = build_tiny_model(tmp_path / "base", "qwen2")
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    biases = {name: p.detach() + 0.5 for name, p in plain.named_parameters() if name.endswith("q_proj.bias")}
    (tmp_path / "adapter").mkdir()
    save_file(biases, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "BITFIT", "format": 1}')
    merge(folder, tmp_path / "adapter", tmp_path / "out")
    plain.load_state_dict(biases, strict=False)
    assert weights_of(tmp_path / "out") == saved(plain.to(torch.bfloat16), tmp_path / "memory")
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["modules"] == len(biases)


def test_a_source_that_cannot_be_read_by_weights_is_read_as_a_whole_and_said_so(
    tmp_path: Path, base_cache: Path, merge: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = build_tiny_model(tmp_path / "base")
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    adapter = make_adapter(plain, tmp_path / "adapter", target_modules="all-linear")
    merge(folder, adapter, tmp_path / "by weights", shard_bytes=SHARDS[1])
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(
        tensors | {name: tensors[name].double()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with caplog.at_level(logging.WARNING, "training.merge"):
        merge(folder, adapter, tmp_path / "whole", shard_bytes=SHARDS[1])
    assert "q_proj.weight is F64" in caplog.text
    assert "the whole base is read into memory" in caplog.text
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "by weights")


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_weight_that_is_stored_twice(
    equal: bool, tmp_path: Path, base_cache: Path, merge: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """If the two differ, transformers does not tie them, and nothing here decides which is right."""
    folder = save_tied_llama(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + (0.0 if equal else 1.0)
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    adapter = make_adapter(plain, tmp_path / "adapter")
    expected = saved(merged_in_memory(plain, adapter).to(torch.bfloat16), tmp_path / "memory")
    merge(folder, adapter, tmp_path / "out")
    assert weights_of(tmp_path / "out") == expected
    assert ("is read into memory" in caplog.text) != equal


def test_a_skeleton_is_the_base_without_its_weights(tmp_path: Path, base_cache: Path) -> None:
    folder = build_tiny_model(tmp_path / "base", "gpt2")
    base = dequantized_base(str(folder), cache_dir=base_cache, progress=False)
    skeleton = skeleton_of(str(folder), Scheme("nf4"), cache_dir=base_cache, progress=False)
    assert skeleton.base.layout == base.layout
    assert skeleton.base.fingerprint == base.fingerprint
    assert skeleton.base.eos_token_ids == base.eos_token_ids
    assert {p.device.type for p in skeleton.base.model.parameters()} == {"meta"}
    for name, expected in base.model.state_dict().items():
        assert torch.equal(whole(skeleton, name), expected)


def whole(skeleton: Skeleton, name: str) -> torch.Tensor:
    weight = torch.cat(list(skeleton.blocks(name, dequantized=True)))
    return weight.T if skeleton.is_transposed(name) else weight


def test_a_weight_that_overflows_leaves_nothing(tmp_path: Path, merge: Callable[..., None]) -> None:
    folder = build_tiny_model(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    adapter = make_adapter(plain, tmp_path / "adapter")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.finfo(torch.float32).max
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.norm\.weight overflows bfloat16; save it in float32"):
        merge(folder, adapter, tmp_path / "results" / "out", quantization="none", shard_bytes=SHARDS[0])
    assert list((tmp_path / "results").iterdir()) == []


# Memory


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A llama of 0.5 GB in 16 bits, and an adapter of all its layers."""
    folder = tmp_path_factory.mktemp("larger")
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").apply(_fill)
    model.save_pretrained(folder / "base", max_shard_size="100MB")
    build_tokenizer().save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"base_model.model.{name}.lora_{letter}.weight": torch.randn(shape, generator=generator) * 0.01
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
        for letter, shape in (("A", (8, module.in_features)), ("B", (module.out_features, 8)))
    }
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    spec = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(spec))
    return folder / "base", folder / "adapter"


def _fill(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.normal_(parameter, std=0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
def test_a_merge_needs_the_largest_shard_and_a_constant_at_most(
    larger: tuple[Path, Path], tmp_path: Path, base_cache: Path
) -> None:
    base, adapter = larger
    libraries_mib = peak_mib("import training.merge", cache=base_cache)
    assert libraries_mib < LIBRARIES_MIB
    run = "import sys; from quickchange.cli import main; assert not main(sys.argv[1:])"
    found_mib = peak_mib(
        run, "merge", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out"),
        "--shard-size", "16MB", cache=base_cache,
    )  # fmt: skip
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(shards) > 20
    assert sum(shards) / 2**20 > 2 * WORK_MIB  # or the bound would hold of a merge in memory too
    assert found_mib < max(shards) / 2**20 + LIBRARIES_MIB + WORK_MIB


def peak_mib(code: str, *arguments: str, cache: Path) -> float:
    """VmHWM of a fresh process that runs some code, and then tells it as its last line."""
    told = "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')), end='')"
    environment = os.environ | {"QUICKCHANGE_CACHE": str(cache)}
    command = [sys.executable, "-c", f"{code}; {told}", *arguments]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(process.stdout.splitlines()[-1].split()[1]) / 1024
