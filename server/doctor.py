"""What a server would find on this machine, and what is missing. Decides nothing; needs no torch."""

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NATIVE_GAIN: Final = "on a CPU two to four times the decode steps per second; docs/performance.md has figures"

BUILD_REMEDY: Final = (
    "install a C++ compiler such as g++, then run pip install again with --force-reinstall --no-cache-dir; "
    "in a checkout, `make kernels`"
)

_OURS: Final = frozenset({"quickchange", "server", "adapters", "training", "kernels"})
_PACKAGES: Final = ("quickchange", "torch", "transformers", "bitsandbytes", "peft")
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_TELLING_SETS: Final = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "amx_bf16"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
"""The instruction sets that matrix products are fast or slow by, as Linux calls them."""


@dataclass(frozen=True, slots=True)
class Processor:
    """
    Attributes:
        count: processors that this process may use.
        instruction_sets: those of `_TELLING_SETS` that it has; None where the system does not say.
    """

    name: str
    architecture: str
    count: int
    instruction_sets: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the host, as the server plans with it."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """
    Attributes:
        type: cuda or cpu; where `--device auto` puts the base.
        name: of the GPU, None on a CPU.
    """

    type: str
    name: str | None


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """
    Attributes:
        isa: instruction set in use, None if inactive.
        available: every instruction set that the build has and the processor can run.
        reason: why it is as it is.
        remedy: what would make it better; None if nothing would.
        gain: what being active would bring, None if they are active or cannot be.
        matmul_precision: what `--matmul-precision auto` is here, and why; None if inactive.
    """

    active: bool
    isa: str | None
    available: tuple[str, ...]
    reason: str
    remedy: str | None
    gain: str | None
    matmul_precision: str | None


@dataclass(frozen=True, slots=True)
class Threads:
    """
    Attributes:
        count: of torch's operators, None without torch.
        variables: what the environment says about them, None where it says nothing.
    """

    count: int | None
    variables: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """
    Attributes:
        problem: why no server can run here, with the remedy, in one line; None if one can.
        versions: by package, None for one that is not installed.
        device, kernels: None if torch cannot be imported.
        memory: None if psutil cannot be imported.
    """

    problem: str | None
    versions: Mapping[str, str | None]
    device: Device | None
    processor: Processor
    kernels: NativeKernels | None
    threads: Threads
    memory: Memory | None


def examine(environ: Mapping[str, str]) -> Diagnosis:
    """Looks at everything that a server depends on; imports what it would import.

    Args:
        environ: normally os.environ.
    """
    processor = this_processor()
    without_torch = _import_problem("torch")
    has_torch = without_torch is None
    return Diagnosis(
        problem=without_torch or _import_problem("server.app"),
        versions={"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        device=_device() if has_torch else None,
        processor=processor,
        kernels=_native_kernels(processor) if has_torch else None,
        threads=Threads(
            _thread_count() if has_torch else None, {name: environ.get(name) for name in _THREAD_VARIABLES}
        ),
        memory=_memory(),
    )


def this_processor() -> Processor:
    """What this process runs on."""
    return processor_of(_read(Path("/proc/cpuinfo")))


def processor_of(cpuinfo: str) -> Processor:
    """From the text of Linux's /proc/cpuinfo, which may be empty."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    fields = {name.strip().lower(): value.strip() for name, _, value in lines}
    sets = fields.get("flags", fields.get("features"))
    return Processor(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        instruction_sets=None if sets is None else tuple(s for s in _TELLING_SETS if s in sets.split()),
    )


def _can_run_native(processor: Processor) -> bool:
    """Whether there are kernels for it; where the system does not say, there may be."""
    sets = processor.instruction_sets
    return sets is None or {"avx2", "fma"} <= set(sets) or "asimd" in sets


def _native_kernels(processor: Processor) -> NativeKernels:
    from kernels.library import status
    from kernels.precision import automatic_precision

    now = status()
    possible = now.active or _can_run_native(processor)
    return NativeKernels(
        active=now.active,
        isa=now.isa,
        available=now.available,
        reason=now.reason,
        remedy=BUILD_REMEDY if possible and not now.active else None,
        gain=None if now.active or not possible else NATIVE_GAIN,
        matmul_precision=": ".join(automatic_precision()) if now.active else None,
    )


def _import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that is broken may raise anything; its words help most
        missing = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and missing not in _OURS:
            return f"a server needs the package {missing}: pip install 'quickchange[server]'"
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{module} cannot be imported ({reason}): pip install --force-reinstall 'quickchange[server]'"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Device:
    import torch

    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name())
    return Device("cpu", None)


def _thread_count() -> int:
    import torch

    return torch.get_num_threads()


def _memory() -> Memory | None:
    if _import_problem("psutil") is not None:
        return None
    from adapters import host_memory

    now = host_memory.now()
    return Memory(now.available_bytes, now.total_bytes)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
