"""NF4: the served model against bitsandbytes' own Linear4bit with PEFT, on SmolLM2.

The oracle evaluates as bitsandbytes does by default, with its fused kernel where the processor has one.
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
from tests.parity.harness import Ask, Harness

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a",
    "12 + 30 = ",
]
RELATIVE_TOLERANCE = 1e-3
"""Norm of the difference over norm of the centred logits. Products are the same; attention adds up in another
order. (The distance of either to exact float32 products is 0.02 to 0.07: bfloat16 keeps 8 bits.)"""


@dataclass
class Pair:
    """The served model and the oracle, on one NF4 base."""

    base: Base
    harness: Harness
    oracle: Any


@pytest.fixture(scope="module")
def pair(smollm2_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("nf4")
    base = load_base("smollm2", device="cpu", cache_dir=smollm2_cache, progress=False)
    adapters = {
        name: write_random_adapter(root / name, base.layout, rank=8, seed=i) for i, name in enumerate("ab")
    }
    train = load_base("smollm2", purpose="train", device="cpu", cache_dir=smollm2_cache, progress=False)
    oracle: Any = PeftModel.from_pretrained(train.model, adapters["a"], adapter_name="a")
    oracle.load_adapter(adapters["b"], adapter_name="b")
    for module in oracle.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # this copy of the base only evaluates
            module.support_avx512bf16_for_cpu = fused_kernel_works()
    harness = Harness(base, root / "store", adapters, max_context_tokens=256)
    yield Pair(base, harness, oracle.eval())
    harness.close()


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
    assert min(distance(a, base), distance(b, base), distance(a, b)) > 100 * RELATIVE_TOLERANCE


def test_mixed_requests_have_the_oracles_top_token_and_logprobs(pair: Pair) -> None:
    sampling = SamplingParams(max_new_tokens=1, logprobs=20)
    asks = asks_of(pair)
    answers = pair.harness.run([Ask(prompt, adapter, sampling=sampling) for prompt, adapter in asks])
    assert pair.harness.core.counters.max_adapters_in_step == 2
    for (prompt, adapter), answer in zip(asks, answers, strict=True):
        logits = oracle_logits(pair, prompt, adapter)
        assert answer.token_ids[0] == int(logits.argmax()), (prompt, adapter)
        expected = torch.log_softmax(logits, 0)
        for token, logprob in answer.logprobs[0].alternatives:
            assert abs(logprob - float(expected[token])) < 0.05


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
        assert distance(ours, oracle_logits(pair, prompt, adapter)) < RELATIVE_TOLERANCE
    if digest:
        pair.harness.core.residency.release(digest)
