"""Loads the native library and chooses its instruction set. Knows no operation.

The library is built by `pip install` where there is a C++ compiler (setup.py); without it every operation
runs in plain torch, and `status()` says why.
"""

import ctypes
import functools
import importlib.machinery
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kernels.structs import Bfloat16, declare

ISA_NAMES: Final = ("generic", "neon", "avx2", "avx512")
"""By qc_isa, best last; "generic" is for comparison and is never chosen."""


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """What is active, and why.

    Attributes:
        isa: instruction set in use, None if nothing native runs.
        available: every instruction set that this build has and this processor can run, best last.
        reason: one line for people.
    """

    isa: str | None
    available: tuple[str, ...]
    reason: str

    @property
    def active(self) -> bool:
        return self.isa is not None


class NativeLibrary:
    """The loaded library; `functions` are those of native/quickchange_kernels.h, typed."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError: it is not there or cannot be loaded here.
            AttributeError: it was built from other sources.
        """
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        declare(self.functions)

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return ISA_NAMES[self.functions.qc_isa_active()]

    @property
    def available(self) -> tuple[str, ...]:
        """Instruction sets that can be used, best last."""
        return tuple(name for i, name in enumerate(ISA_NAMES) if self.functions.qc_isa_available(i))

    def use_isa(self, name: str) -> None:
        """Switches the whole process to another instruction set; not while anything runs.

        Raises:
            ValueError: this build or this processor does not have it.
        """
        if name not in self.available:
            raise ValueError(f"{name} is not available here; there is {', '.join(self.available)}")
        self.functions.qc_isa_use(ISA_NAMES.index(name))

    @property
    def bfloat16(self) -> Bfloat16:
        """Products of medium precision of the instruction set in use."""
        return Bfloat16(self.functions.qc_isa_bf16(self.functions.qc_isa_active()))

    def spin_for(self, microseconds: int) -> None:
        """How long helper threads look for work before they sleep: long suits an idle machine."""
        self.functions.qc_spin_for(microseconds)


@functools.cache
def native() -> NativeLibrary | None:
    """The library, loaded once; None where it was not built or cannot run."""
    return _load()[0]


@functools.cache
def status() -> NativeStatus:
    """What is active and why, for `quickchange doctor` and the log."""
    library, reason = _load()
    if library is None:
        return NativeStatus(None, (), reason)
    return NativeStatus(library.isa, library.available, reason)


@functools.cache
def _load() -> tuple[NativeLibrary | None, str]:
    path = _built_library()
    if path is None:
        return (
            None,
            "the native library was not built: at installation no C++ compiler was found, or it failed",
        )
    try:
        library = NativeLibrary(path)
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded ({error}); install quickchange again to build it anew"
    if library.isa == "generic":
        return None, "this processor has neither AVX2 with FMA, nor AVX-512, nor NEON"
    return library, f"{path.name}, {library.isa}"


def _built_library() -> Path | None:
    folder = Path(__file__).parent
    candidates = (folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)
