"""PEFT on the same NF4 base, as a program of its own: one request after another, or as one mixed batch.

Reads jobs, a line of JSON each, from standard input; writes what it measured as a line each. So neither
side's threads or packed weights touch the other, and the base is loaded once.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from adapters.base import load_base
from adapters.nf4 import fused_kernel_works

BASE = "__base__"  # PEFT's own name for rows without an adapter


class Moments(StoppingCriteria):  # type: ignore[misc]  # transformers is not followed by mypy
    """Notes when each token was there; never stops anything."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.seconds.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def load(job: dict[str, Any]) -> PeftModel:
    """The base with all adapters."""
    base = load_base(job["base"], purpose="train", device=job["device"], progress=False)
    fused = fused_kernel_works()
    for module in base.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its fastest form: this process only evaluates
            module.support_avx512bf16_for_cpu = fused
    (first, folder), *others = job["adapters"].items()
    model = PeftModel.from_pretrained(base.model, Path(folder), adapter_name=first)
    for name, path in others:
        model.load_adapter(Path(path), adapter_name=name)
    return model.eval()


def one_by_one(model: PeftModel, requests: Sequence[dict[str, Any]], new_tokens: int) -> list[list[float]]:
    """`set_adapter`, then `generate`, for each request. Moments of each: its begin, then every token."""
    moments = []
    for request in requests:
        began_s = time.perf_counter()
        model.set_adapter(request["adapter"])
        moments.append([began_s, *_generate(model, [request["prompt"]], new_tokens)])
    return moments


def mixed_batch(model: PeftModel, requests: Sequence[dict[str, Any]], new_tokens: int) -> list[list[float]]:
    """All requests as one batch with `adapter_names`; prompts are of one length, so nothing is padded."""
    names = [request["adapter"] or BASE for request in requests]
    began_s = time.perf_counter()
    seconds = _generate(model, [request["prompt"] for request in requests], new_tokens, adapter_names=names)
    return [[began_s, *seconds]] * len(requests)


WAYS = {"set_adapter": one_by_one, "mixed batch": mixed_batch}


@torch.inference_mode()
def _generate(
    model: PeftModel, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
) -> list[float]:
    ids = torch.tensor(prompts, device=model.device)
    moments = Moments()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([moments]),
        **options,
    )
    return moments.seconds


def main() -> None:
    model = load(json.loads(sys.stdin.readline()))
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        began_s = time.perf_counter()
        moments = WAYS[job["way"]](model, job["requests"], job["new_tokens"])
        seconds = time.perf_counter() - began_s
        print(json.dumps({"seconds": seconds, "moments": moments}), flush=True)


if __name__ == "__main__":
    main()
