"""What the checks of an adapter found, item by item. Plain values; no files, no tensors."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from adapters.facts import Method

MAX_LISTED = 20
"""Of the problems of one check, and of unmatched tensors; the counts say how many there are in all."""


class Outcome(StrEnum):
    """How one check ended."""

    PASSED = "PASSED"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        detail: what was seen, what is wrong, or why it was skipped; one line.
        reason: UPPER_SNAKE code of the failure; empty unless it failed.
        problems: everything that is wrong, at most MAX_LISTED; empty unless it failed.
        problem_count: how many problems there are in all.
    """

    name: str
    outcome: Outcome
    detail: str
    reason: str = ""
    problems: tuple[str, ...] = ()
    problem_count: int = 0


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """What an adapter does to one module of the base.

    Attributes:
        scaling: factor on B @ A.
        norm: Frobenius norm of the update, scaling included; None if its values were not looked at.
    """

    module: str
    rank: int
    scaling: float
    norm: float | None = None


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """Everything that is known about an adapter, as far as the checks got.

    Attributes:
        base_fingerprint: of the base it was checked against.
        declared_base_fingerprint: of the base it says it was trained on; None if it does not say.
        checks: in the order in which they ran.
        modules: every module of the base that the configuration targets, in the base's order.
        unmatched_tensors: tensors of the file that no targeted module calls for, at most MAX_LISTED.
        unmatched_tensor_count: how many there are in all.
        dtype: storage types of the tensors, e.g. "F32", several joined with "+"; empty if unknown.
        delta_norm: Frobenius norm of the whole update; None if its values were not looked at.
    """

    base_fingerprint: str
    declared_base_fingerprint: str | None = None
    checks: tuple[Check, ...] = ()
    method: Method | None = None
    modules: tuple[ModuleUpdate, ...] = ()
    unmatched_tensors: tuple[str, ...] = ()
    unmatched_tensor_count: int = 0
    dtype: str = ""
    delta_norm: float | None = None

    @property
    def rank(self) -> int:
        """The largest of any module; 0 if unknown."""
        return max((module.rank for module in self.modules), default=0)

    def with_check(self, check: Check) -> "ValidationReport":
        """The same with one more check."""
        return replace(self, checks=(*self.checks, check))


def report_from(members: dict[str, Any]) -> ValidationReport:
    """The report that `dataclasses.asdict` and JSON made these members of."""
    checks = (
        Check(**(check | {"outcome": Outcome(check["outcome"]), "problems": tuple(check["problems"])}))
        for check in members["checks"]
    )
    return ValidationReport(
        **members
        | {
            "checks": tuple(checks),
            "modules": tuple(ModuleUpdate(**module) for module in members["modules"]),
            "unmatched_tensors": tuple(members["unmatched_tensors"]),
        }
    )
