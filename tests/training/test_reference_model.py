"""Answers by transformers and PEFT: token by token what an unbatched loop says, and the base as it was."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters.base import Base, dequantized_base, load_base
from adapters.errors import AdapterError, InvalidAdapterError, UnsupportedAdapterError, WrongBaseError
from tests.models import MAX_CONTEXT, Architecture
from tests.training.bases import BaseOf, bases_in, digest, write_rows
from training.cases import Case, cases_of
from training.encoding import RowEncoder
from training.errors import EvaluationError
from training.methods import METHODS
from training.recipe import Recipe
from training.reference_loss import reference_losses
from training.reference_model import ReferenceModel
from training.rows import read_rows, turn
from training.train import train

NEW = 10
CASES = [
    *((method, "llama") for method in ("lora", "dora", "ia3", "prefix", "prompt")),
    *((method, "qwen2") for method in ("bitfit", "prefix")),
    *((method, "gemma3_text") for method in ("lora", "prefix", "prompt")),  # windows shorter than prompts
    *((method, "gpt2") for method in ("bitfit", "prompt")),  # learned positions, which end with the context
]
RATES = {"prefix": 0.3, "prompt": 0.3, "bitfit": 0.1, "ia3": 0.1}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> BaseOf:
    return bases_in(tmp_path_factory.mktemp("bases"), base_cache)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Questions of very different length, more than one batch of them."""
    rows = [{"prompt": "say " + "so " * (n * 5 % 17), "completion": "ok"} for n in range(20)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return cases_of(read_rows(path), source=path)


def trained(base: Base, folder: Path, method: str, **changes: Any) -> Path:
    """What two steps of training leave."""
    values: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "products": "float32"}
    if "rank" in METHODS[method].settings:
        values["rank"] = 4
    if "virtual_tokens" in METHODS[method].settings:
        values["virtual_tokens"] = 7
    values |= {"method": method, "quantization": base.quantization, "learning_rate": RATES.get(method, 0.05)}
    values |= {"data": write_rows(folder / "rows.jsonl"), "out": folder / method} | changes
    return train(Recipe.from_mapping(values, source="test"), base, progress=False).out


def oracle_of(base: Base, adapter: Path | None, cache: Path) -> Any:
    """The folder on plain float32 weights, by transformers and PEFT alone."""
    plain = dequantized_base(
        str(base.folder), quantization=base.quantization, cache_dir=cache, progress=False
    ).model
    if adapter is None:
        return plain
    if json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "BITFIT":
        plain.load_state_dict(load_file(adapter / "adapter_model.safetensors"), strict=False)
        return plain
    return PeftModel.from_pretrained(plain, adapter).eval()


@torch.no_grad()
def stepwise(model: Any, prompt: Sequence[int], ends: frozenset[int], count: int = NEW) -> list[int]:
    """Greedy, one prompt alone, everything computed anew for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def expected(base: Base, model: Any, cases: Sequence[Case], count: int = NEW) -> list[tuple[str, int, bool]]:
    encoder = RowEncoder(base.tokenizer, base.chat_template, base.eos_token_ids, base.max_context_tokens)
    found = []
    for case in cases:
        ids = stepwise(model, encoder.prompt_ids(case.messages), base.eos_token_ids, count)
        ended = ids[-1] in base.eos_token_ids
        text = base.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        found.append((text, len(ids), ended))
    return found


def answers(base: Base, adapter: Path | None, cases: Sequence[Case], count: int = NEW) -> list[Any]:
    found = ReferenceModel(base, adapter, count).answers(cases, progress=False)
    return [(answer.text, answer.tokens, answer.ended) for answer in found]


@pytest.mark.parametrize(("method", "architecture"), CASES)
def test_tokens_are_those_of_an_unbatched_loop(
    method: str,
    architecture: Architecture,
    base_of: BaseOf,
    cases: list[Case],
    tmp_path: Path,
    base_cache: Path,
) -> None:
    base = base_of("none", architecture)
    folder = trained(base, tmp_path, method)
    before = digest(base)
    found = answers(base, folder, cases)
    assert digest(base) == before
    assert found == expected(base, oracle_of(base, folder, base_cache), cases)
    assert found != answers(base, None, cases)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", ["loftq", "prompt"])
def test_on_a_quantised_base(
    method: str, quantization: Any, base_of: BaseOf, cases: list[Case], tmp_path: Path, base_cache: Path
) -> None:
    base = base_of(quantization)
    folder = trained(base, tmp_path, method)
    alone = answers(base, None, cases)
    before = digest(base)
    found = answers(base, folder, cases)
    assert digest(base) == before
    assert found != alone
    if quantization != "int8":  # whose layers round their input as well
        assert found == expected(base, oracle_of(base, folder, base_cache), cases)
    assert answers(base, None, cases) == alone


def test_a_whole_model_is_a_base(
    base_of: BaseOf, cases: list[Case], tmp_path: Path, base_cache: Path
) -> None:
    base = base_of("none")
    folder = trained(base, tmp_path, "full", learning_rate=0.01)
    own = load_base(
        str(folder), purpose="train", quantization="none", dtype="float32", cache_dir=base_cache,
        progress=False,
    )  # fmt: skip
    found = answers(own, None, cases)
    assert found == expected(own, AutoModelForCausalLM.from_pretrained(folder).eval(), cases)
    assert found != answers(base, None, cases)


def test_what_a_generation_configuration_asks_for_does_not_count(
    base_of: BaseOf, cases: list[Case], tmp_path: Path, base_cache: Path
) -> None:
    """A server knows of it which tokens end answers, and no more."""
    base = base_of("none")
    shutil.copytree(base.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "generation_config.json"
    penalised = {"repetition_penalty": 5.0, "do_sample": True, "top_k": 3, "max_new_tokens": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | penalised | {"eos_token_id": [2, 258]}))
    copy = load_base(
        str(tmp_path / "copy"), purpose="train", quantization="none", cache_dir=base_cache, progress=False
    )
    plain = oracle_of(base, None, base_cache)
    found = answers(copy, None, cases)
    assert found == expected(copy, plain, cases)
    assert copy.model.generation_config.repetition_penalty == 5.0


def test_answers_end_where_the_context_does(
    base_of: BaseOf, cases: list[Case], tmp_path: Path, base_cache: Path
) -> None:
    """On a base with learned positions, where a step too many would fail."""
    base = dataclasses.replace(base_of("none", "gpt2"), eos_token_ids=frozenset())
    longest = dataclasses.replace(cases[0], messages=(turn("user", "x" * (MAX_CONTEXT - 30)),))
    asked = [cases[0], longest, cases[1]]
    found = ReferenceModel(base, None, 40).answers(asked, progress=False)
    prompt = RowEncoder(base.tokenizer, base.chat_template, frozenset({2}), MAX_CONTEXT).prompt_ids(
        longest.messages
    )
    assert [answer.tokens for answer in found] == [40, MAX_CONTEXT - len(prompt), 40]
    assert not any(answer.ended for answer in found)
    assert found[0] == ReferenceModel(base, None, 40).answers(asked[:1], progress=False)[0]


def test_a_prompt_that_leaves_no_room_is_named(base_of: BaseOf, cases: list[Case], tmp_path: Path) -> None:
    base = base_of("none")
    folder = trained(base, tmp_path, "prompt")
    whole = dataclasses.replace(cases[3], messages=(turn("user", "x" * MAX_CONTEXT),))
    with pytest.raises(EvaluationError, match=r"line 4 has a prompt of 51\d tokens; .* holds 512"):
        answers(base, None, [cases[0], whole])
    virtual = dataclasses.replace(cases[3], messages=(turn("user", "x" * (MAX_CONTEXT - 8)),))
    with pytest.raises(EvaluationError, match=r"line 4 has .* tokens after 7 learned positions"):
        answers(base, folder, [virtual])


@pytest.mark.parametrize("method", ["dora", "ia3", "prefix", "prompt", "bitfit"])
def test_the_loss_is_that_of_what_was_trained(
    method: str, base_of: BaseOf, cases: list[Case], tmp_path: Path, base_cache: Path
) -> None:
    base = base_of("none", "qwen2")
    folder = trained(base, tmp_path, method)
    before = digest(base)
    found = reference_losses(base, folder, cases[:2], progress=False)
    assert digest(base) == before
    encoder = RowEncoder(base.tokenizer, base.chat_template, base.eos_token_ids, base.max_context_tokens)
    model = oracle_of(base, folder, base_cache)
    for loss, case in zip(found, cases, strict=False):
        prompt, answer = encoder.prompt_ids(case.messages), [*b"ok"]
        ids = torch.tensor([[*prompt, *base.tokenizer("ok")["input_ids"], encoder.end_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -len(answer) - 2 : -1].double()
        expected_nats = torch.nn.functional.cross_entropy(logits, ids[0, -len(answer) - 1 :], reduction="sum")
        assert loss.nats == pytest.approx(float(expected_nats), rel=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("method", "damage", "message"),
    [
        ("prefix", lambda tensors: tensors.update(more=torch.ones(1)), "must have prompt_embeddings alone"),
        (
            "prompt",
            lambda tensors: tensors.update(prompt_embeddings=torch.ones(3, 3)),
            r"prompt_embeddings is \(3, 3\), must be \(7, 64\)",
        ),
        ("prompt", lambda tensors: tensors["prompt_embeddings"].fill_(float("inf")), "has NaN or infinity"),
        ("ia3", lambda tensors: tensors.popitem(), r"adapter_model\.safetensors lacks "),
        ("bitfit", lambda tensors: tensors.update({"lm_head.weight": torch.ones(1)}), "is no bias"),
    ],
)
def test_a_damaged_folder_is_refused_and_the_base_as_it_was(
    method: str, damage: Any, message: str, base_of: BaseOf, cases: list[Case], tmp_path: Path
) -> None:
    base = base_of("none", "qwen2" if method == "bitfit" else "llama")
    folder = trained(base, tmp_path, method)
    before = digest(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapterError, match=message):
        answers(base, folder, cases)
    assert digest(base) == before


@pytest.mark.parametrize(
    ("method", "changes", "error", "message"),
    [
        ("prefix", {"prefix_projection": True}, UnsupportedAdapterError, "retrain without it"),
        ("prompt", {"num_virtual_tokens": 10**9}, InvalidAdapterError, "must be 1 to 4096"),
        ("prompt", {"num_virtual_tokens": True}, InvalidAdapterError, "must be 1 to 4096"),
        ("prompt", {"num_virtual_tokens": 8}, InvalidAdapterError, r"is \(7, 64\), must be \(8, 64\)"),
        ("dora", {"layer_replication": [[0, 1]]}, UnsupportedAdapterError, "layer_replication"),
        ("lora", {"auto_mapping": {"parent_library": "os"}}, UnsupportedAdapterError, "auto_mapping"),
    ],
)
def test_a_configuration_that_asks_for_more_is_refused(
    method: str,
    changes: dict[str, Any],
    error: type[AdapterError],
    message: str,
    base_of: BaseOf,
    cases: list[Case],
    tmp_path: Path,
) -> None:
    base = base_of("none")
    folder = trained(base, tmp_path, method)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(error, match=message):
        answers(base, folder, cases)


def test_a_folder_of_another_base_is_refused(base_of: BaseOf, cases: list[Case], tmp_path: Path) -> None:
    folder = trained(base_of("none"), tmp_path, "ia3")
    with pytest.raises(WrongBaseError, match="give the base and quantisation it was trained on"):
        answers(base_of("nf4"), folder, cases)
