"""Runs llama.cpp's convert_hf_to_gguf.py on a base whose tokenizer it need not understand: prompts are ids.

`python -m tests.bench.peers.convert_base SOURCES FOLDER OUTFILE`. Two allowances, both about text alone: a
tokenizer that the script has no name for is called GPT-2's, and the package sentencepiece, which it imports
before it looks whether there is anything for it to read, may be missing.
"""

import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = "convert_hf_to_gguf.py"
TOKENIZER_MODEL = "tokenizer.model"  # sentencepiece's


def main() -> None:
    sources, folder, outfile = sys.argv[1:]
    sys.path[:0] = [sources, str(Path(sources) / "gguf-py")]
    model = importlib.import_module("conversion.base").TextModel
    _name_any_tokenizer(model)
    if not (Path(folder) / TOKENIZER_MODEL).exists():
        model._create_vocab_sentencepiece = _no_tokenizer_model
    sys.argv = [SCRIPT, folder, "--outfile", outfile, "--outtype", "f16"]
    runpy.run_path(str(Path(sources) / SCRIPT), run_name="__main__")


def _no_tokenizer_model(self: Any) -> None:
    raise FileNotFoundError(TOKENIZER_MODEL)  # what it says itself, once the package is there


def _name_any_tokenizer(model: Any) -> None:
    known: Callable[[Any, Any], str] = model.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    model.get_vocab_base_pre = named


if __name__ == "__main__":
    main()
