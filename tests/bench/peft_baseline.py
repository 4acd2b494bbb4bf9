"""The same work by PEFT on the same NF4 base: one request after another, `set_adapter` before each.

Runs as a program of its own, so that neither side's threads or packed weights touch the other. Reads a job as
JSON on standard input, writes the measurement as JSON on standard output.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from adapters.base import load_base


def measure(job: dict[str, Any]) -> dict[str, float]:
    base = load_base(job["base"], purpose="train", device=job["device"], progress=False)
    for module in base.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its fastest form: this process only evaluates
            module.support_avx512bf16_for_cpu = job["fused"]
    adapters = {name: Path(path) for name, path in job["adapters"].items()}
    first = next(iter(adapters))
    model = PeftModel.from_pretrained(base.model, adapters[first], adapter_name=first)
    for name, path in adapters.items():
        if name != first:
            model.load_adapter(path, adapter_name=name)
    model.eval()
    _generate(model, job["requests"][0], 4)  # warm-up
    began_s = time.perf_counter()
    tokens = sum(_generate(model, request, job["new_tokens"]) for request in job["requests"])
    seconds = time.perf_counter() - began_s
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


@torch.inference_mode()
def _generate(model: Any, request: dict[str, Any], new_tokens: int) -> int:
    model.set_adapter(request["adapter"])
    ids = torch.tensor([request["prompt"]], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return int(out.shape[1] - ids.shape[1])


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
