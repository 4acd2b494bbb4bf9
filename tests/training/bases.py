"""Tiny bases to train on, of any architecture and quantisation, and the bits of all that they hold."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.base import Base, load_base
from adapters.bnb import Linear4bit, Linear8bitLt
from adapters.quantize import Scheme
from tests.models import Architecture, build_tiny_model

ROWS = [{"prompt": f"say {n}", "completion": f"{n * 7 % 10} ok"} for n in range(48)]

BaseOf = Callable[..., Base]


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def bases_in(folder: Path, cache: Path) -> BaseOf:
    """Gives bases by architecture and quantisation, each made once and shared by all who ask."""
    made: dict[tuple[Architecture, Scheme], Base] = {}

    def base_of(quantization: Any = "nf4", architecture: Architecture = "llama", double: bool = True) -> Base:
        source, scheme = folder / architecture, Scheme(quantization, double)
        if not source.exists():
            build_tiny_model(source, architecture)
        if (architecture, scheme) not in made:
            made[architecture, scheme] = load_base(
                str(source), purpose="train", quantization=quantization, double_quantization=double,
                device="cpu", cache_dir=cache, progress=False,
            )  # fmt: skip
        return made[architecture, scheme]

    return base_of


def digest(base: Base) -> str:
    """SHA-256 over every weight, buffer, code and scale, and over which modules and attributes there are."""
    total = hashlib.sha256()
    total.update(" ".join(vars(base.model)).encode())
    for name, module in base.model.named_modules():
        total.update(f"{name} {type(module).__name__} {module.training}".encode())
    for name, tensor in _tensors(base.model):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            yield f"{name} absmax", state.absmax
            if state.nested:
                yield f"{name} scales", state.state2.absmax
                yield f"{name} offset", state.offset.view(1)
        elif isinstance(module, Linear8bitLt):
            yield f"{name} scales", module.weight.SCB if module.weight.SCB is not None else module.state.SCB
