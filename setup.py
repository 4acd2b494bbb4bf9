"""Builds the native kernels: one shared library with a plain C interface, loaded through ctypes.

All else about the package is in pyproject.toml. The kernels are optional: without a working C++ compiler the
installation succeeds, says so in one line, and every operation runs in plain torch.
"""

import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

NATIVE: Final = Path("kernels/native")

FLAGS: Final = (
    "-O3",
    "-fPIC",
    "-pthread",
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a·b + c is fused only where the source says so: every instruction set rounds alike
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
)

_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")

# What takes longest stands first: two compilers run at once. The generic kernels are only there to be
# compared with, and -O3 would spend half a minute on them.
SOURCES: Final = {
    "isa_generic.cpp": ("-O2",),
    "isa_avx512.cpp": _AVX512,
    "isa_avx512_bf16.cpp": (*_AVX512, "-mavx512bf16"),
    "isa_avx2.cpp": ("-mavx2", "-mfma"),
    "isa_neon.cpp": (),
    "library.cpp": (),
    "pool.cpp": (),
}
"""Flags of each source besides FLAGS. For another processor a source of an instruction set becomes empty."""

JOBS: Final = 2


class BuildKernels(build_ext):
    """Compiles each source with its own flags, and forgives a compiler that is missing or fails.

    CXX, CPPFLAGS, CFLAGS, CXXFLAGS and LDFLAGS are heeded; the options that Python itself was built with are
    not, because nothing of Python is in the library.
    """

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        if not (self.force or newer_group([*ext.sources, *ext.depends], str(library))):
            return
        # What an earlier build left must not be taken for the result of this one.
        library.unlink(missing_ok=True)
        try:
            self._compile_and_link(ext.sources, library)
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"quickchange: native kernels were NOT built ({_reason(error)}); all works without them, but "
                "decoding on a CPU is much slower. Install a C++ compiler such as g++ and install again; "
                "`quickchange doctor` says more.",
                flush=True,
            )

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)  # it would not fit the new sources
        super().copy_extensions_to_source()

    def _compile_and_link(self, sources: Sequence[str], library: Path) -> None:
        compiler = _compiler()
        objects_folder = Path(self.build_temp)
        for folder in (objects_folder, library.parent):
            folder.mkdir(parents=True, exist_ok=True)

        def compiled(source: str) -> str:
            target = str(objects_folder / Path(source).with_suffix(".o").name)
            # Ours come last: how results round is no choice of the environment.
            given = _environment_flags("CPPFLAGS", "CFLAGS", "CXXFLAGS")
            flags = (*given, *FLAGS, *self._flags_of(source))
            subprocess.run([*compiler, *flags, "-c", source, "-o", target], check=True)
            return target

        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(compiled, sources))
        subprocess.run(
            [*compiler, "-shared", "-pthread", *objects, "-o", str(library), *_environment_flags("LDFLAGS")],
            check=True,
        )

    def _flags_of(self, source: str) -> tuple[str, ...]:
        flags = SOURCES[Path(source).name]
        if self.plat_name.endswith("x86_64"):
            return flags
        return tuple(flag for flag in flags if not flag.startswith("-m"))


def _compiler() -> list[str]:
    """CXX, or else the first that is there; Python may name one that only its own builders had."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen
    for name in (sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(name or "")
        if words and shutil.which(words[0]):
            return words
    raise FileNotFoundError("no C++ compiler was found")


def _environment_flags(*names: str) -> list[str]:
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} failed with status {error.returncode}"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


# A free-threaded Python has no stable binary interface; the wheel then carries the tag of that Python.
WHEEL_TAG: Final = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp311"}

setup(
    ext_modules=[
        Extension(
            "kernels._native",
            sources=[str(NATIVE / name) for name in SOURCES],
            depends=[*sorted(map(str, NATIVE.glob("*.h"))), "setup.py"],
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": WHEEL_TAG},
)
