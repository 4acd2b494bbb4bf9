"""A program that computes logits and tokens with llama.cpp, for tests: `python -m tests.e2e.llama_program`.

In a process of its own, for llama.cpp aborts on what it does not expect. Of the package llama-cpp-cffi only
the compiled module is loaded: from where `llama` can be imported, or from the folder $QUICKCHANGE_LLAMA_CPP.
"""

import argparse
import contextlib
import ctypes
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER_VARIABLE = "QUICKCHANGE_LLAMA_CPP"
_MODULE = "_llama_cpp_cpu"
# libstdc++ before GCC 14 lacks this; it ends the program where an exception cannot be handled.
_MISSING_IN_OLD_LIBRARIES = "void abort(void); void __cxa_call_terminate(void *e) { (void)e; abort(); }"


def find_module() -> Path | None:
    """The compiled module of llama-cpp-cffi; None if there is none."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        places = [Path(chosen), Path(chosen) / "llama"]
    else:
        spec = importlib.util.find_spec("llama")
        places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    endings = importlib.machinery.EXTENSION_SUFFIXES
    found = (place / f"{_MODULE}{ending}" for place in places for ending in endings)
    return next((path for path in found if path.is_file()), None)


class Llama:
    """A GGUF model in llama.cpp on the CPU, perhaps with a LoRA adapter."""

    def __init__(self, module: Any, model: Path, lora: Path | None) -> None:
        self.lib, self.ffi = module.lib, module.ffi
        self._silence()
        self.lib.llama_backend_init()
        options = self.lib.llama_model_default_params()
        options.check_tensors = True
        self.model = self.lib.llama_model_load_from_file(str(model).encode(), options)
        if self.model == self.ffi.NULL:
            raise SystemExit(f"llama.cpp does not load {model}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.adapter = self.ffi.NULL
        if lora is not None:
            self.adapter = self.lib.llama_adapter_lora_init(self.model, str(lora).encode())
            if self.adapter == self.ffi.NULL:
                raise SystemExit(f"llama.cpp does not load {lora}")

    def tokens(self, text: str) -> list[int]:
        """Of a text whose special tokens are read as such, with what the model's file says to add."""
        raw = text.encode()
        room = len(raw) + 8
        found = self.ffi.new("llama_token[]", room)
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), found, room, True, True)
        assert count >= 0, "more tokens than bytes"
        return list(found[0:count])

    def ends_answers(self, token: int) -> bool:
        return bool(self.lib.llama_vocab_is_eog(self.vocab, token))

    def logits(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """[tokens, vocabulary], with keys and values in float32."""
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = max(64, len(tokens))
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = 0  # GGML_TYPE_F32
        context = self.lib.llama_init_from_model(self.model, options)
        assert context != self.ffi.NULL, "no context"
        if self.adapter != self.ffi.NULL:
            assert self.lib.llama_set_adapter_lora(context, self.adapter, 1.0) == 0
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        assert self.lib.llama_decode(context, batch) == 0, "llama_decode"
        count = len(tokens) * self.lib.llama_vocab_n_tokens(self.vocab)
        raw = self.ffi.buffer(self.lib.llama_get_logits(context), count * 4)
        found = np.frombuffer(raw, np.float32).reshape(len(tokens), -1).copy()
        self.lib.llama_batch_free(batch)
        self.lib.llama_free(context)
        return found

    def _silence(self) -> None:
        """But for llama.cpp's own errors."""

        @self.ffi.def_extern(name="llama_cpp_cffi_ggml_log_callback")
        def log(level: int, text: Any, user_data: Any) -> None:
            if level == self.lib.GGML_LOG_LEVEL_ERROR:
                sys.stderr.write(self.ffi.string(text).decode(errors="replace"))

        self.lib.llama_log_set(self.lib.llama_cpp_cffi_ggml_log_callback, self.ffi.NULL)


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_loader(
        _MODULE, importlib.machinery.ExtensionFileLoader(_MODULE, str(path))
    )
    assert spec is not None
    try:
        return importlib.util.module_from_spec(spec)
    except ImportError as error:
        if "__cxa_call_terminate" not in str(error):
            raise
    with _missing_library() as library:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        return importlib.util.module_from_spec(spec)


@contextlib.contextmanager
def _missing_library() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "missing.so"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(library), "-"]
        subprocess.run(command, input=_MISSING_IN_OLD_LIBRARIES, text=True, check=True)
        yield library


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="where the answer goes, as .npz")
    parser.add_argument("--lora", type=Path)
    args = parser.parse_args()
    path = find_module()
    if path is None:
        raise SystemExit("llama-cpp-cffi is not there")
    asked = json.load(sys.stdin)
    llama = Llama(load_module(path), args.model, args.lora)
    told = {
        "tokens": [llama.tokens(text) for text in asked["texts"]],
        "ends": [token for token in asked["candidates"] if llama.ends_answers(token)],
    }
    logits = {f"logits{place}": llama.logits(ids) for place, ids in enumerate(asked["ids"])}
    np.savez(args.out, told=json.dumps(told), **logits)


if __name__ == "__main__":
    main()
