"""Owns quantising a base: once, kept on disk in transformers' own format. Knows no serving.

nf4, fp4  4-bit NormalFloat or float in blocks of 64, their scales in 8 bits in blocks of 256 (double
          quantisation) or in float32; in bitsandbytes' Linear4bit
int8      LLM.int8(): 8-bit integers with a scale for each row, in bitsandbytes' Linear8bitLt
none      as the source has it

The output head and the embeddings stay as they are. It always runs on the CPU, also where the model is then
served on CUDA, so that the same source gives the same codes everywhere. Served are NF4 with double
quantisation and none; the others are for training and merging.
"""

import copy
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from adapters.bnb import Linear4bit, Linear8bitLt, functional
from adapters.cache import make_once
from adapters.nf4 import dequantized_weight, plain_absmax

Quantization = Literal["nf4", "fp4", "int8", "none"]

log = logging.getLogger(__name__)

_WEIGHTS_PER_BLOCK: Final = 64
_SCALES_PER_BLOCK: Final = 256
_INT8_STEPS: Final = 127  # of a row's scale


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a base's linear layers are kept.

    Attributes:
        double: whether 4-bit scales are quantised again; means nothing for the others.
    """

    quantization: Quantization
    double: bool = True

    @property
    def name(self) -> str:
        """As it enters the fingerprint."""
        match self.quantization:
            case "none":
                return "none"
            case "int8":
                return "int8-rows"
            case _:
                return f"{self.quantization}-64{'-double' if self.double else ''}"

    @property
    def is_4bit(self) -> bool:
        return self.quantization in ("nf4", "fp4")

    @property
    def is_served(self) -> bool:
        """Whether a server can hold a base in it."""
        return self.name in (Scheme("nf4").name, Scheme("none").name)


def quantized_folder(
    folder: Path, scheme: Scheme, fingerprint: str, cache_dir: Path, *, progress: bool
) -> Path:
    """The quantised form of a model folder, made now if this machine has not made it before.

    Args:
        scheme: any but none.
        fingerprint: of the folder under the scheme; the key of the cache.
    """
    kind = scheme.quantization.upper()
    target = cache_dir / scheme.quantization / fingerprint.removeprefix("sha256:")[:32]
    started = time.monotonic()
    if make_once(target, lambda staged: _quantize(folder, scheme, staged, progress=progress)):
        took_s = time.monotonic() - started
        log.info("quantised %s to %s in %.1f s, kept in %s", folder.name, kind, took_s, target)
    else:
        log.info("quantisation of %s skipped: %s weights found in %s", folder.name, kind, target)
    return target


def coded_modules(config: Any, scheme: Scheme) -> frozenset[str]:
    """Names of the modules of such a model whose weights are quantised; no weights are made.

    Args:
        scheme: any but none.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    quantizer = AutoHfQuantizer.from_config(_bitsandbytes_config(scheme), pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": "cpu"})
    return frozenset(quantized_layers(model))


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit | Linear8bitLt]:
    """Every layer whose weight bitsandbytes keeps, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def plain_weight(layer: nn.Module) -> Tensor:
    """The [O, D] weight that a linear layer stands for, in float32, whichever way it is kept."""
    if isinstance(layer, Linear4bit):
        return dequantized_weight(layer)
    if isinstance(layer, Linear8bitLt):
        codes, scales = (layer.weight.CB, layer.weight.SCB)
        if codes is None:  # the first product takes them over
            codes, scales = layer.state.CB, layer.state.SCB
        return _plain_int8(codes, scales)
    assert isinstance(layer, nn.Linear), "every linear module of a base for training is one"
    return layer.weight.detach().float()


def is_cut_exactly(in_features: int, scheme: Scheme) -> bool:
    """Whether blocks of rows are dequantised to the bits of the whole weight.

    Where a row ends within a quantisation block, what bitsandbytes makes of it on a CPU depends on the rows
    before it.
    """
    return not scheme.is_4bit or in_features % _WEIGHTS_PER_BLOCK == 0


def recoded(blocks: Iterable[Tensor], scheme: Scheme) -> Iterator[Tensor]:
    """What is left of a weight once it is quantised as a base's is: the same bits as `plain_weight` of it.

    It need not be in memory: blocks of rows of [O, D] go in and come out, in float32. Their codes and scales
    are kept meanwhile, half a byte and a 16th of one for each weight; the second quantisation of 4-bit scales
    needs all of them.

    Args:
        blocks: all rows in one where `is_cut_exactly` says no, else all but the last of a multiple of 64.
        scheme: any but none.
    """
    if not scheme.is_4bit:  # each row has its scale
        yield from map(_recoded_int8, blocks)
        return
    coded = [_coded(block, scheme) for block in blocks]
    whole = coded[0][2]
    whole.absmax = torch.cat([state.absmax for _, _, state in coded])
    if scheme.double:
        _quantize_scales(whole)
    absmax, start = plain_absmax(whole), 0
    for shape, codes, _ in coded:
        stop = start + -(-shape.numel() // _WEIGHTS_PER_BLOCK)
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, absmax[start:stop], _WEIGHTS_PER_BLOCK, scheme.quantization, shape, torch.float32
        )
        yield weight
        start = stop


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Shows or hides transformers' own progress bars."""
    before = transformers_logging.is_progress_bar_enabled()
    _set_progress_bars(shown)
    try:
        yield
    finally:
        _set_progress_bars(before)


def _quantize(folder: Path, scheme: Scheme, staged: Path, *, progress: bool) -> None:
    with progress_bars(progress):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            quantization_config=_bitsandbytes_config(scheme),
            device_map={"": "cpu"},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        if scheme.is_4bit and scheme.double:
            for layer in quantized_layers(model).values():
                _quantize_scales(layer.weight.quant_state)
                layer.weight.compress_statistics = True
            model.config.quantization_config.bnb_4bit_use_double_quant = True
        model.generation_config = GenerationConfig()  # the source's own stays with the source
        model.save_pretrained(staged)


def _coded(block_OD: Tensor, scheme: Scheme) -> tuple[torch.Size, Tensor, functional.QuantState]:
    codes, state = functional.quantize_4bit(
        block_OD.contiguous(), blocksize=_WEIGHTS_PER_BLOCK, quant_type=scheme.quantization
    )
    return block_OD.shape, codes, state


def _recoded_int8(block_OD: Tensor) -> Tensor:
    codes, scales, _ = functional.int8_vectorwise_quant(block_OD.contiguous().to(torch.float16))
    return _plain_int8(codes, scales)


def _plain_int8(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * (scales.float()[:, None] / _INT8_STEPS)


def _bitsandbytes_config(scheme: Scheme) -> Any:
    if not scheme.is_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme.quantization,
        bnb_4bit_use_double_quant=False,  # ours, below, whose sums do not depend on the number of threads
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _quantize_scales(state: functional.QuantState) -> None:
    """Double quantisation as in bitsandbytes, with the mean in float64: the same bits on every machine."""
    state.offset = state.absmax.double().mean().float()
    state.absmax, state.state2 = functional.quantize_blockwise(
        state.absmax - state.offset, blocksize=_SCALES_PER_BLOCK
    )
    state.nested = True


def _set_progress_bars(shown: bool) -> None:
    if shown:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
