"""A base and its adapters as llama.cpp reads them, converted once by llama.cpp's own scripts."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.cache import make_once
from tests.bench.subject import Pool, Subject

QUANTIZATION = "Q4_0"
ADAPTER_FILE = "adapter.gguf"


class ConversionError(Exception):
    """llama.cpp's scripts refused; the message has their last words."""


@dataclass(frozen=True, slots=True)
class LlamaFiles:
    """GGUF files: the model, and adapters by name."""

    model: Path
    adapters: dict[str, Path]

    @classmethod
    def make(
        cls,
        subject: Subject,
        pool: Pool,
        cache: Path,
        *,
        sources: Path,
        quantize: Path,
        tell: Callable[[str], None],
    ) -> "LlamaFiles":
        """Converts what is not in the cache yet.

        Args:
            cache: a folder for this base and this pool alone.
            sources: llama.cpp's folder, with its conversion scripts.
            quantize: its llama-quantize.

        Raises:
            ConversionError: a script failed.
        """

        def model(folder: Path) -> None:
            tell("llama: converting the base")
            whole, small = folder / "f16.gguf", folder / f"{QUANTIZATION}.gguf"
            converter = [sys.executable, "-m", "tests.bench.peers.convert_base"]
            _run(*converter, str(sources), str(subject.folder), str(whole))
            _run(str(quantize), str(whole), str(small), QUANTIZATION)
            whole.unlink()

        def adapter(name: str, folder: Path) -> None:
            tell(f"llama: converting adapter {name}")
            script, outfile = str(sources / "convert_lora_to_gguf.py"), str(folder / ADAPTER_FILE)
            arguments = ["--base", str(subject.folder), "--outfile", outfile, "--outtype", "f16"]
            _run(sys.executable, script, *arguments, str(pool.folders[name]))

        make_once(cache / "base", model)
        for name in pool.folders:
            make_once(cache / name, partial(adapter, name))
        adapters = {name: cache / name / ADAPTER_FILE for name in pool.folders}
        return cls(cache / "base" / f"{QUANTIZATION}.gguf", adapters)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise ConversionError(f"{' '.join(command[:3])}: {' | '.join(last)}")
