"""How a validation report reads on a terminal. Knows no command."""

import sys
from collections.abc import Iterator
from typing import TextIO

from quickchange.types import CheckOutcome, ValidationCheck, ValidationReport

_MARKS = {
    CheckOutcome.PASSED: "ok",
    CheckOutcome.FAILED: "FAILED",
    CheckOutcome.SKIPPED: "-",
    CheckOutcome.UNKNOWN: "?",
}


def print_report(report: ValidationReport, file: TextIO | None = None) -> None:
    """Every check, all that is wrong, and every module that is changed."""
    for line in (*_checks(report), *_unmatched(report), *_modules(report)):
        print(line, file=file or sys.stdout)


def summary(report: ValidationReport) -> str:
    """One line about an adapter that passed, and whether its canary was replayed."""
    canary = report.check("canary")
    parts = [f"rank {report.rank}", f"{report.matched_module_count} modules", f"|ΔW| {report.delta_norm:.4g}"]
    if canary is not None:
        parts.append(f"canary {canary.outcome}: {canary.detail}")
    return ", ".join(parts)


def _checks(report: ValidationReport) -> Iterator[str]:
    width = max((len(check.name) for check in report.checks), default=0)
    for check in report.checks:
        yield f"{_MARKS[check.outcome]:<6}  {check.name.ljust(width)}  {_reason(check)}{check.detail}"
        for problem in check.problems[1:]:
            yield f"{'':<6}  {'':<{width}}  {problem}"
        missing = check.problem_count - len(check.problems)
        if check.problems and missing > 0:
            yield f"{'':<6}  {'':<{width}}  … and {missing} more"


def _reason(check: ValidationCheck) -> str:
    return f"{check.reason}: " if check.reason else ""


def _unmatched(report: ValidationReport) -> Iterator[str]:
    if not report.unmatched_tensor_count:
        return
    yield f"tensors that no targeted module has: {report.unmatched_tensor_count}"
    yield from (f"  {name}" for name in report.unmatched_tensors)
    missing = report.unmatched_tensor_count - len(report.unmatched_tensors)
    if missing:
        yield f"  … and {missing} more"


def _modules(report: ValidationReport) -> Iterator[str]:
    if not report.modules:
        return
    width = max(len(module.module) for module in report.modules)
    yield f"{'module'.ljust(width)}  rank  scaling  |ΔW|"
    for module in report.modules:
        norm = "?" if module.norm is None else f"{module.norm:.4g}"
        yield f"{module.module.ljust(width)}  {module.rank:>4}  {module.scaling:>7.4g}  {norm}"
