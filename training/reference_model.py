"""Answers an evaluation's questions with transformers and PEFT, greedily, in float32. Knows no metric.

The slow way, for what no server applies: DoRA, IA³, biases, prefixes, prompts and whole models. What is
asked, where an answer ends and how it is decoded are as a server has them.

B rows of a batch, T tokens of the longest, D width of the base.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig

from adapters.base import Base
from training.applied import Applied, applied, encoder_for
from training.batches import left_padded
from training.cases import Answer, Case
from training.errors import EvaluationError
from training.products import products_in

_BATCH_ROWS: Final = 16
_BATCH_TOKENS: Final = 16384  # prompts and answers of a batch together: keys and values stay small


class ReferenceModel:
    """An adapter folder on a base, or the base alone, as something that answers cases.

    Args:
        base: loaded with purpose="train" and dtype="float32"; after every call it is as it was.
        adapter: a folder that training saved; None for the base.
        max_new_tokens: of an answer; shorter where the base's context ends.
    """

    def __init__(self, base: Base, adapter: Path | None, max_new_tokens: int) -> None:
        self._base, self._adapter, self._max_new_tokens = base, adapter, max_new_tokens

    def answers(self, cases: Sequence[Case], *, progress: bool) -> list[Answer]:
        """In the order of the cases; those of like length go through the model together.

        Raises:
            EvaluationError: a prompt is empty, or leaves no room for an answer; its row is named.
            DataError: a chat template refuses a row.
            AdapterError: the adapter is malformed, or does not fit the base.
        """
        from tqdm import tqdm

        encoder = encoder_for(self._base, self._adapter)
        prompts = [encoder.prompt_ids(case.messages, place=case.place) for case in cases]
        answers: dict[int, Answer] = {}
        name = "base" if self._adapter is None else self._adapter.name
        with (
            applied(self._base, self._adapter) as model,
            products_in(self._base, torch.float32),
            tqdm(total=len(cases), desc=name, unit="row", disable=not progress) as bar,
        ):
            self._base.model.generation_config = GenerationConfig()  # the base's may penalise or sample
            rooms = [self._room(*pair, model.virtual_tokens) for pair in zip(cases, prompts, strict=True)]
            # Keys of a prefix come first in the cache: what pads would stand between it and the prompt.
            for batch in _batches(prompts, rooms, padded=model.kind != "prefix"):
                found = self._answer([prompts[index] for index in batch], model, rooms[batch[0]])
                answers.update(zip(batch, found, strict=True))
                bar.update(len(batch))
        return [answers[index] for index in range(len(cases))]

    def _room(self, case: Case, prompt: Sequence[int], virtual_tokens: int) -> int:
        """Tokens that the answer may have."""
        if not prompt:
            raise EvaluationError(
                f"{case.place} has an empty prompt, to which nothing can be said; remove it"
            )
        limit = self._base.max_context_tokens
        left = limit - virtual_tokens - len(prompt)
        if left < 1:
            learned = f" after {virtual_tokens} learned positions" if virtual_tokens else ""
            raise EvaluationError(
                f"{case.place} has a prompt of {len(prompt)} tokens{learned}; the base's context holds "
                f"{limit}, the answer included; remove it"
            )
        return min(self._max_new_tokens, left)

    def _answer(self, prompts: Sequence[Sequence[int]], model: Applied, max_new_tokens: int) -> list[Answer]:
        return [self._read(ids) for ids in self._generated(prompts, model, max_new_tokens).tolist()]

    @torch.no_grad()
    def _generated(self, prompts: Sequence[Sequence[int]], model: Applied, max_new_tokens: int) -> Tensor:
        """Ids of the answers, [B, up to max_new_tokens]; behind an answer's end stands anything."""
        virtual, base = model.virtual_tokens, self._base
        # Zeros hold the places of learned vectors: they precede the prompt, and what pads precedes them.
        inputs = left_padded([(0,) * virtual + tuple(prompt) for prompt in prompts], base.device)
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        given: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if model.kind == "prompt":
            given = {"inputs_embeds": _embedded(model, ids_BT, mask_BT), "attention_mask": mask_BT}
        elif model.kind == "prefix":
            given["past_key_values"] = model.model.get_prompt(len(prompts), max_cache_len=-1)
        ends = sorted(base.eos_token_ids)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=0
        )
        # Not PEFT's own generate: its modules lie in the base's model, and what it leaves there stays.
        out: Tensor = base.model.generate(**given, generation_config=config)
        return out if model.kind == "prompt" else out[:, ids_BT.shape[1] :]

    def _read(self, token_ids: Sequence[int]) -> Answer:
        """An answer up to the token that ends it, which is counted and is no part of the text."""
        ends = self._base.eos_token_ids
        length = next((index for index, token in enumerate(token_ids) if token in ends), len(token_ids))
        text: str = self._base.tokenizer.decode(
            list(token_ids[:length]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ended = length < len(token_ids)
        return Answer(text, length + ended, ended)


def _batches(prompts: Sequence[Sequence[int]], rooms: Sequence[int], *, padded: bool) -> Iterator[list[int]]:
    """Indices of prompts that go through the model together: of one room for the answer and like length.

    Args:
        padded: whether prompts of different length may.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for _, group in groupby(order, lambda index: (rooms[index], None if padded else len(prompts[index]))):
        batch: list[int] = []
        for index in group:  # the longest so far, for they are sorted
            tokens = (len(batch) + 1) * (len(prompts[index]) + rooms[index])
            if batch and (len(batch) == _BATCH_ROWS or tokens > _BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(index)
        yield batch


def _embedded(model: Applied, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T, D]: what tokens mean, and in the first places of each row that count the learned vectors."""
    embeds_BTD: Tensor = model.model.get_base_model().get_input_embeddings()(ids_BT)
    learned_BVD = model.model.get_prompt(len(ids_BT)).to(embeds_BTD.dtype)
    for row, begin in enumerate(mask_BT.argmax(dim=1).tolist()):
        embeds_BTD[row, begin : begin + model.virtual_tokens] = learned_BVD[row]
    return embeds_BTD
