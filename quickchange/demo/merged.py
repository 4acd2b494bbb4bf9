"""Folds an adapter into its base and asks the result in a process of its own. Knows no server.

Run as a module it is that process: transformers alone, none of this project's code on the model.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from quickchange.demo.errors import DemoError

_MAX_NEW_TOKENS: Final = 20


def merged_model(adapter: Path, folder: Path) -> Path:
    """`quickchange merge` of the adapter, made once; the folder of the plain model."""
    out = folder / adapter.name
    if not out.is_dir():
        for older in folder.iterdir():
            shutil.rmtree(older)  # each is as large as the base
        _run("quickchange", "merge", "--base", "smollm2", "--adapter", str(adapter), "--out", str(out))
    return out


def answers_of(model: Path, chats: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    """Greedy answers of a plain model folder, from a fresh process."""
    answers: list[str] = json.loads(_run(__name__, str(model), stdin=json.dumps(chats)))
    return answers


def _run(module: str, *arguments: str, stdin: str = "") -> str:
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()
        said = lines[-1] if lines else f"exit code {result.returncode}"
        raise DemoError(f"`python -m {module} {' '.join(arguments)}` failed: {said}")
    return result.stdout


def _answer_with_transformers(model_folder: str, chats: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    answers = []
    for chat in chats:
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    print(json.dumps(_answer_with_transformers(sys.argv[1], json.load(sys.stdin))))
