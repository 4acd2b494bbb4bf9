"""Owns quantising a base to NF4: once, kept on disk in transformers' own format. Knows no serving.

4-bit NormalFloat in blocks of 64 with 8-bit scales in blocks of 256 (double quantisation); the output head
and the embeddings stay as they are. It always runs on the CPU, also where the model is then served on CUDA,
so that the same source gives the same codes everywhere.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from adapters.bnb import Linear4bit, functional
from adapters.cache import make_once

log = logging.getLogger(__name__)

NF4_SCHEME = "nf4-64-double"
_SCALES_PER_BLOCK = 256


def quantized_folder(folder: Path, fingerprint: str, cache_dir: Path, *, progress: bool) -> Path:
    """The NF4 form of a model folder, made now if this machine has not made it before.

    Args:
        fingerprint: of the folder under NF4_SCHEME; the key of the cache.
    """
    target = cache_dir / "nf4" / fingerprint.removeprefix("sha256:")[:32]
    started = time.monotonic()
    if make_once(target, lambda staged: _quantize(folder, staged, progress=progress)):
        log.info("quantised %s to NF4 in %.1f s, kept in %s", folder.name, time.monotonic() - started, target)
    else:
        log.info("quantisation of %s skipped: NF4 weights found in %s", folder.name, target)
    return target


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Shows or hides transformers' own progress bars."""
    before = transformers_logging.is_progress_bar_enabled()
    _set_progress_bars(shown)
    try:
        yield
    finally:
        _set_progress_bars(before)


def _quantize(folder: Path, staged: Path, *, progress: bool) -> None:
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,  # ours, below, whose sums do not depend on the number of threads
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with progress_bars(progress):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            quantization_config=recipe,
            device_map={"": "cpu"},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        for module in model.modules():
            if isinstance(module, Linear4bit):
                _quantize_scales(module.weight)
        model.config.quantization_config.bnb_4bit_use_double_quant = True
        model.generation_config = GenerationConfig()  # the source's own stays with the source
        model.save_pretrained(staged)


def _quantize_scales(weight: Any) -> None:
    """Double quantisation as in bitsandbytes, with the mean in float64: the same bits on every machine."""
    state: functional.QuantState = weight.quant_state
    state.offset = state.absmax.double().mean().float()
    state.absmax, state.state2 = functional.quantize_blockwise(
        state.absmax - state.offset, blocksize=_SCALES_PER_BLOCK
    )
    state.nested = True
    weight.compress_statistics = True


def _set_progress_bars(shown: bool) -> None:
    if shown:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
