"""`quickchange doctor`: what a server would use on this machine, why, and what would make it faster.

Asks no server. Imports torch only to run.
"""

import argparse
import os
from typing import TYPE_CHECKING

from quickchange.commands.failure import CommandError
from quickchange.commands.options import add_command, add_json_option
from quickchange.commands.output import print_facts, print_json, size
from server.doctor import Device, Diagnosis, NativeKernels, Processor, examine

if TYPE_CHECKING:
    from quickchange.commands.options import Subparsers

_EXAMPLES = """\
  quickchange doctor
  quickchange doctor --json"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers, "doctor", "show what a server would use here, and what would make it faster", _EXAMPLES
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    diagnosis = examine(os.environ)
    if args.json:
        print_json(diagnosis)
    else:
        print_facts(_facts(diagnosis))
    if diagnosis.problem is not None:
        raise CommandError(diagnosis.problem)
    return 0


def _facts(found: Diagnosis) -> dict[str, str]:
    threads, memory = found.threads, found.memory
    variables = ", ".join(
        f"{name} unset" if value is None else f"{name}={value}" for name, value in threads.variables.items()
    )
    return {
        "server": "can run here" if found.problem is None else "cannot run here",
        **{name: version or "not installed" for name, version in found.versions.items()},
        "device": _device(found.device),
        "processor": _processor(found.processor),
        **_kernels(found.kernels),
        "threads": f"{threads.count or 'unknown'} ({variables})",
        "memory": f"{size(memory.free_bytes)} free of {size(memory.total_bytes)}" if memory else "unknown",
    }


def _device(device: Device | None) -> str:
    if device is None:
        return "unknown without torch"
    return f"{device.type} ({device.name or 'torch sees no CUDA device'})"


def _processor(processor: Processor) -> str:
    sets = processor.instruction_sets
    having = "instruction sets unknown" if sets is None else " ".join(sets) or "no instruction set that helps"
    return f"{processor.count} × {processor.name}, {processor.architecture}: {having}"


def _kernels(kernels: NativeKernels | None) -> dict[str, str]:
    if kernels is None:
        return {"native kernels": "unknown without torch"}
    return {
        "native kernels": f"active, {kernels.isa}" if kernels.active else "not active",
        "  reason": kernels.reason,
        "  available": ", ".join(kernels.available),
        "  precision": kernels.matmul_precision or "",
        "  remedy": kernels.remedy or "",
        "  gain": kernels.gain or "",
    }
