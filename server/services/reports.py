"""What an adapter's checks found, as a message: whole in an answer, within bounds in a refusal."""

from typing import Final

from adapters.report import Check, ModuleUpdate, ValidationReport
from quickchange.v1 import adapters_pb2

_REFUSAL_BYTES: Final = 2400
"""Of a report among the trailers of a call: a client takes 8 KiB of them, base64 and all."""
_CUTS: Final = ((20, 240), (8, 240), (4, 160), (2, 120), (0, 100))
"""How many problems and names of each list, and bytes of each line; the last one always fits."""


def report(found: ValidationReport) -> adapters_pb2.ValidationReport:
    """All of it."""
    message = _summary(found)
    message.matched_modules.extend(module.module for module in found.modules)
    message.modules.extend(map(_module, found.modules))
    message.unmatched_tensors.extend(found.unmatched_tensors)
    message.checks.extend(map(_check, found.checks))
    return message


def refusal(found: ValidationReport) -> adapters_pb2.ValidationReport:
    """As much of it as a status can carry: every check, and of each list the first ones."""
    for listed, line_bytes in _CUTS:
        message = _summary(found)
        message.unmatched_tensors.extend(_line(name, line_bytes) for name in found.unmatched_tensors[:listed])
        message.checks.extend(_cut(_check(check), listed, line_bytes) for check in found.checks)
        if message.ByteSize() <= _REFUSAL_BYTES:
            break
    return message


def _summary(found: ValidationReport) -> adapters_pb2.ValidationReport:
    message = adapters_pb2.ValidationReport(
        rank=found.rank,
        delta_norm=found.delta_norm or 0.0,
        dtype=found.dtype,
        matched_module_count=len(found.modules),
        unmatched_tensor_count=found.unmatched_tensor_count,
        base_fingerprint=found.base_fingerprint,
        declared_base_fingerprint=found.declared_base_fingerprint,
    )
    if found.method is not None:
        message.method = adapters_pb2.AdapterMethod.Value(f"ADAPTER_METHOD_{found.method.upper()}")
    return message


def _module(module: ModuleUpdate) -> adapters_pb2.ModuleUpdate:
    return adapters_pb2.ModuleUpdate(
        module=module.module, rank=module.rank, scaling=module.scaling, norm=module.norm
    )


def _check(check: Check) -> adapters_pb2.ValidationCheck:
    return adapters_pb2.ValidationCheck(
        name=check.name,
        outcome=adapters_pb2.CheckOutcome.Value(f"CHECK_OUTCOME_{check.outcome.name}"),
        detail=check.detail,
        reason=check.reason,
        problems=check.problems[1:],  # the first one is the detail
        problem_count=check.problem_count,
    )


def _cut(check: adapters_pb2.ValidationCheck, listed: int, line_bytes: int) -> adapters_pb2.ValidationCheck:
    problems = [_line(problem, line_bytes) for problem in check.problems[:listed]]
    check.detail = _line(check.detail, line_bytes)
    del check.problems[:]
    check.problems.extend(problems)
    return check


def _line(text: str, limit_bytes: int) -> str:
    raw = text.encode()
    return text if len(raw) <= limit_bytes else raw[:limit_bytes].decode(errors="ignore") + "…"
