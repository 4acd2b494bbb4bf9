"""Puts PEFT's own modules into a transformers model. Knows no weights and no kinds of adapters."""

import warnings
from typing import Any

from peft import get_peft_model


def wrapped(model: Any, config: Any, *, empty: bool = False) -> Any:
    """The model with PEFT's own modules in the places that the configuration means.

    Args:
        empty: the modules are on torch's meta device, for a model that is.

    Raises:
        ValueError: PEFT does not do that with this architecture.
    """
    with warnings.catch_warnings():  # PEFT asks by a name that transformers has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, config, low_cpu_mem_usage=empty)
