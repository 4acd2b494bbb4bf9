"""Writes the model card of what is exported, where it has none: Markdown below the YAML that hubs read.

Knows no files.
"""

from collections.abc import Sequence

import yaml  # type: ignore[import-untyped]  # PyYAML carries no types

from adapters.smollm2 import HUB_ID
from adapters.smollm2 import NAME as SMOLLM2_NAME
from training.document import Document
from training.markdown import markdown
from training.model_card import UNKNOWN_LICENSE


def card(
    document: Document, *, base: str | None, library: str, licence: str | None, tags: Sequence[str] = ()
) -> str:
    """The card's text.

    Args:
        base: what it was made from, to which hubs link; None if there is none.
        library: that loads it, as hubs name it.
        licence: as hubs spell it; None if nobody said.
    """
    head = {
        **({} if base is None else {"base_model": HUB_ID if base == SMOLLM2_NAME else base}),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": licence or UNKNOWN_LICENSE,
        "tags": ["quickchange", *tags],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{markdown(document)}"
