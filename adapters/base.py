"""Owns the base model in memory: loaded for serving, for training or dequantised. Knows no adapters.

purpose  quantization  linear layers
serve    nf4, none     on a CPU packed for native code (adapters/native.py), where that is there
serve    nf4           else packed for bitsandbytes' kernels (adapters/nf4.py)
train    nf4, fp4      bitsandbytes Linear4bit, never repacked, so that gradients and saving stay right
train    int8          bitsandbytes Linear8bitLt
either   none          else torch Linear; with float32 this is the exact mode that parity tests use
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from adapters.bnb import Linear4bit, Linear8bitLt
from adapters.cache import default_cache_dir
from adapters.errors import BaseModelError, UnsupportedBaseError
from adapters.fingerprint import fingerprint_of
from adapters.layout import BaseLayout, ModuleShape
from adapters.native import use_native_layers
from adapters.nf4 import fused_kernel_works, serving_linear
from adapters.quantize import (
    Quantization,
    Scheme,
    plain_weight,
    progress_bars,
    quantized_folder,
    quantized_layers,
)
from adapters.room import check_fits
from adapters.serving import ServingLinear
from adapters.sources import Source, resolve_source
from adapters.support import supported_config
from adapters.text import generation_config, text_of
from kernels.library import status as native_status
from kernels.precision import MatmulPrecision, PrecisionChoice, automatic_precision, has_medium

Purpose = Literal["serve", "train"]
DTypeName = Literal["auto", "bfloat16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]
KernelChoice = Literal["auto", "native", "torch"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Base:
    """A base model in memory.

    Attributes:
        model: a transformers causal language model, in evaluation mode, on `device`.
        tokenizer: its tokenizer, as saved with it.
        name: what people call it, without a path.
        folder: where its configuration, unquantised weights and tokenizer lie on this machine.
        fingerprint: "sha256:…" of weights, configuration and quantisation.
        scheme: how its linear layers are kept.
        dtype: of activations, norms and embeddings.
        storage_dtype: in which keys, values, adapters and weights that are not quantised are kept.
        kernels: what computes: native code, or torch and bitsandbytes.
        matmul_precision: of native products with the base's weights; None if other kernels compute them.
        layout: every linear module by name and shape.
        weight_bytes: memory of all weights and buffers, each counted once.
        chat_template: Jinja source, None if the model has none.
        eos_token_ids: tokens that end an answer, from the generation configuration and the tokenizer.
        max_context_tokens: positions the model was made for.
        vocab_size: rows of the output head.
    """

    model: Any
    tokenizer: Any
    name: str
    folder: Path
    fingerprint: str
    scheme: Scheme
    device: torch.device
    dtype: torch.dtype
    storage_dtype: torch.dtype
    kernels: Literal["native", "torch"]
    matmul_precision: MatmulPrecision | None
    layout: BaseLayout
    weight_bytes: int
    chat_template: str | None
    eos_token_ids: frozenset[int]
    max_context_tokens: int
    vocab_size: int

    @property
    def quantization(self) -> Quantization:
        """Of its linear layers, but for the output head."""
        return self.scheme.quantization


def load_base(
    source: str,
    *,
    purpose: Purpose = "serve",
    quantization: Quantization = "nf4",
    double_quantization: bool = True,
    dtype: DTypeName = "auto",
    device: DeviceName = "auto",
    kernels: KernelChoice = "auto",
    matmul_precision: PrecisionChoice = "auto",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Base:
    """Loads a base; the first time on a machine it may be fetched, converted and quantised.

    Args:
        source: a folder with safetensors, a GGUF file, a hub id, or "smollm2".
        purpose: "serve" gives immutable layers; "train" gives layers that PEFT and autograd understand.
        quantization: of the linear layers; "fp4" and "int8" are for training alone.
        double_quantization: whether 4-bit scales are quantised again; a server's always are.
        dtype: "auto" is bfloat16 on CUDA. On a CPU it is float32; in native code keys, values, adapters and
            weights that are not quantised are stored in bfloat16; without it products of NF4 weights are in
            bfloat16. "float32" stores and computes everything in float32.
        device: "auto" is CUDA if there is one.
        kernels: for serving on a CPU; "auto" is native code where it is there, "torch" plain torch and
            bitsandbytes.
        matmul_precision: of native products with the base's weights; "medium" rounds activations to
            bfloat16, "auto" is medium where that is faster.
        cache_dir: where fetched, converted and quantised models are kept; $QUICKCHANGE_CACHE or
            ~/.cache/quickchange if None.
        progress: whether long work shows progress bars.

    Raises:
        BaseNotFoundError: the source is not there or cannot be read.
        BaseTooLargeError: its weights need more memory than is free.
        UnsupportedBaseError: its architecture or form cannot be served, or "native" or "medium" was asked
            for and is not there.
    """
    scheme = Scheme(quantization, double_quantization)
    if purpose == "serve" and not scheme.is_served:
        raise UnsupportedBaseError(
            f"a base in {scheme.name} can be trained on and not served; serve quantization 'nf4' or 'none'"
        )
    cache = cache_dir or default_cache_dir()
    place = _device(device)
    chosen = _kernels(kernels, place) if purpose == "serve" else "torch"
    precision = _precision(matmul_precision, chosen, dtype)
    activations = _activation_dtype(dtype, place)
    found = resolve_source(source, cache, progress=progress)
    supported_config(found.folder)
    check_fits(found.folder, quantization, place)
    fingerprint = fingerprint_of(found.folder, scheme.name, cache)
    if quantization == "none":
        model = _load_model(found.folder, place, activations)
        replace_conv1d(model)
    else:
        weights = quantized_folder(found.folder, scheme, fingerprint, cache, progress=progress)
        model = _load_quantized(weights, place, activations, exact=dtype == "float32")
    complete(model, found.folder)
    if purpose == "serve":
        model.requires_grad_(False)
    storage = torch.bfloat16 if chosen == "native" and dtype != "float32" else activations
    if precision is not None:
        use_native_layers(model, storage, precision)
    elif purpose == "serve":
        _make_serving(model, activations, fused=dtype != "float32")
    return describe(model, found, fingerprint, scheme, place, activations, storage, precision)


def dequantized_model(source: str, *, cache_dir: Path | None = None, progress: bool = True) -> Any:
    """A plain float32 transformers model with exactly the weights that NF4 stands for, on the CPU.

    Independent of every other load; free to change and to save. Errors as `load_base`.
    """
    return dequantized_base(source, cache_dir=cache_dir, progress=progress).model


def dequantized_base(
    source: str,
    *,
    quantization: Quantization = "nf4",
    double_quantization: bool = True,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Base:
    """A base whose model is plain float32 torch on the CPU: what its codes stand for; with "none" the source.

    The fingerprint and the layout stay those of the base that adapters are trained on.
    """
    base = load_base(
        source,
        purpose="train",
        quantization=quantization,
        double_quantization=double_quantization,
        dtype="float32",
        device="cpu",
        cache_dir=cache_dir,
        progress=progress,
    )
    plain = _load_model(base.folder, base.device, base.dtype)
    complete(plain, base.folder)
    for name, layer in quantized_layers(base.model).items():
        weight_OD, target = plain_weight(layer), plain.get_submodule(name)
        target.weight.data = weight_OD.T.contiguous() if isinstance(target, Conv1D) else weight_OD
    plain.requires_grad_(False)
    return replace(base, model=plain, weight_bytes=sum(_tensor_bytes(plain)))


def source_model(base: Base) -> Any:
    """What a base was made from: float32, on the CPU, in transformers' own layers, free to change.

    Errors as `load_base`.
    """
    return _load_model(base.folder, torch.device("cpu"), torch.float32)


def _device(wanted: DeviceName) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise UnsupportedBaseError(
            "device 'cuda' was asked for and there is none; use device 'auto' or 'cpu'"
        )
    if not has_cuda or wanted == "cpu":
        return torch.device("cpu")
    return torch.device(
        "cuda", torch.cuda.current_device()
    )  # 0, but each process of a training run has its own


def _kernels(wanted: KernelChoice, device: torch.device) -> Literal["native", "torch"]:
    if wanted == "torch" or (wanted == "auto" and device.type != "cpu"):
        return "torch"
    if device.type != "cpu":
        raise UnsupportedBaseError("native kernels run on a CPU; use kernels 'auto' or device 'cpu'")
    status = native_status()
    if status.active:
        return "native"
    if wanted == "native":
        raise UnsupportedBaseError(f"native kernels were asked for and are not there: {status.reason}")
    log.warning("serving without native kernels: %s; `quickchange doctor` says what to do", status.reason)
    return "torch"


def _precision(
    wanted: PrecisionChoice, kernels: Literal["native", "torch"], dtype: DTypeName
) -> MatmulPrecision | None:
    """Of products with the base's weights, None where native code does not compute them."""
    if wanted == "medium":
        _check_medium(kernels, dtype)
    if kernels == "torch":
        return None
    if wanted != "auto":
        return wanted
    return "highest" if dtype == "float32" else automatic_precision()[0]


def _check_medium(kernels: Literal["native", "torch"], dtype: DTypeName) -> None:
    refused = "matmul_precision 'medium' was asked for, but"
    if kernels == "torch":
        raise UnsupportedBaseError(
            f"{refused} no native kernels compute here; use 'auto', dtype decides then"
        )
    if dtype == "float32":
        raise UnsupportedBaseError(f"{refused} dtype 'float32' computes exactly; use dtype 'auto'")
    if not has_medium():
        raise UnsupportedBaseError(f"{refused} {automatic_precision()[1]}; use 'auto' or 'highest'")


def _activation_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def _load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        with progress_bars(False):
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"{folder} cannot be loaded ({error}); if it is a cache folder, delete it"
        ) from error
    return model.eval()


def _load_quantized(folder: Path, device: torch.device, dtype: torch.dtype, *, exact: bool) -> Any:
    model = _load_model(folder, device, dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():  # what is not quantised comes in the type it was saved in
            parameter.data = parameter.data.to(dtype)
    bf16_products = not exact and (device.type == "cuda" or fused_kernel_works())
    for layer in _linear4bits(model).values():
        layer.compute_dtype = torch.bfloat16 if bf16_products else dtype
        layer.compute_type_is_set = True
        # bitsandbytes would repack the weight in place at the first evaluation, and from then on gradients,
        # dequantisation and saving would be wrong.
        layer.support_avx512bf16_for_cpu = False
    return model


def _make_serving(model: Any, dtype: torch.dtype, *, fused: bool) -> None:
    """Swaps every Linear4bit for its immutable serving form; one thread, before anything is served."""
    for name, layer in _linear4bits(model).items():
        model.set_submodule(name, serving_linear(layer, dtype, fused=fused))


def _linear4bits(model: nn.Module) -> dict[str, Linear4bit]:
    return {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer, Linear4bit)}


def replace_conv1d(model: Any) -> None:
    """GPT-2's transposed linear layers become Linear, as they do under NF4, so that adapters see one kind."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            ins, outs = module.weight.shape
            plain = nn.Linear(ins, outs, device="meta")
            plain.weight = nn.Parameter(module.weight.detach().T.contiguous())
            plain.bias = module.bias
            model.set_submodule(name, plain.eval())


def complete(model: Any, folder: Path) -> None:
    """Gives a model what its source says of it, wherever its weights came from."""
    model.name_or_path = model.config._name_or_path = str(folder)
    model.generation_config = generation_config(folder, model.config)


def describe(
    model: Any,
    source: Source,
    fingerprint: str,
    scheme: Scheme,
    device: torch.device,
    dtype: torch.dtype,
    storage_dtype: torch.dtype,
    precision: MatmulPrecision | None,
) -> Base:
    text = text_of(source.folder, model.config, model.generation_config)
    return Base(
        model=model,
        tokenizer=text.tokenizer,
        name=source.name,
        folder=source.folder,
        fingerprint=fingerprint,
        scheme=scheme,
        device=device,
        dtype=dtype,
        storage_dtype=storage_dtype,
        kernels="torch" if precision is None else "native",
        matmul_precision=precision,
        layout=layout_of(model, fingerprint),
        weight_bytes=sum(_tensor_bytes(model)),
        chat_template=text.chat_template,
        eos_token_ids=text.eos_token_ids,
        max_context_tokens=text.max_context_tokens,
        vocab_size=model.get_output_embeddings().out_features,
    )


def layout_of(model: Any, fingerprint: str) -> BaseLayout:
    """Every linear module of a loaded base, and which of them is the output head."""
    modules = {
        name: ModuleShape(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | ServingLinear)
    }
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), None)
    return BaseLayout(modules=modules, head=head, fingerprint=fingerprint)


def _tensor_bytes(model: nn.Module) -> Iterator[int]:
    yield from (parameter.nbytes for parameter in model.parameters())  # tied ones come once
    yield from (buffer.nbytes for buffer in model.buffers())
    for module in model.modules():
        if isinstance(module, ServingLinear):
            yield module.weight_bytes
        elif isinstance(module, Linear4bit):
            yield _scale_bytes(module.weight.quant_state)
        elif isinstance(module, Linear8bitLt):
            yield module.out_features * torch.float32.itemsize


def _scale_bytes(state: Any) -> int:
    nested = state.state2.absmax.nbytes + state.state2.code.nbytes if state.nested else 0
    return int(state.absmax.nbytes + nested)
