"""Owns a base with an adapter folder on it, to be run and not trained. Knows no data and no server.

The base may be one that others share: afterwards every module, weight and flag of it is as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel

from adapters.base import Base
from adapters.bundle import read_bundle
from adapters.files import CARD_FILE
from adapters.fold import checked_bundle
from adapters.unserved_folder import (
    Kind,
    UnservedFolder,
    biases_to_change,
    load_modules,
    load_vectors,
    read_unserved,
)
from adapters.validate import validate_adapter
from adapters.wrapping import wrapped
from training.encoding import RowEncoder
from training.untouched import Untouched

_MAX_RANK: Final = 1024  # as training allows


@dataclass(frozen=True, slots=True)
class Applied:
    """What is to be run.

    Attributes:
        model: goes forward with the adapter; the base's own model, or PEFT's around it.
        kind: of what no server applies; None for low-rank updates and for the bare base.
        virtual_tokens: positions before the prompt that the adapter takes.
    """

    model: Any
    kind: Kind | None = None
    virtual_tokens: int = 0


@contextmanager
def applied(base: Base, adapter: Path | None) -> Iterator[Applied]:
    """The base with an adapter folder on it, of any kind that training saves; without for None.

    Args:
        base: loaded with purpose="train".

    Raises:
        AdapterError: the adapter is malformed, or does not fit the base.
    """
    untouched = Untouched(base)
    try:
        yield Applied(base.model) if adapter is None else _applied(base, adapter)
    finally:
        untouched.restore()


def encoder_for(base: Base, adapter: Path | None) -> RowEncoder:
    """What encodes prompts for it: the adapter's chat template goes before the base's.

    Raises:
        AdapterError: the adapter's manifest cannot be read.
    """
    bundle = None if adapter is None else read_bundle(adapter)
    template = base.chat_template if bundle is None or bundle.chat_template is None else bundle.chat_template
    return RowEncoder(base.tokenizer, template, base.eos_token_ids, base.max_context_tokens)


def _applied(base: Base, folder: Path) -> Applied:
    checked_bundle(folder, base)
    adapter = read_unserved(folder)
    if adapter is None:
        validate_adapter(folder, base.layout, max_rank=_MAX_RANK, beside=(CARD_FILE,))
        return Applied(PeftModel.from_pretrained(base.model, str(folder)).eval())
    if adapter.kind == "biases":
        _replace_biases(base, adapter)
        return Applied(base.model, "biases")
    model = wrapped(base.model, adapter.peft)
    if adapter.is_prompt_learning:
        load_vectors(model, adapter.tensors)
        return Applied(model.eval(), adapter.kind, adapter.peft.num_virtual_tokens)
    load_modules(model, adapter.tensors)
    return Applied(model.eval(), adapter.kind)


@torch.no_grad()
def _replace_biases(base: Base, adapter: UnservedFolder) -> None:
    """Other tensors in the biases' places; the base's own stay aside."""
    for name, parameter in biases_to_change(base, adapter.tensors).items():
        parameter.data = adapter.tensors[name].to(parameter.device, parameter.dtype)
