"""Reports as messages: whole in an answer, and in a refusal no larger than trailers may be."""

import urllib.parse

from adapters.errors import InvalidAdapterError
from adapters.report import Check, ModuleUpdate, Outcome, ValidationReport
from quickchange.reports import validation_report
from quickchange.types import CheckOutcome
from quickchange.v1 import adapters_pb2
from server.services import reports
from server.services.statuses import status_of

TRAILER_BYTES = 8192  # what gRPC takes, unless it is told otherwise


def found(problems: int, length: int, text: str = "x") -> ValidationReport:
    lines = tuple(f"{index} {text * length}" for index in range(problems))
    checks = tuple(
        Check(f"check{index}", Outcome.FAILED, lines[0], "SOME_LONG_REASON", lines, 10_000)
        for index in range(10)
    )
    return ValidationReport(
        base_fingerprint="sha256:" + "0" * 64,
        declared_base_fingerprint="sha256:" + "1" * 64,
        checks=checks,
        method="rslora",
        modules=tuple(ModuleUpdate(f"model.layers.{i}.q_proj", 8, 0.5, None) for i in range(500)),
        unmatched_tensors=lines,
        unmatched_tensor_count=10_000,
        dtype="BF16",
    )


def test_an_answer_has_all_of_it() -> None:
    message = reports.report(found(20, 300))
    assert len(message.modules) == len(message.matched_modules) == message.matched_module_count == 500
    assert [len(check.problems) for check in message.checks] == [19] * 10  # and the one in detail
    report = validation_report(message)
    assert report.method == "rslora"
    assert report.modules[3].norm is None
    assert report.checks[0].outcome is CheckOutcome.FAILED
    assert report.checks[0].problems == found(20, 300).checks[0].problems


def test_a_refusal_says_what_it_can_within_what_trailers_hold() -> None:
    for problems in (1, 2, 20):
        for length in (0, 10, 1000):
            for text in ("x", "ä", "深", "\U0001f600"):
                report = found(problems, length, text)
                error = InvalidAdapterError(text * length or "short")
                error.report = report
                status = status_of(error)
                message = adapters_pb2.ValidationReport()
                assert status.details[-1].Unpack(message)
                assert [check.name for check in message.checks] == [check.name for check in report.checks]
                assert all(check.problem_count == 10_000 for check in message.checks)
                assert message.matched_module_count == 500
                details = len(status.SerializeToString()) * 4 / 3  # base64
                plain = len(urllib.parse.quote(status.message))
                assert details + plain < TRAILER_BYTES, (problems, length, text)


def test_a_short_refusal_is_whole() -> None:
    report = ValidationReport(
        base_fingerprint="sha256:" + "0" * 64,
        checks=(
            Check("files", Outcome.PASSED, "two"),
            Check(
                "tensors", Outcome.FAILED, "a is unknown", "UNKNOWN_TENSOR", ("a is unknown", "b is too"), 2
            ),
        ),
        unmatched_tensors=("a", "b"),
        unmatched_tensor_count=2,
    )
    message = reports.refusal(report)
    assert list(message.unmatched_tensors) == ["a", "b"]
    decoded = validation_report(message)
    assert decoded.checks[1].problems == ("a is unknown", "b is too")
    assert decoded.checks[0].problems == ()
    assert decoded.declared_base_fingerprint is None


def test_an_old_client_sees_what_it_knew() -> None:
    """The first four fields, and no field of the rest, are those of the first release."""
    message = reports.report(found(1, 1))
    fields = adapters_pb2.ValidationReport.DESCRIPTOR.fields_by_number
    assert [fields[number].name for number in (1, 2, 3, 4)] == [
        "matched_modules", "rank", "delta_norm", "dtype",
    ]  # fmt: skip
    assert (message.rank, message.dtype, message.delta_norm) == (8, "BF16", 0.0)
