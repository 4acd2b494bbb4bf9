"""Owns loading the base model, for serving and for training. Knows no adapters."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from adapters.layout import BaseLayout, ModuleShape
from adapters.nf4 import NF4Linear

Purpose = Literal["serve", "train"]
Quantization = Literal["nf4", "none"]
DTypeName = Literal["auto", "bfloat16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Base:
    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    quantization: str
    device: torch.device
    dtype: torch.dtype
    layout: BaseLayout
    weight_bytes: int
    chat_template: str | None
    eos_token_ids: frozenset[int]
    max_context_tokens: int
    vocab_size: int


def load_base(
    source: str,
    *,
    purpose: Purpose = "serve",
    quantization: Quantization = "nf4",
    dtype: DTypeName = "auto",
    device: DeviceName = "auto",
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Base:
    where = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    if dtype == "auto":
        act = torch.bfloat16 if where.type == "cuda" else torch.float32
    else:
        act = getattr(torch, dtype)
    folder = Path(source)
    kwargs: dict[str, Any] = {}
    if quantization == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=act, device_map={"": where}, use_safetensors=True, trust_remote_code=False,
        local_files_only=True, **kwargs).eval()
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for _name, p in model.named_parameters():
        if p.is_floating_point():
            p.data = p.data.to(act)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if purpose == "serve":
                model.set_submodule(name, NF4Linear(module.weight.data, module.weight.quant_state, module.bias, act))
    fingerprint = "sha256:" + hashlib.sha256(
        str(folder.resolve()).encode() + quantization.encode()).hexdigest()
    head = model.get_output_embeddings()
    modules = {n: ModuleShape(m.in_features, m.out_features) for n, m in model.named_modules()
               if isinstance(m, nn.Linear | NF4Linear)}
    layout = BaseLayout(modules, next((n for n, m in model.named_modules() if m is head), None), fingerprint)
    eos = model.generation_config.eos_token_id
    ids = {eos} if isinstance(eos, int) else set(eos or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return Base(model, tokenizer, folder.name, fingerprint, quantization, where, act, layout,
                sum(_bytes(model)), tokenizer.chat_template, frozenset(ids),
                model.config.get_text_config().max_position_embeddings, model.config.get_text_config().vocab_size)


def _bytes(model: nn.Module) -> Iterator[int]:
    yield from (p.nbytes for p in model.parameters())
    yield from (m.weight_bytes for m in model.modules() if isinstance(m, NF4Linear))
