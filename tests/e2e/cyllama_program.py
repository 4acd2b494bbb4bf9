"""As llama_program, with the newer llama.cpp in the package cyllama, which applies no adapters.

Of the logits it gives those of the last token alone. The package is imported from where it is installed, or
from the folder $QUICKCHANGE_CYLLAMA.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER_VARIABLE = "QUICKCHANGE_CYLLAMA"
_CONTEXT = 256
_F32 = 0  # of ggml_type
_OFF = 0  # of llama_flash_attn_type: it would round keys and values


def is_there() -> bool:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return (Path(folder) / "cyllama").is_dir()
    return importlib.util.find_spec("cyllama") is not None


def last_logits(cyllama: Any, model: Any, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """[1, vocabulary]."""
    options = cyllama.LlamaContextParams()
    options.n_ctx = options.n_batch = options.n_ubatch = _CONTEXT
    options.type_k = options.type_v = _F32
    options.n_threads, options.flash_attn_type = 1, _OFF
    context = cyllama.LlamaContext(model, options, False)
    batch = cyllama.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    batch.set_batch(list(tokens), 0, False)
    batch.set_last_logits_to_true()
    context.decode(batch)
    found = np.array(context.get_logits(), np.float32)[None]
    context.close()
    return found


def main() -> None:
    if os.environ.get(FOLDER_VARIABLE):
        sys.path.insert(0, os.environ[FOLDER_VARIABLE])
    import cyllama.llama.llama_cpp as cyllama  # type: ignore[import-not-found]  # no dependency of ours

    class Model(cyllama.LlamaModel):  # type: ignore[misc]  # untyped
        n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which get_logits looks for here

    path, out = sys.argv[1:]
    model, asked = Model(path, cyllama.LlamaModelParams(), False), json.load(sys.stdin)
    vocabulary = model.get_vocab()
    told = {
        "tokens": [list(vocabulary.tokenize(text, True, True)) for text in asked["texts"]],
        "ends": [token for token in asked["candidates"] if vocabulary.is_eog(token)],
    }
    logits = {f"logits{at}": last_logits(cyllama, model, ids) for at, ids in enumerate(asked["ids"])}
    np.savez(out, told=json.dumps(told), **logits)


if __name__ == "__main__":
    main()
