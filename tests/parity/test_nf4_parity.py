"""NF4: the served model against bitsandbytes' own Linear4bit with PEFT, on SmolLM2 and tiny models.

Each form of serving against the oracle that computes as it does: native code against exact float32 products;
torch with bitsandbytes' fused kernel against the same kernel.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import Base, load_base
from adapters.nf4 import fused_kernel_works
from server.batch import Batch, Row
from server.request import Request, SamplingParams
from server.sequence import Sequence
from tests.bench.adapters import write_random_adapter
from tests.kernels.conditions import KERNELS, PRECISIONS
from tests.models import ARCHITECTURES, FAMILIES, Family, build_tiny_model
from tests.parity.harness import Ask, Harness

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a",
    "12 + 30 = ",
]


@dataclass(frozen=True)
class Form:
    """A way to serve, and how far it may be from the oracle: norm of the difference over norm of the logits.

    Products are the same; sums are in another order. Storing keys, values, adapters and the head in bfloat16
    rounds them once: 0.003 to 0.017. Products of medium precision round every activation and NF4 value: 0.008
    to 0.042. (bitsandbytes' fused kernel, which rounds scales and results too: 0.02 to 0.07.)
    """

    kernels: str
    dtype: str
    precision: str
    exact_oracle: bool
    tolerance: float


FORMS = {
    "native float32": Form("native", "float32", "highest", True, 2e-5),
    "native": Form("native", "auto", "highest", True, 0.02),
    "native medium": Form("native", "auto", "medium", True, 0.05),
    "torch": Form("torch", "auto", "auto", False, 1e-3),
}


def works_here(form: Form) -> bool:
    return form.kernels in KERNELS and form.precision in ("auto", *PRECISIONS)


@dataclass
class Pair:
    """The served model and the oracle, on one NF4 base."""

    form: Form
    base: Base
    harness: Harness
    oracle: Any


CASES = [
    (base, name)
    for base in ("smollm2", *ARCHITECTURES)
    for name, form in FORMS.items()
    if works_here(form) and (base == "smollm2" or form.dtype == "float32")
]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, form = request.param[0], FORMS[request.param[1]]
    root = tmp_path_factory.mktemp("nf4")
    family = FAMILIES.get(name, Family("llama", layers=30))
    tiny = name in FAMILIES
    source = str(build_tiny_model(root / "base", name)) if tiny else name
    cache = request.getfixturevalue("base_cache" if tiny else "smollm2_cache")
    options: dict[str, Any] = {"device": "cpu", "cache_dir": cache, "progress": False}
    chosen: dict[str, Any] = {"kernels": form.kernels, "matmul_precision": form.precision}
    base = load_base(source, dtype=form.dtype, **chosen, **options)  # type: ignore[arg-type]
    adapters = {
        name: write_random_adapter(root / name, base.layout, rank=8, seed=i) for i, name in enumerate("ab")
    }
    harness = Harness(base, root / "store", adapters, max_context_tokens=256)
    assert harness.core.runner.fused_layers == (
        family.layers if family.fused and form.kernels == "native" else 0
    )
    yield Pair(form, base, harness, oracle_of(source, adapters, form, options))
    harness.close()


def oracle_of(source: str, adapters: dict[str, Path], form: Form, options: dict[str, Any]) -> Any:
    dtype: Any = "float32" if form.exact_oracle else "auto"
    train = load_base(source, purpose="train", dtype=dtype, **options)
    oracle: Any = PeftModel.from_pretrained(train.model, adapters["a"], adapter_name="a")
    oracle.load_adapter(adapters["b"], adapter_name="b")
    for module in oracle.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # this copy of the base only evaluates
            module.support_avx512bf16_for_cpu = fused_kernel_works() and not form.exact_oracle
    return oracle.eval()


@torch.inference_mode()
def oracle_logits(pair: Pair, prompt: tuple[int, ...], adapter: str) -> Tensor:
    """Of the prompt's last token, [vocabulary]."""
    with nullcontext() if adapter else pair.oracle.disable_adapter():
        pair.oracle.set_adapter(adapter or "a")
        logits: Tensor = pair.oracle(input_ids=torch.tensor([prompt])).logits[0, -1].float()
    return logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / (b - b.mean()).norm())


def asks_of(pair: Pair) -> list[tuple[tuple[int, ...], str]]:
    prompts = [tuple(pair.base.tokenizer(text)["input_ids"]) for text in PROMPTS]
    return [(prompt, adapter) for prompt in prompts for adapter in ("", "a", "b")]


def test_base_and_adapters_differ(pair: Pair) -> None:
    (prompt, _), *_ = asks_of(pair)
    base, a, b = (oracle_logits(pair, prompt, name) for name in ("", "a", "b"))
    assert min(distance(a, base), distance(b, base), distance(a, b)) > 2 * pair.form.tolerance


def test_mixed_requests_have_the_oracles_top_token_and_logprobs(pair: Pair) -> None:
    sampling = SamplingParams(max_new_tokens=1, logprobs=20)
    asks = asks_of(pair)
    pair.harness.run([Ask((1, 2, 3), name, 1) for name in "ab"])  # resident, so that all share a step
    answers = pair.harness.run([Ask(prompt, adapter, sampling=sampling) for prompt, adapter in asks])
    assert pair.harness.core.counters.max_adapters_in_step == 2
    for (prompt, adapter), answer in zip(asks, answers, strict=True):
        logits = oracle_logits(pair, prompt, adapter)
        assert answer.token_ids[0] == int(logits.argmax()), (prompt, adapter)
        expected = torch.log_softmax(logits, 0)
        for token, logprob in answer.logprobs[0].alternatives:
            assert abs(logprob - float(expected[token])) < max(0.1, 4 * pair.form.tolerance)


@pytest.mark.parametrize("adapter", ["", "a", "b"])
def test_logits_are_within_the_tolerance(pair: Pair, adapter: str) -> None:
    runner = pair.harness.core.runner
    if adapter:  # make it resident
        pair.harness.run([Ask((1, 2, 3), adapter, 1)])
    digest = pair.harness.identities[adapter].digest if adapter else None
    slot = pair.harness.core.residency.acquire(digest) if digest else 0
    assert slot is not None
    for prompt in [prompt for prompt, name in asks_of(pair) if name == adapter]:
        sequence = Sequence(Request("x", prompt, SamplingParams()), len(prompt) + 1, 0.0)
        sequence.blocks, sequence.slot = list(range(4)), slot
        ours = runner.run(Batch((Row(sequence, 0, len(prompt)),)))[0]
        assert distance(ours, oracle_logits(pair, prompt, adapter)) < pair.form.tolerance
    if digest:
        pair.harness.core.residency.release(digest)
