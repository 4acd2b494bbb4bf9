"""The formula counts what torch keeps and what a base weighs, and stands beside published figures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.base import load_base
from tests.models import build_tiny_model
from training.activations import layer_bytes
from training.errors import RecipeError
from training.memory import base_bytes, predict_memory, trained_values
from training.methods import METHODS
from training.planned_step import planned_step
from training.published import SHAPES, comparisons
from training.recipe import Recipe
from training.row_lengths import Rows
from training.shape import ModelShape, read_shape, shape_of
from training.workload import Trains, Workload

ROWS, COLUMNS, RANK = 4, 64, 8
CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48, "vocab_size": 1000,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = shape_of(CONFIG, "small")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERY = tuple(module.name for module in SHAPE.modules)
WORK = Workload(
    method="lora", trains="lora", place="cpu", storage="none", rank=RANK, targets=EVERY, batch_rows=ROWS,
    row_tokens=COLUMNS, kept_tokens=COLUMNS, activation_bytes=4, product_bytes=4,
)  # fmt: skip
TRAINS: dict[str, Trains] = {"lora": "lora", "dora": "dora", "ia3": "ia3", "full": "all"}
SCALED = ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


def wrapped(method: str, dtype: torch.dtype, **changes: Any) -> Any:
    options = {key: value for key, value in CONFIG.items() if key != "model_type"}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **options), dtype=dtype)
    if method == "full":
        return base
    base.requires_grad_(False)
    if method == "ia3":
        modules = ["k_proj", "v_proj", "down_proj"]
        config = IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    else:
        config = LoraConfig(
            r=RANK,
            task_type="CAUSAL_LM",
            **({"target_modules": LINEAR, "use_dora": method == "dora"} | changes),
        )
    return get_peft_model(base, config)


def kept_bytes(model: Any) -> int:
    """Of what autograd keeps after a forward pass, weights and log-probabilities left out."""
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights and tensor.shape[-1:] != (CONFIG["vocab_size"],):
            kept[address] = tensor
        return tensor

    ids = torch.randint(5, 1000, (ROWS, COLUMNS))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert output.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("method", "dtype", "options", "settings"),
    [
        ("lora", torch.float32, {}, {}),
        ("lora", torch.bfloat16, {}, {}),
        ("lora", torch.float32, {"target_modules": ["q_proj", "v_proj"]}, {"targets": EVERY[:3:2]}),
        ("lora", torch.bfloat16, {"target_modules": ["q_proj", "v_proj"]}, {"targets": EVERY[:3:2]}),
        ("lora", torch.float32, {"lora_dropout": 0.1}, {"dropout": True}),
        ("ia3", torch.float32, {}, {"targets": SCALED}),
        ("ia3", torch.bfloat16, {}, {"targets": SCALED}),
        ("full", torch.float32, {}, {}),
    ],
)
def test_what_autograd_keeps_is_what_the_formula_counts(
    method: str, dtype: torch.dtype, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    work = replace(WORK, trains=TRAINS[method], activation_bytes=dtype.itemsize, **settings)
    predicted = layer_bytes(SHAPE, work).total * SHAPE.layers
    assert predicted == pytest.approx(kept_bytes(wrapped(method, dtype, **options)), rel=0.05)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "full"])
def test_trained_values_are_counted_exactly(method: str) -> None:
    model = wrapped(method, torch.float32)
    actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
    targets = SCALED if method == "ia3" else EVERY
    assert trained_values(SHAPE, replace(WORK, trains=TRAINS[method], targets=targets)) == actual


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_weighs_what_is_predicted(tmp_path: Path, base_cache: Path, quantization: Any) -> None:
    folder = build_tiny_model(tmp_path)
    base = load_base(
        str(folder),
        purpose="train",
        quantization=quantization,
        device="cpu",
        cache_dir=base_cache,
        progress=False,
    )
    predicted = base_bytes(read_shape(folder, "tiny"), replace(WORK, storage=quantization))
    tables = 1024 * len(base.layout.modules) if quantization == "nf4" else 0  # each layer's 256 code values
    assert predicted + tables == pytest.approx(base.weight_bytes, rel=0.03)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"bitfit"}))
def test_every_method_has_a_prediction_whose_parts_are_the_total(method: str) -> None:
    recipe = Recipe.from_mapping({"data": "d", "out": "o", "method": method}, source="a test")
    rows = Rows(64, 64, shares_prefixes=False, tokens=None, count=None)
    memory = predict_memory(SHAPE, planned_step(recipe, SHAPE, rows, "cpu"))
    assert memory.total_bytes == sum(memory.parts.values())
    assert memory.added_bytes > memory.parts["activations"] > 0


def test_bitfit_counts_the_biases_that_a_base_has() -> None:
    qwen = shape_of({**CONFIG, "model_type": "qwen2"}, "qwen")
    recipe = Recipe.from_mapping({"data": "d", "out": "o", "method": "bitfit"}, source="a test")
    rows = Rows(64, 64, shares_prefixes=False, tokens=None, count=None)
    assert trained_values(qwen, planned_step(recipe, qwen, rows, "cpu")) == 4 * (192 + 96 + 96)
    with pytest.raises(RecipeError, match="has none"):
        planned_step(recipe, SHAPE, rows, "cpu")


@pytest.mark.parametrize(
    ("changes", "share"),
    [({}, 1.0), ({"trains": "dora"}, 0.5), ({"trains": "ia3"}, 0.5), ({"checkpointing": True}, 0.7)],
)
def test_a_heap_takes_a_measured_share_of_the_activations_anew(changes: dict[str, Any], share: float) -> None:
    work = replace(WORK, **changes)
    kept = SHAPE.layers * layer_bytes(SHAPE, work).total
    trained = trained_values(SHAPE, work)
    heap = predict_memory(SHAPE, replace(work, heap_keeps=True)).parts["heap"]
    assert heap == pytest.approx(share * kept - 12 * trained, abs=1)  # a gradient and two states
    assert predict_memory(SHAPE, work).parts["heap"] == 0


@pytest.mark.parametrize("rows", [1, 64])
def test_of_full_training_it_takes_the_gradients_at_most(rows: int) -> None:
    work = replace(WORK, trains="all", batch_rows=rows, heap_keeps=True)
    kept = SHAPE.layers * layer_bytes(SHAPE, work).total
    gradients = 4 * SHAPE.parameters
    assert predict_memory(SHAPE, work).parts["heap"] == min(kept, gradients)
    assert (kept > gradients) == (rows == 64)


def test_savings_save() -> None:
    shape = SHAPES["7B"]
    work = replace(
        WORK, targets=EVERY, batch_rows=8, row_tokens=512, activation_bytes=2, product_bytes=2, place="cuda"
    )

    def total(**changes: Any) -> int:
        return predict_memory(shape, replace(work, **changes)).total_bytes

    assert total(checkpointing=True) < 0.5 * total()
    assert total(batch_rows=4) < total()
    assert total(optimizer="adamw_8bit") < total()
    assert total(storage="nf4") < total(storage="nf4-single") < total(storage="int8") < total()


@pytest.mark.parametrize(
    ("name", "billions"),
    [("7B", 6.738), ("13B", 13.016), ("30B", 32.529), ("70B", 68.977), ("8x7B", 46.703), ("8x22B", 140.63)],
)
def test_published_shapes_have_the_published_parameters(name: str, billions: float) -> None:
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_formula_and_published_figures_are_of_one_size() -> None:
    """A vendor's round figures for unstated batches: more than half and less than twice."""
    found = [one for one in comparisons() if not one.weights_only]
    assert len(found) == 35
    assert all(0.5 < one.ratio < 2 for one in found)
    assert all(one.smallest_gb < one.predicted_gb for one in found)


def test_a_shape_survives_gpt2s_names() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
    shape: ModelShape = shape_of(gpt2, "gpt2")
    assert (shape.inner, shape.gated, shape.tied) == (3072, False, True)
    assert shape.parameters == pytest.approx(124e6, rel=0.02)
