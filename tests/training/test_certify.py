"""The merge certificate: a good merge passes, and every way of breaking one is told by it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.base import dequantized_model, load_base
from adapters.errors import BaseModelError
from quickchange.cli import main
from quickchange.commands.certify import CERTIFICATE_FILE, PAGE_FILE
from tests.adapters.builders import make_adapter
from tests.models import Architecture, build_tiny_model
from training.cases import Case
from training.certificate import Certificate, Distance, LayerError, Thresholds
from training.certify import certify
from training.merge import merge_adapter
from training.readers import Place
from training.reference_model import ReferenceModel
from training.rows import turn

ROWS = 8
LENIENT = Thresholds(agreement=0.97)
"""A random model has many tokens that are nearly tied: one of some 160 changes with rounding to bfloat16."""
LAYER = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("certify") / "tiny")


@pytest.fixture(scope="module")
def make(folder: Path, tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Callable[..., Path]:
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    place = tmp_path_factory.mktemp("adapters")

    def adapter(name: str, **options: Any) -> Path:
        return make_adapter(plain, place / name, target_modules="all-linear", **options)

    return adapter


@pytest.fixture(scope="module")
def adapter(make: Callable[..., Path]) -> Path:
    return make("right", seed=1)


@pytest.fixture(scope="module")
def cases(folder: Path, adapter: Path, base_cache: Path) -> list[Case]:
    """What the adapter answers, as reference answers: on these it gains a lot over the bare base."""
    base = load_base(
        str(folder), purpose="train", dtype="float32", device="cpu", cache_dir=base_cache, progress=False
    )
    asked = [Case(Place(n), (turn("user", f"What is {n}?"),), "") for n in range(1, ROWS + 1)]
    answers = ReferenceModel(base, adapter, 12).answers(asked, progress=False)
    return [
        replace(case, reference=answer.text or "none") for case, answer in zip(asked, answers, strict=True)
    ]


@pytest.fixture
def merged(folder: Path, adapter: Path, tmp_path: Path, base_cache: Path) -> Path:
    merge_adapter(str(folder), adapter, tmp_path / "merged", cache_dir=base_cache, progress=False)
    return tmp_path / "merged"


@pytest.fixture
def certified(
    folder: Path, adapter: Path, cases: list[Case], base_cache: Path
) -> Callable[[Path], Certificate]:
    def certified(merged: Path) -> Certificate:
        return certify(
            str(folder), adapter, merged, cases, thresholds=LENIENT, cache_dir=base_cache, progress=False
        )

    return certified


def change(merged: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = merged / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_good_merge_passes(merged: Path, certified: Callable[[Path], Certificate]) -> None:
    found = certified(merged)
    assert found.failures == []
    assert found.dtype == "bfloat16"
    assert 0 < found.merged.mean_kl <= found.merged.p99_kl <= found.merged.max_kl
    assert found.merged.mean_kl < found.bare.mean_kl / 100
    assert found.noise.mean_kl > 0
    assert found.recovered == pytest.approx(1.0, abs=0.02)
    assert found.perplexity_ratio == pytest.approx(1.0, abs=0.02)
    assert found.live_loss < found.bare.loss
    assert len(found.layers) == 14  # seven in each of two layers
    assert all(layer.of_weight < 2**-8 for layer in found.layers)  # bfloat16 has eight bits
    assert found.unchanged_error < 2**-8


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "gemma2"])
def test_weights_are_found_by_the_names_that_files_have(
    architecture: Architecture, tmp_path: Path, base_cache: Path
) -> None:
    """The head has another one there, or a weight lies transposed, or is the embedding's."""
    folder = build_tiny_model(tmp_path / "tiny", architecture)
    plain = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    adapter = make_adapter(plain, tmp_path / "adapter", target_modules="all-linear")
    options: dict[str, Any] = {"cache_dir": base_cache, "progress": False}
    merge_adapter(str(folder), adapter, tmp_path / "merged", dtype="float32", **options)
    case = Case(Place(1), (turn("user", "What is 1?"),), "one two three")
    found = certify(str(folder), adapter, tmp_path / "merged", [case], **options)
    assert found.unchanged_error == 0
    assert {layer.of_weight for layer in found.layers} == {0}


def test_float32_is_the_live_adapter(
    folder: Path, adapter: Path, tmp_path: Path, base_cache: Path, certified: Callable[[Path], Certificate]
) -> None:
    options: dict[str, Any] = {"dtype": "float32", "cache_dir": base_cache, "progress": False}
    merge_adapter(str(folder), adapter, tmp_path / "merged", **options)
    found = certified(tmp_path / "merged")
    assert found.merged.mean_kl < 1e-6  # float32 log-probabilities
    assert found.merged.agreement == 1.0
    assert found.greedy_matches == ROWS
    assert found.unchanged_error == 0.0


@pytest.mark.parametrize("into", ["original", "requantized"])
def test_other_targets_are_labelled_and_farther(
    into: str, folder: Path, adapter: Path, merged: Path, tmp_path: Path, base_cache: Path,
    certified: Callable[[Path], Certificate],
) -> None:  # fmt: skip
    """What training corrected of the base's quantisation is lost, or quantised away."""
    options: dict[str, Any] = {"into": into, "cache_dir": base_cache, "progress": False}
    merge_adapter(str(folder), adapter, tmp_path / "other", **options)
    found = certified(tmp_path / "other")
    assert found.into == into
    assert found.merged.mean_kl > 10 * certified(merged).merged.mean_kl
    assert not found.passed
    assert all(layer.of_weight < 2**-8 for layer in found.layers)  # it is what it says it is
    assert found.unchanged_error < 2**-8


# Broken merges


def test_a_wrong_scaling_fails(
    folder: Path, make: Callable[..., Path], adapter: Path, tmp_path: Path, base_cache: Path,
    certified: Callable[[Path], Certificate],
) -> None:  # fmt: skip
    doubled = make("doubled", seed=1)
    config = json.loads((doubled / "adapter_config.json").read_text())
    (doubled / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]})
    )
    merge_adapter(str(folder), doubled, tmp_path / "merged", cache_dir=base_cache, progress=False)
    found = certified(tmp_path / "merged")
    assert not found.passed
    assert all(layer.of_delta == pytest.approx(1.0, abs=0.05) for layer in found.layers)


def test_a_wrong_adapter_fails(
    folder: Path, make: Callable[..., Path], tmp_path: Path, base_cache: Path,
    certified: Callable[[Path], Certificate],
) -> None:  # fmt: skip
    merge_adapter(
        str(folder), make("wrong", seed=2), tmp_path / "merged", cache_dir=base_cache, progress=False
    )
    assert "recovered" in " ".join(certified(tmp_path / "merged").failures)


def test_a_skipped_layer_fails(
    folder: Path, merged: Path, base_cache: Path, certified: Callable[[Path], Certificate]
) -> None:
    base = dequantized_model(str(folder), cache_dir=base_cache, progress=False)
    weight = base.get_parameter(LAYER).detach().to(torch.bfloat16).clone()
    change(merged, lambda tensors: tensors.update({LAYER: weight}))
    found = certified(merged)
    assert not found.passed
    (skipped,) = [layer for layer in found.layers if layer.of_delta is not None and layer.of_delta > 0.5]
    assert skipped.name == LAYER


def test_a_base_in_another_order_fails(merged: Path, certified: Callable[[Path], Certificate]) -> None:
    """As a base's weight is that a processor's kernel has packed for itself, and that is read as if not."""
    change(
        merged,
        lambda tensors: tensors.update({LAYER: tensors[LAYER].view(-1, 2, 8).transpose(1, 2).reshape(
            tensors[LAYER].shape
        ).contiguous()}),
    )  # fmt: skip
    found = certified(merged)
    assert not found.passed
    assert max(found.layers, key=lambda layer: layer.of_weight).name == LAYER


def test_the_bare_base_fails(
    folder: Path, make: Callable[..., Path], tmp_path: Path, base_cache: Path,
    certified: Callable[[Path], Certificate],
) -> None:  # fmt: skip
    nothing = make("nothing", seed=3, strength=1e-6)
    merge_adapter(str(folder), nothing, tmp_path / "merged", cache_dir=base_cache, progress=False)
    assert any(
        "hardly nearer to the adapter" in failure for failure in certified(tmp_path / "merged").failures
    )


def test_another_template_fails(merged: Path, certified: Callable[[Path], Certificate]) -> None:
    template = merged / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ '!' }}")
    assert certified(merged).failures == ["its tokenizer or chat template turns rows into other tokens"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.update({LAYER: tensors[LAYER][:-1].clone()}), "cannot be loaded"),
        (lambda tensors: tensors.pop(LAYER), "q_proj"),
    ],
)
def test_what_is_no_model_is_refused(
    edit: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    merged: Path,
    certified: Callable[[Path], Certificate],
) -> None:
    change(merged, edit)
    with pytest.raises(BaseModelError, match=message):
        certified(merged)


# Verdicts

NEAR = Distance(mean_kl=1e-6, p99_kl=1e-5, max_kl=1e-4, max_logprob=0.1, agreement=0.999, loss=1.0)
FAR = Distance(mean_kl=1.0, p99_kl=2.0, max_kl=3.0, max_logprob=9.0, agreement=0.5, loss=3.0)


def certificate(**changes: Any) -> Certificate:
    facts: dict[str, Any] = {
        "adapter_digest": "sha256:1",
        "base": "tiny",
        "base_fingerprint": "sha256:2",
        "into": "dequantized",
        "dtype": "bfloat16",
        "rows": 2,
        "tokens": 9,
        "live_loss": 1.0,
        "merged": NEAR,
        "noise": NEAR,
        "bare": FAR,
        "greedy_matches": 2,
        "same_tokens": True,
        "layers": (LayerError(name="a", of_weight=1e-3, of_delta=1e-2),),
        "unchanged_error": 0.0,
        "thresholds": Thresholds(),
        "versions": {},
    }
    return Certificate(**(facts | changes))


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        (
            {"merged": replace(NEAR, mean_kl=1.1e-5)},
            "mean KL to the live adapter is 1.1e-05, 1e-05 is allowed",
        ),
        ({"merged": replace(NEAR, agreement=0.99)}, "the same at 99.00% of all tokens, 99.50% is needed"),
        ({"merged": replace(NEAR, loss=1.1)}, "95.0% of what the adapter gains in loss is recovered"),
        ({"bare": replace(FAR, mean_kl=9e-6)}, "hardly nearer to the adapter than the base is"),
        ({"same_tokens": False}, "its tokenizer or chat template"),
    ],
)
def test_each_limit(changes: dict[str, Any], failure: str) -> None:
    assert certificate().passed
    (found,) = certificate(**changes).failures
    assert failure in found


def test_an_adapter_that_gains_nothing_has_nothing_to_recover() -> None:
    found = certificate(bare=replace(FAR, loss=1.0))
    assert found.recovered is None
    assert found.passed


# The commands


def test_merge_certifies_what_it_wrote(
    folder: Path, adapter: Path, cases: list[Case], tmp_path: Path, base_cache: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("QUICKCHANGE_CACHE", str(base_cache))
    data = tmp_path / "held-out.jsonl"
    rows = ({"prompt": case.question, "completion": case.reference} for case in cases)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "merged"
    command = [
        "merge",
        "--base",
        str(folder),
        "--adapter",
        str(adapter),
        "--out",
        str(out),
        "--data",
        str(data),
    ]
    assert main([*command, "--dtype", "float32", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["certificate"] == json.loads((out / CERTIFICATE_FILE).read_text())
    assert said["certificate"]["passed"]
    assert "Merge certificate: passed" in (out / PAGE_FILE).read_text()

    strict = ["certify", *command[1:5], "--merged", str(out), "--data", str(data), "--agreement", "1.1"]
    assert main(strict) == 1
    assert "failed: the likeliest token is the same at" in capfd.readouterr().out
    assert "FAILED" in (out / PAGE_FILE).read_text()
