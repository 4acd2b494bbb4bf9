"""`quickchange serve` that tells what its base's weights are, as they lie in memory. No test lives here.

python -m tests.e2e.witness serve …      SIGUSR1 writes "witness sha256:…" to standard error
"""

import hashlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels.linear import PackedLinear
from tests.e2e.process import ServerProcess, eventually

COMMAND = ("-m", "tests.e2e.witness", "serve")
_ANSWER = re.compile(r"witness (sha256:[0-9a-f]{64})\n")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every tensor of a base, packed ones included, and of no adapter on it."""
    sha256 = hashlib.sha256()
    for name, tensor in _tensors(model):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{sha256.hexdigest()}"


def digest_in(server: ServerProcess) -> str:
    """What the weights in a server's memory are now; it must have been started with COMMAND."""
    before = len(_ANSWER.findall(server.log))
    server.signal(signal.SIGUSR1)
    eventually(lambda: len(_ANSWER.findall(server.log)) > before)
    return str(_ANSWER.findall(server.log)[-1])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in sorted(model.named_modules()):
        held: dict[str, Any] = {**vars(module), **module._parameters, **module._buffers}
        for attribute, value in sorted(held.items()):
            if isinstance(value, Tensor):
                yield f"{name}.{attribute}", value
            elif isinstance(value, PackedLinear):
                tensors = (value.weights, value.scales, value.bias)
                kept = (tensor for tensor in tensors if tensor is not None)
                yield from ((f"{name}.{attribute}[{i}]", tensor) for i, tensor in enumerate(kept))


def _main() -> int:
    import server.resident
    from quickchange.cli import main

    load_base = server.resident.load_base

    def load_and_watch(*args: Any, **kwargs: Any) -> Any:
        base = load_base(*args, **kwargs)
        signal.signal(
            signal.SIGUSR1, lambda *_: os.write(2, f"witness {weights_digest(base.model)}\n".encode())
        )
        return base

    server.resident.load_base = load_and_watch
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_main())
