"""transformers' own `generate` with PEFT: what every token must equal. Knows nothing of the engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Oracle:
    """A float32 model and adapters, one request at a time."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.generation_config.eos_token_id = model.config.eos_token_id
        names = list(adapters)
        self.model: Any = PeftModel.from_pretrained(model, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(adapters[name], adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], adapter: str, max_new_tokens: int) -> list[int]:
        """Greedy continuation; an empty adapter name is the base."""
        with self._using(adapter):
            ids = torch.tensor([list(prompt)])
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [int(token) for token in out[0, len(prompt) :]]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapter: str) -> torch.Tensor:
        """Logits of every position, [tokens, vocabulary]."""
        with self._using(adapter):
            out: torch.Tensor = self.model(input_ids=torch.tensor([list(token_ids)])).logits[0].float()
        return out

    @contextmanager
    def _using(self, adapter: str) -> Iterator[None]:
        if adapter:
            self.model.set_adapter(adapter)
            yield
        else:
            with self.model.disable_adapter():
                yield
