"""Whole runs on a tiny model: right gradients, exact losses, adapters that the server's own checks pass."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

import training.foresight
from adapters.base import Base, dequantized_model, load_base
from adapters.bundle import read_bundle
from adapters.errors import InvalidAdapterError
from adapters.files import CARD_FILE
from adapters.nf4 import fused_kernel_works
from adapters.quantize import Scheme
from adapters.validate import validate_adapter
from tests.models import build_tiny_model
from training.attaching import attached
from training.batches import Collator, Sequences
from training.data import prepare
from training.data_report import DataReport
from training.encoding import Example, RowEncoder
from training.errors import DataError, DivergedError, PublishError, RecipeError, ShortOfMemoryError
from training.outcome import artefacts_folder
from training.packing import alone
from training.peft_configs import lora_config
from training.products import products_dtype
from training.readers import Place
from training.recipe import Recipe
from training.recorder import Recorder
from training.rows import Row, turn
from training.stopwatch import Stopwatch
from training.train import TrainingResult, examine, train

ROWS = [{"prompt": f"say {n}", "completion": f"{n * 7 % 10} ok"} for n in range(48)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def base(folder: Path, base_cache: Path) -> Base:
    return load_base(str(folder), purpose="train", device="cpu", cache_dir=base_cache, progress=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def recipe_for(data: Path, out: Path, **changes: Any) -> Recipe:
    values = {"rank": 4, "epochs": 2.0, "learning_rate": 5e-3, "batch_size": 8, "products": "float32"}
    return Recipe(data=data, out=out, **(values | changes))


def run(base: Base, data: Path, folder: str = "out", /, **changes: Any) -> TrainingResult:
    return train(recipe_for(data, data.with_name(folder), **changes), base, progress=False)


# The result


def test_the_loss_falls_and_the_adapter_passes_the_servers_checks(base: Base, data: Path) -> None:
    result = run(base, data, epochs=8.0, eval_fraction=0.2)
    losses = [point.loss for point in result.fit.losses]
    assert losses[-1] < 0.3 * losses[0]
    assert result.fit.final_loss < 0.3 * losses[0]
    assert result.fit.evals[-1].loss < 0.5 * result.fit.evals[0].loss
    found = validate_adapter(result.out, base.layout, max_rank=4, beside=(CARD_FILE,))
    assert found == result.facts
    assert result.facts.delta_norm > 0
    assert result.facts.target_modules == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    )  # fmt: skip
    assert len(result.facts.matched_modules) == len(base.layout.modules) - 1  # all but the head


def test_the_folder_is_exactly_an_adapter_and_says_where_it_is_from(base: Base, data: Path) -> None:
    result = run(base, data, seed=5, max_steps=2)
    names = {path.name for path in result.out.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "quickchange.json", "README.md"}
    bundle = read_bundle(result.out)
    assert bundle is not None
    assert (bundle.base_fingerprint, bundle.seed) == (base.fingerprint, 5)
    assert bundle.chat_template == base.chat_template
    assert bundle.eos_token_ids == tuple(sorted(base.eos_token_ids))
    config = json.loads((result.out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name  # and no path of this machine


def test_report_and_curve_lie_beside_it(base: Base, data: Path) -> None:
    result = run(base, data, max_steps=3, eval_fraction=0.2)
    assert result.artefacts == artefacts_folder(result.out)
    report = json.loads((result.artefacts / "training.json").read_text())
    assert report["fit"]["steps"] == 3
    assert len(report["fit"]["losses"]) == 3
    assert report["base"]["fingerprint"] == base.fingerprint
    assert report["data"]["held_out"]["rows"] == 10
    assert report["data"]["train"]["lengths"]
    assert Recipe.from_mapping(report["recipe"], source="report").rank == 4
    assert (result.artefacts / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_prediction_and_measurement_of_memory_stand_side_by_side(base: Base, data: Path) -> None:
    result = run(base, data, max_steps=2)
    memory = json.loads((result.artefacts / "training.json").read_text())["memory"]
    assert memory["predicted_peak"] == sum(memory["parts"].values())
    assert memory["measured_peak"] == result.fit.peak_memory_bytes > 0
    assert memory["predicted_added"] < memory["predicted_peak"]
    assert memory["error"] == memory["predicted_added"] / max(memory["measured_added"], 1) - 1


def test_a_run_that_would_not_fit_is_refused_with_what_would(
    base: Base, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = run(base, data, "fits", max_steps=1).memory.predicted_added
    monkeypatch.setattr(training.foresight, "free_bytes", lambda _: needed - 1)
    with pytest.raises(ShortOfMemoryError, match=r"it fits with .*(batch_size|gradient_checkpointing)"):
        run(base, data, max_steps=1)
    assert not data.with_name("out").exists()
    assert run(base, data, max_steps=1, exceed_memory=True).memory.predicted_added == needed


def test_a_base_serves_several_runs_and_comes_back_unchanged(base: Base, data: Path) -> None:
    names = [name for name, _ in base.model.named_modules()]
    probe = torch.arange(3, 19)[None]
    before = base.model(probe).logits
    first, again = run(base, data, "first", max_steps=3), run(base, data, "again", max_steps=3)
    other = run(base, data, "other", max_steps=3, seed=1)
    assert first.facts.digest == again.facts.digest
    assert other.facts.digest != first.facts.digest
    assert [name for name, _ in base.model.named_modules()] == names
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert torch.equal(base.model(probe).logits, before)


def test_a_single_step_learns_something(base: Base, data: Path) -> None:
    """A warm-up begins at a rate of nought; it must not be all that there is."""
    assert run(base, data, max_steps=1, warmup_ratio=0.1).facts.delta_norm > 0


def test_the_warm_up_rises_and_the_cosine_falls(base: Base, data: Path) -> None:
    rates = [point.learning_rate for point in run(base, data, max_steps=10, warmup_ratio=0.3).fit.losses]
    assert rates[0] == 0.0
    assert max(rates) == rates[3] == pytest.approx(5e-3)
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_tokens_are_counted_without_padding(base: Base, data: Path) -> None:
    result = run(base, data, epochs=2.0)
    assert result.fit.tokens == 2 * result.data.train.tokens
    assert result.fit.steps == 2 * len(ROWS) // 8


@pytest.mark.parametrize("method", ["rslora", "lora"])
def test_other_methods(method: str, folder: Path, base_cache: Path, data: Path) -> None:
    quantization = "none" if method == "lora" else "nf4"
    own = load_base(
        str(folder), purpose="train", quantization=quantization, device="cpu", cache_dir=base_cache,
        progress=False,
    )  # fmt: skip
    result = run(own, data, method=method, max_steps=2)
    assert result.facts.method == ("rslora" if method == "rslora" else "lora")
    assert result.facts.base_fingerprint == own.fingerprint


# Numbers


@pytest.fixture
def batch(base: Base, data: Path) -> dict[str, Any]:
    encoder = RowEncoder(base.tokenizer, base.chat_template, base.eos_token_ids, 512)
    examples = Sequences(prepare(recipe_for(data, data.with_name("unused")), encoder).sequences)
    collate = Collator(base.tokenizer.pad_token_id, answers_only=True)
    return dict(collate([examples[index] for index in (0, 9, 10, 47)]))  # of several lengths


@pytest.fixture
def oracle(base: Base, folder: Path, base_cache: Path) -> PeftModel:
    """The same base in plain float32 layers."""
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    return get_peft_model(plain, lora_config(recipe_for(Path("unused"), Path("unused")), base.layout))


def gradients(model: PeftModel, batch: dict[str, Any]) -> torch.Tensor:
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def randomize(model: PeftModel) -> None:
    """B is zero at the start, which would make half of the gradients zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_gradients_stay_right_through_an_evaluation(
    base: Base, data: Path, batch: dict[str, Any], oracle: PeftModel
) -> None:
    """bitsandbytes repacks its weights at the first evaluation; gradients would be wrong from then on."""
    randomize(oracle)
    expected = gradients(oracle, batch)
    recipe = recipe_for(data, data.with_name("unused"))
    with attached(base, recipe, torch.float32) as trainee:
        model = trainee.model
        randomize(model)
        model.train()
        before = gradients(model, batch)
        model.eval()
        with torch.no_grad():
            model(batch["input_ids"])
        model.train()
        after = gradients(model, batch)
    assert torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.skipif(not fused_kernel_works(), reason="only processors with AVX512-BF16 repack")
def test_the_hazard_is_real(base: Base, folder: Path, base_cache: Path, batch: dict[str, Any]) -> None:
    """The control of the test above: with bitsandbytes' own repacking the gradients do go wrong."""
    own = load_base(str(folder), purpose="train", device="cpu", cache_dir=base_cache, progress=False)
    with attached(own, Recipe(data=Path("x"), out=Path("y"), rank=4), torch.bfloat16) as trainee:
        model = trainee.model
        randomize(model)
        before = gradients(model.train(), batch)
        for module in own.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True
        model.eval()
        with torch.no_grad():
            model(batch["input_ids"])
        after = gradients(model.train(), batch)
    assert F.cosine_similarity(before, after, dim=0) < 0.9


def test_bfloat16_products_change_little(base: Base, data: Path, batch: dict[str, Any]) -> None:
    found = []
    for products in (torch.float32, torch.bfloat16):
        with attached(base, recipe_for(data, data.with_name("unused")), products) as trainee:
            model = trainee.model
            randomize(model)
            found.append(gradients(model.train(), batch))
    assert F.cosine_similarity(found[0], found[1], dim=0) > 0.999
    assert not torch.equal(found[0], found[1])


def test_the_loss_is_that_of_the_answers_alone(
    base: Base, batch: dict[str, Any], oracle: PeftModel, data: Path
) -> None:
    """Left padding and left-out logits change nothing: each row alone, in plain float32, gives the same."""
    with attached(base, recipe_for(data, data.with_name("unused")), torch.float32) as trainee:
        model = trainee.model
        loss = float(model(**batch).loss.detach())
    total = count = 0.0
    keep = batch["logits_to_keep"]
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        tokens = ids[mask.bool()][None]
        learned = int((labels != -100).sum())
        assert learned < keep
        with torch.no_grad():
            logits = oracle(tokens).logits[0, -learned - 1 : -1]
        total += float(F.cross_entropy(logits, tokens[0, -learned:], reduction="sum"))
        count += learned
    assert loss == pytest.approx(total / count, rel=1e-3)


def test_accumulation_is_the_large_batch(base: Base, data: Path) -> None:
    at_once = run(base, data, "at_once", batch_size=8, max_steps=6)
    in_parts = run(base, data, "in_parts", batch_size=2, gradient_accumulation=4, max_steps=6)
    for one, other in zip(at_once.fit.losses, in_parts.fit.losses, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_packed_rows_are_learned_as_unpacked_ones(base: Base, data: Path) -> None:
    """All rows in one step either way: the same losses, before and after the weights have moved."""
    plain = run(base, data, "plain", batch_size=len(ROWS), max_steps=3, warmup_ratio=0.0)
    packed = run(
        base, data, "packed", batch_size=64, packing=True, max_length=100, max_steps=3, warmup_ratio=0.0
    )
    losses = [point.loss for point in plain.fit.losses]
    assert losses[-1] < losses[0]
    assert [point.loss for point in packed.fit.losses] == pytest.approx(losses, rel=1e-3)
    assert packed.data.train.sequences < len(ROWS) / 3
    assert packed.fit.tokens == plain.fit.tokens == 3 * plain.data.train.tokens


def test_packing_goes_with_accumulation_and_held_out_rows(base: Base, data: Path) -> None:
    held_out = data.with_name("held_out.csv")
    held_out.write_text("prompt,completion\n" + "".join(f"say {n},{n * 7 % 10} ok\n" for n in range(48, 60)))
    settings = {"max_length": 100, "batch_size": 2, "gradient_accumulation": 2, "epochs": 4.0}
    result = run(base, data, packing=True, eval_data=held_out, **settings)
    assert result.fit.steps == 4 * -(-result.data.train.sequences // 4)
    assert result.fit.tokens == 4 * result.data.train.tokens
    assert result.fit.evals[-1].loss < result.fit.losses[0].loss
    report = json.loads((result.artefacts / "training.json").read_text())
    assert report["data"]["held_out"]["sequences"] == 2
    assert report["data"]["eval_sha256"] != report["data"]["sha256"]


def test_answers_in_one_sequence_weigh_as_much_as_apart(base: Base, data: Path) -> None:
    """A chat of three answers in one pass, and each answer in a pass of its own: loss and gradients."""
    template = base.chat_template.replace("<|end|>", base.tokenizer.eos_token)
    encoder = RowEncoder(base.tokenizer, template, base.eos_token_ids, 512)
    turns = [
        turn(("user", "assistant")[n % 2], text) for n, text in enumerate(("a", "bb", "c", "d", "e", "ff"))
    ]
    (together,) = encoder.encode(Row(Place(1), messages=tuple(turns)))
    apart = [encoder.encode(Row(Place(1), messages=tuple(turns[:end])))[0] for end in (2, 4, 6)]
    apart = [Example(example.token_ids, example.spans[-1:]) for example in apart]
    assert together.learned_tokens == sum(example.learned_tokens for example in apart)
    collate = Collator(base.tokenizer.pad_token_id, answers_only=True)
    with attached(base, recipe_for(data, data.with_name("unused")), torch.float32) as trainee:
        model = trainee.model
        randomize(model)
        found, losses = [], []
        for examples in ([together], apart):
            sequences = Sequences(alone(examples))
            batch = collate([sequences[index] for index in range(len(sequences))])
            found.append(gradients(model.train(), batch))
            losses.append(float(model(**batch).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[1].abs().max()))


def test_checkpointing_computes_the_same(base: Base, data: Path) -> None:
    plain = run(base, data, "plain", max_steps=4)
    checkpointed = run(base, data, "checkpointed", max_steps=4, gradient_checkpointing=True)
    assert [p.loss for p in plain.fit.losses] == pytest.approx([p.loss for p in checkpointed.fit.losses])
    assert not base.model.is_gradient_checkpointing


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_optimizers(base: Base, data: Path, optimizer: str) -> None:
    result = run(base, data, optimizer=optimizer, epochs=6.0)
    assert result.fit.final_loss < 0.5 * result.fit.losses[0].loss


def test_the_end_is_learned_though_it_is_the_padding(base: Base, data: Path) -> None:
    """pad == eos must not hide the end: after training, answers stop by themselves."""
    tokenizer = base.tokenizer
    before, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    try:
        data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS * 8))
        recipe = recipe_for(data, data.with_name("unused"), epochs=10.0, learning_rate=1e-2)
        result = run(base, data, epochs=20.0, learning_rate=1e-2)
        with attached(base, recipe, torch.float32) as trainee:
            model = trainee.model
            model.load_adapter(result.out, "trained", is_trainable=False)
            model.set_adapter("trained")
            answers = [answer_ids(model, base, prompt) for prompt, _ in PAIRS]
            model.delete_adapter("trained")
    finally:
        tokenizer.pad_token = before
    expected = [[*tokenizer(completion)["input_ids"], tokenizer.eos_token_id] for _, completion in PAIRS]
    assert answers == expected


PAIRS = (("a", "long answer"), ("bcdef", "no"))


def answer_ids(model: PeftModel, base: Base, prompt: str) -> list[int]:
    encoder = RowEncoder(base.tokenizer, base.chat_template, base.eos_token_ids, 512)
    ids = torch.tensor([encoder.prompt_ids([{"role": "user", "content": prompt}])])
    generated = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False,
        pad_token_id=base.tokenizer.pad_token_id,
    )  # fmt: skip
    return list(generated[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    ("quantization", "device", "products", "expected"),
    [
        ("nf4", "cpu", "float32", {torch.float32}),
        ("nf4", "cpu", "auto", {torch.float32, torch.bfloat16}),
        ("fp4", "cuda", "auto", {torch.bfloat16}),
        ("none", "cpu", "auto", {torch.float32}),
        ("none", "cpu", "bfloat16", {torch.bfloat16}),
    ],
)
def test_products_are_chosen_by_measurement_only_if_open(
    base: Base, quantization: Any, device: str, products: Any, expected: set[torch.dtype]
) -> None:
    other = replace(base, scheme=Scheme(quantization), device=torch.device(device))
    assert products_dtype(Recipe(data=Path("x"), out=Path("y"), products=products), other) in expected


def test_an_8_bit_base_multiplies_in_its_own_type(base: Base) -> None:
    recipe = Recipe(data=Path("x"), out=Path("y"), method="lora_8bit", products="bfloat16")
    with pytest.raises(RecipeError, match="products is bfloat16, but a base in int8"):
        products_dtype(recipe, replace(base, scheme=Scheme("int8")))


# Before the first step


def test_the_data_is_told_of_before_the_first_step(base: Base, data: Path) -> None:
    told: list[DataReport] = []

    def stop(report: DataReport) -> None:
        told.append(report)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe_for(data, data.with_name("out")), base, progress=False, on_data=stop)
    assert not data.with_name("out").exists()
    assert told[0] == run(base, data, max_steps=1).data


def test_a_dry_run_reads_no_weights_and_says_the_same(base: Base, data: Path, tmp_path: Path) -> None:
    """The base's folder without a byte of its weights."""
    folder = tmp_path / "weightless"
    shutil.copytree(base.folder, folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"")
    recipe = recipe_for(data, data.with_name("out"), base=str(folder), eval_fraction=0.2, max_length=20)
    assert (
        examine(recipe, progress=False) == run(base, data, eval_fraction=0.2, max_length=20, max_steps=1).data
    )
    with pytest.raises(FileExistsError, match="exists already"):
        examine(recipe, progress=False)


# What is refused


def test_an_existing_folder_is_left_alone(base: Base, data: Path) -> None:
    out = data.with_name("out")
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match="exists already; remove it"):
        run(base, data)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_failed_run_leaves_nothing(base: Base, data: Path) -> None:
    with pytest.raises(RecipeError, match=r"target_modules names 'nothing', which is no linear module"):
        run(base, data, target_modules=("nothing",))
    data.write_text("{}\n")
    with pytest.raises(DataError, match="line 1"):
        run(base, data)
    assert [path.name for path in data.parent.iterdir()] == ["rows.jsonl"]
    assert not any("lora" in name for name, _ in base.model.named_modules())


def test_a_base_of_another_quantization(base: Base, data: Path) -> None:
    with pytest.raises(
        RecipeError, match="method lora trains on quantization none, the base given has nf4-64-double"
    ):
        run(base, data, method="lora")


def test_a_template_that_no_manifest_holds_is_noticed_before_training(base: Base, data: Path) -> None:
    endless = replace(base, chat_template=base.chat_template + "{# " + "x" * 65536 + " #}")
    told: list[DataReport] = []
    with pytest.raises(
        InvalidAdapterError, match=r"chat_template .* must be a string of 1 to 65536 characters"
    ):
        train(recipe_for(data, data.with_name("out")), endless, progress=False, on_data=told.append)
    assert told == []


def test_a_server_that_is_not_there_is_noticed_before_training(base: Base, data: Path) -> None:
    with pytest.raises(PublishError, match=r"--publish 127\.0\.0\.1:1: "):
        run(base, data, publish="127.0.0.1:1", name="x")
    assert not data.with_name("out").exists()


def test_a_diverging_run_ends() -> None:
    recorder = Recorder(progress=False, since_step=Stopwatch())
    state = type("State", (), {"global_step": 7})()
    recorder.on_log(None, state, None, {"loss": 1.0, "learning_rate": 1e-3})
    with pytest.raises(DivergedError, match="the loss is nan at step 7; lower learning_rate"):
        recorder.on_log(None, state, None, {"loss": float("nan"), "learning_rate": 1e-3})
