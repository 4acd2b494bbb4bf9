"""Every method on a tiny model: it learns, leaves the base alone, and what it saves is what it trained."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import training.train
from adapters.base import Base, dequantized_base, load_base
from adapters.bundle import read_bundle
from adapters.errors import InvalidAdapterError
from adapters.files import CARD_FILE
from adapters.validate import validate_adapter
from tests.adapters.bases import PROMPT, distance, logits, save_gpt2, save_tied_llama
from tests.models import build_tiny_model
from tests.training.bases import BaseOf, bases_in, digest
from training.attaching import attached
from training.errors import RecipeError, StoppedError
from training.merge import merge_adapter
from training.methods import METHODS
from training.recipe import Recipe
from training.train import TrainingResult, train

RATES = {"full": 2e-3, "bitfit": 3e-2, "ia3": 5e-2, "prefix": 5e-2, "prompt": 5e-2, "lora_plus": 1e-3}
ON = {"bitfit": "qwen2"}
"""The architecture, where llama will not do: it has no biases."""

CASES = [
    *((name, method.quantizations[0], True) for name, method in METHODS.items()),
    ("qlora", "fp4", True),
    ("qlora", "fp4", False),
    ("qlora", "nf4", False),
    ("qdora", "fp4", True),
    ("rslora", "none", True),
    ("rslora", "int8", True),
    ("lora_plus", "int8", True),
    ("loftq", "int8", True),
    ("loftq", "fp4", True),
    ("ia3", "none", True),
    ("ia3", "int8", True),
    ("prefix", "none", True),
    ("prompt", "int8", True),
]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> BaseOf:
    return bases_in(tmp_path_factory.mktemp("bases"), base_cache)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Logits of every trained model, in the form in which it was saved."""
    seen: list[Tensor] = []
    write = training.train.write_outcome

    def record(model: Any, base: Base, *rest: Any) -> Any:
        # An evaluated int8 layer rounds its input as well; a training one shows what its weight stands for.
        seen.append(real_logits(model.train(base.quantization == "int8")))
        return write(model, base, *rest)

    monkeypatch.setattr(training.train, "write_outcome", record)
    return seen


def real_logits(model: Any) -> Tensor:
    """Of the prompt's own positions, without those that prompt tuning puts before it."""
    return logits(model)[:, -PROMPT.shape[1] :]


def recipe_for(data: Path, method: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {"epochs": 6.0, "learning_rate": RATES.get(method, 5e-3), "products": "float32"}
    if "rank" in METHODS[method].settings:
        values["rank"] = 4
    values |= {"method": method, "data": data, "out": data.with_name("out")}
    return Recipe.from_mapping(values | changes, source="test")


def run(base: Base, data: Path, method: str, **changes: Any) -> TrainingResult:
    quantized = {"quantization": base.quantization}
    if base.scheme.is_4bit:
        quantized["double_quantization"] = base.scheme.double
    return train(recipe_for(data, method, **(quantized | changes)), base, progress=False)


def reloaded(result: TrainingResult, base: Base, cache: Path) -> Any:
    """What is in the folder, on the base's weights in plain float32 torch, by transformers and PEFT alone."""
    if (result.out / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)
    plain = dequantized_base(
        str(base.folder), quantization=base.quantization, double_quantization=base.scheme.double,
        cache_dir=cache, progress=False,
    ).model  # fmt: skip
    config = json.loads((result.out / "adapter_config.json").read_text())
    if config["peft_type"] == "BITFIT":
        tensors = load_file(result.out / "adapter_model.safetensors")
        assert not plain.load_state_dict(tensors, strict=False).unexpected_keys
        return plain
    return PeftModel.from_pretrained(plain, result.out)


@pytest.mark.parametrize(("method", "quantization", "double"), CASES)
def test_a_method_learns_and_what_it_saves_is_what_it_trained(
    method: str,
    quantization: str,
    double: bool,
    base_of: BaseOf,
    data: Path,
    settled: list[Tensor],
    base_cache: Path,
) -> None:
    base = base_of(quantization, ON.get(method, "llama"), double)
    bare = logits(base.model.train(quantization == "int8"))
    base.model.eval()
    before = digest(base)
    result = run(base, data, method)
    losses = [point.loss for point in result.fit.losses]
    assert result.fit.final_loss < 0.75 * losses[0]
    assert digest(base) == before
    (trained,) = settled
    assert distance(bare, trained) > 0.02
    found = real_logits(reloaded(result, base, base_cache).eval())
    torch.testing.assert_close(found, trained, rtol=2e-3, atol=2e-3)
    if METHODS[method].why_not_served is None:
        rank = 4 * METHODS[method].rank_factor
        facts = validate_adapter(result.out, base.layout, max_rank=rank, beside=(CARD_FILE,))
        assert facts == result.facts
    else:
        assert result.facts is None


@pytest.mark.parametrize(
    "method", ["lora", "ia3", "prefix", "prompt", "full", "bitfit", "pissa", "loftq", "dora"]
)
def test_gpt2_whose_layers_are_fused_and_transposed(
    method: str, tmp_path: Path, data: Path, settled: list[Tensor], base_cache: Path
) -> None:
    base = load_base(
        str(save_gpt2(tmp_path / "gpt2")), purpose="train", device="cpu", cache_dir=base_cache,
        quantization="nf4" if method == "loftq" else "none", progress=False,
    )  # fmt: skip
    before = digest(base)
    result = run(base, data, method, epochs=2.0)
    assert digest(base) == before
    found = real_logits(reloaded(result, base, base_cache).eval())
    torch.testing.assert_close(found, settled[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_breaks_gives_the_base_back(method: str, base_of: BaseOf, data: Path) -> None:
    base = base_of(METHODS[method].quantizations[0], ON.get(method, "llama"))
    before = digest(base)
    with pytest.raises(KeyboardInterrupt):
        interrupted(base, recipe_for(data, method))
    assert digest(base) == before
    assert all(parameter.grad is None for parameter in base.model.parameters())


def interrupted(base: Base, recipe: Recipe) -> None:
    ids = torch.arange(3, 19)[None]
    with attached(base, recipe, torch.float32) as trainee:
        wanted = [parameter for parameter in trainee.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(wanted, lr=1.0)
        trainee.model.train()
        trainee.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["full", "lora", "bitfit", "prompt"])
def test_products_in_bfloat16_are_for_training_alone(
    method: str, base_of: BaseOf, data: Path, settled: list[Tensor], base_cache: Path
) -> None:
    """What is saved and recorded afterwards was computed in float32."""
    base = base_of("none", ON.get(method, "llama"))
    before = digest(base)
    result = run(base, data, method, products="bfloat16")
    assert result.fit.products == "bfloat16"
    assert result.fit.final_loss < 0.75 * result.fit.losses[0].loss
    assert digest(base) == before
    found = real_logits(reloaded(result, base, base_cache).eval())
    torch.testing.assert_close(found, settled[0], rtol=1e-4, atol=1e-4)
    rounded = run(base, data, method, products="float32", out=data.with_name("exact"))
    assert rounded.fit.losses[0].loss != result.fit.losses[0].loss


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_to_the_same_result(method: str, base_of: BaseOf, data: Path) -> None:
    base = base_of(METHODS[method].quantizations[0], ON.get(method, "llama"))
    before, stopped = digest(base), threading.Event()
    stopped.set()
    whole = run(base, data, method, out=data.with_name("whole"), max_steps=4)
    with pytest.raises(StoppedError, match="stopped after step 1 of 4"):
        train(recipe_for(data, method, max_steps=4), base, stop=stopped, progress=False)
    assert digest(base) == before
    resumed = train(recipe_for(data, method, max_steps=4), base, start="resume", progress=False)
    assert digest(base) == before
    assert resumed.fit.resumed_at == 1
    assert resumed.fit.losses == whole.fit.losses
    (weights,) = (path.name for path in whole.out.glob("*.safetensors"))
    assert (resumed.out / weights).read_bytes() == (whole.out / weights).read_bytes()


# What is in the folders


def test_what_is_left_out_and_why_stands_in_the_report(base_of: BaseOf, data: Path) -> None:
    expected = {
        ("qlora", "nf4", True): ("passed", "recorded"),
        ("qlora", "nf4", False): ("passed", "left out: no server holds a base in nf4-64"),
        ("qdora", "nf4", True): ("left out: use_dora", "left out: use_dora"),
        ("full", "none", True): ("left out: it makes a whole model", "left out: it makes a whole model"),
    }
    for (method, quantization, double), (validation, canary) in expected.items():
        out = data.with_name(f"{method}-{double}")
        result = run(base_of(quantization, double=double), data, method, out=out, max_steps=2)
        checks = json.loads((result.artefacts / "training.json").read_text())["checks"]
        assert checks["validation"].startswith(validation)
        assert checks["canary"].startswith(canary)


def test_a_whole_model_is_a_base_of_its_own(base_of: BaseOf, data: Path, base_cache: Path) -> None:
    base = base_of("none")
    result = run(base, data, "full", max_steps=3)
    assert {path.suffix for path in result.out.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}
    assert AutoTokenizer.from_pretrained(result.out).chat_template == base.chat_template
    served = load_base(str(result.out), device="cpu", cache_dir=base_cache, progress=False)
    assert served.fingerprint != base.fingerprint
    assert served.eos_token_ids == base.eos_token_ids
    assert served.layout.modules == base.layout.modules


def test_a_whole_model_is_saved_in_the_type_of_its_source(
    tmp_path: Path, data: Path, base_cache: Path
) -> None:
    source = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "source"), dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    base = load_base(
        str(tmp_path / "source"), purpose="train", quantization="none", dtype="float32", device="cpu",
        cache_dir=base_cache, progress=False,
    )  # fmt: skip
    result = run(base, data, "full", max_steps=2)
    tensors = load_file(result.out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_pissa_comes_out_as_lora_of_twice_the_rank(base_of: BaseOf, data: Path) -> None:
    result = run(base_of("none"), data, "pissa", max_steps=3)
    config = json.loads((result.out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


def test_loftq_begins_nearer_to_the_source_than_the_quantised_base(base_of: BaseOf, data: Path) -> None:
    base, source = base_of("fp4"), base_of("none")
    wanted = logits(source.model)
    recipe = recipe_for(data, "loftq", quantization="fp4", rank=24)
    with attached(base, recipe, torch.float32) as trainee:
        begun = logits(trainee.model.eval())
    assert distance(begun, wanted) < 0.8 * distance(logits(base.model), wanted)


def test_lora_plus_teaches_b_faster(base_of: BaseOf, data: Path) -> None:
    """One step of AdamW moves every weight by its rate: B by lora_plus_ratio times what A moves."""
    run(
        base_of("none"),
        data,
        "lora_plus",
        quantization="none",
        max_steps=1,
        learning_rate=1e-4,
        lora_plus_ratio=50,
    )
    tensors = load_file(data.with_name("out") / "adapter_model.safetensors")
    moved = torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_B" in name]).abs()
    assert float(moved.max()) == pytest.approx(50e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "quantization", "architecture"),
    [
        ("dora", "none", "llama"),
        ("qdora", "nf4", "gpt2"),
        ("ia3", "nf4", "llama"),
        ("ia3", "none", "gpt2"),
        ("bitfit", "none", "qwen2"),
        ("lora_8bit", "int8", "llama"),
        ("qlora", "fp4", "llama"),
    ],
)
def test_what_no_server_applies_becomes_a_model_of_its_own(
    method: str,
    quantization: Any,
    architecture: Any,
    base_of: BaseOf,
    data: Path,
    settled: list[Tensor],
    base_cache: Path,
) -> None:
    base = base_of(quantization, architecture)
    result = run(base, data, method, epochs=2.0)
    report = merge_adapter(
        str(base.folder), result.out, data.with_name("merged"), quantization=quantization, dtype="float32",
        cache_dir=base_cache, progress=False,
    )  # fmt: skip
    assert report.delta_norm > 0
    merged = AutoModelForCausalLM.from_pretrained(data.with_name("merged"))
    torch.testing.assert_close(logits(merged), settled[0], rtol=5e-3, atol=5e-3)


def test_dora_of_a_tied_head_leaves_the_embedding(
    tmp_path: Path, data: Path, settled: list[Tensor], base_cache: Path
) -> None:
    folder = save_tied_llama(tmp_path / "tied")
    base = load_base(
        str(folder), purpose="train", quantization="none", device="cpu", cache_dir=base_cache, progress=False
    )
    result = run(base, data, "dora", target_modules=["lm_head"], epochs=2.0)
    merge_adapter(
        str(folder), result.out, data.with_name("merged"), quantization="none", dtype="float32",
        cache_dir=base_cache, progress=False,
    )  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(data.with_name("merged"))
    assert torch.equal(merged.get_input_embeddings().weight, base.model.get_input_embeddings().weight)
    torch.testing.assert_close(logits(merged), settled[0], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("method", "damage", "message"),
    [
        ("dora", lambda tensors: tensors.popitem(), r"adapter_model\.safetensors lacks "),
        ("dora", lambda tensors: tensors.update(more=torch.ones(1)), "more in .* is not called for"),
        ("dora", lambda tensors: tensors.update({min(tensors): torch.ones(3, 3)}), "does not fit this base"),
        ("ia3", lambda tensors: next(iter(tensors.values())).fill_(float("nan")), "has NaN or infinity"),
        (
            "bitfit",
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(1)}),
            "is no bias of this base",
        ),
    ],
)
def test_a_damaged_folder_is_not_merged(
    method: str, damage: Any, message: str, base_of: BaseOf, data: Path, base_cache: Path
) -> None:
    base = base_of("none", ON.get(method, "llama"))
    result = run(base, data, method, max_steps=1)
    tensors = load_file(result.out / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, result.out / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapterError, match=message):
        merge_adapter(
            str(base.folder), result.out, data.with_name("merged"), quantization="none",
            cache_dir=base_cache, progress=False,
        )  # fmt: skip
    assert not data.with_name("merged").exists()


def test_the_manifest_names_the_base_of_what_no_server_applies(base_of: BaseOf, data: Path) -> None:
    base = base_of("nf4")
    bundle = read_bundle(run(base, data, "ia3", max_steps=2).out)
    assert bundle is not None
    assert bundle.base_fingerprint == base.fingerprint
    assert bundle.canary is None


# What is refused before anything is spent


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("bitfit", {}, r"method bitfit trains biases, and llama \(llama\) has none; use ia3"),
        ("lora", {"rank": 33}, r"rank is 33, but .*k_proj is 64→32: no update of it has a rank above 32"),
        ("lora", {"target_modules": ["q_prj"]}, "no linear module of this base; the nearest are q_proj"),
        (
            "lora",
            {"target_modules": ["embed_tokens"]},
            "embeddings and norms are trained by method full alone",
        ),
    ],
)
def test_what_cannot_be_trained_here(
    method: str, changes: dict[str, Any], message: str, base_of: BaseOf, tmp_path: Path
) -> None:
    """There are no data: it would be noticed if they were read first."""
    with pytest.raises(RecipeError, match=message):
        run(base_of("none"), tmp_path / "no-such-file", method, **changes)


def test_weights_that_are_trained_themselves_are_float32(
    base_of: BaseOf, data: Path, base_cache: Path
) -> None:
    rounded = load_base(
        str(base_of("none").folder), purpose="train", quantization="none", dtype="bfloat16", device="cpu",
        cache_dir=base_cache, progress=False,
    )  # fmt: skip
    with pytest.raises(RecipeError, match="load the base with dtype='float32'"):
        run(rounded, data, "full")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("method", "quantization"), [("qlora", "fp4"), ("lora_8bit", "int8"), ("full", "none")]
)
@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_on_cuda(method: str, quantization: Any, optimizer: Any, base_of: BaseOf, data: Path) -> None:
    recipe = recipe_for(data, method, base=str(base_of("none").folder), optimizer=optimizer, products="auto")
    result = train(recipe, progress=False)
    assert result.fit.final_loss < 0.75 * result.fit.losses[0].loss
