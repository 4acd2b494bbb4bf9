"""Small models of many architectures on disk, and measures of how far two sets of logits lie apart."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from tests.models import PADDED_VOCABULARY, build_tokenizer

PROMPT = torch.arange(3, 35)[None]


def save_model(folder: Path, model_type: str, *, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Writes a random model of any architecture, with a tokenizer; returns the folder."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, vocab_size=PADDED_VOCABULARY, **config)
    model = AutoModelForCausalLM.from_config(made).to(dtype)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    """GPT-2, whose linear layers are transposed Conv1D modules with biases, and whose head is tied."""
    return save_model(folder, "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=128)


def save_tied_llama(folder: Path) -> Path:
    """A llama whose head shares the embedding's weight."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return save_model(folder, "llama", tie_word_embeddings=True, **sizes, **heads)


def plain_bitsandbytes(folder: Path, *, repacks: bool) -> Any:
    """What transformers and bitsandbytes make of a folder without us: the oracle of NF4."""
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=recipe, device_map={"": "cpu"}, dtype=torch.float32
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and not repacks:
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = PROMPT) -> Tensor:
    return model(input_ids=ids).logits.float()


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
