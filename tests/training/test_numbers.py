"""What a run computes: right gradients, exact losses, the same however rows are batched."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

from adapters.base import Base, dequantized_model, load_base
from adapters.nf4 import fused_kernel_works
from adapters.quantize import Scheme
from tests.training.bases import ROWS
from tests.training.runs import recipe_for, run
from training.attaching import attached
from training.batches import Collator, Sequences
from training.data import prepare
from training.encoding import Example, RowEncoder
from training.errors import RecipeError
from training.packing import alone
from training.peft_configs import lora_config
from training.products import products_dtype
from training.readers import Place
from training.recipe import Recipe
from training.rows import Row, turn


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


def test_each_learned_token_weighs_the_same_where_like_lengths_share_a_step(
    base: Base, tmp_path: Path
) -> None:
    """Long and short answers apart or together: a model that hardly changes has the same mean loss."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"say {n}", "completion": "ok " * (1 + 3 * (n % 8))} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mean_loss(rows_per_step: int) -> float:
        changes = {"share_prefixes": False, "learning_rate": 1e-8, "epochs": 1.0}
        result = run(base, data, f"out{rows_per_step}", batch_size=rows_per_step, **changes)
        steps = result.fit.losses
        assert len(steps) == len(rows) // rows_per_step
        return sum(step.loss for step in steps) / len(steps)

    assert mean_loss(2) == pytest.approx(mean_loss(16), rel=1e-5)


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
