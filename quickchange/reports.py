"""A validation report out of its message. Knows nothing of calls and errors."""

from quickchange import types
from quickchange.enums import named
from quickchange.v1 import adapters_pb2


def validation_report(message: adapters_pb2.ValidationReport) -> types.ValidationReport:
    """Of an answer, or of the details of a refusal."""
    return types.ValidationReport(
        matched_modules=tuple(message.matched_modules),
        rank=message.rank,
        delta_norm=message.delta_norm,
        dtype=message.dtype,
        checks=tuple(map(_check, message.checks)),
        modules=tuple(map(_module, message.modules)),
        matched_module_count=message.matched_module_count or len(message.matched_modules),
        unmatched_tensors=tuple(message.unmatched_tensors),
        unmatched_tensor_count=message.unmatched_tensor_count,
        base_fingerprint=message.base_fingerprint,
        declared_base_fingerprint=(
            message.declared_base_fingerprint if message.HasField("declared_base_fingerprint") else None
        ),
        method=named(
            types.AdapterMethod, adapters_pb2.AdapterMethod.DESCRIPTOR, "ADAPTER_METHOD_", message.method
        ),
    )


def _check(message: adapters_pb2.ValidationCheck) -> types.ValidationCheck:
    outcome = named(
        types.CheckOutcome, adapters_pb2.CheckOutcome.DESCRIPTOR, "CHECK_OUTCOME_", message.outcome
    )
    problems = (message.detail, *message.problems) if outcome is types.CheckOutcome.FAILED else ()
    return types.ValidationCheck(
        name=message.name,
        outcome=outcome,
        detail=message.detail,
        reason=message.reason,
        problems=problems,
        problem_count=message.problem_count,
    )


def _module(message: adapters_pb2.ModuleUpdate) -> types.ModuleUpdate:
    return types.ModuleUpdate(
        module=message.module,
        rank=message.rank,
        scaling=message.scaling,
        norm=message.norm if message.HasField("norm") else None,
    )
