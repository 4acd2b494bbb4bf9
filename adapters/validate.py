"""The checks an adapter passes before anyone may use it, cheapest first. Knows neither store nor model.

Every check runs that can: a refusal names all that is wrong, not the first thing alone. Memory does not grow
with the adapter: its factors are looked at one module after another.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.bundle import Bundle, check_base, read_bundle
from adapters.errors import AdapterError, InvalidAdapterError, raise_first
from adapters.facts import AdapterFacts
from adapters.files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.layout import BaseLayout
from adapters.measures import Measures, in_digest_order, measure
from adapters.report import MAX_LISTED, Check, ModuleUpdate, Outcome, ValidationReport
from adapters.spec import MAX_CONFIG_BYTES, AdapterSpec, parse_spec
from adapters.strict_json import brief
from adapters.weights import TensorInfo, check_tensors, expected_tensors, read_header, read_pairs

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_SHOWN_CHARS = 160


@dataclass(frozen=True, slots=True)
class Examination:
    """What came of examining an adapter.

    Attributes:
        report: every check, and what is known of the adapter.
        facts: of an adapter that passed; None otherwise.
        bundle: its manifest; None if it has none, or none that can be read.
        error: the first check's failure; None if all passed.
    """

    report: ValidationReport
    facts: AdapterFacts | None
    bundle: Bundle | None
    error: AdapterError | None


def validate_adapter(
    directory: Path, layout: BaseLayout, *, max_rank: int, beside: Collection[str] = ()
) -> AdapterFacts:
    """Checks everything about an adapter against a base; what passes can be applied as it is.

    Args:
        directory: holds adapter_config.json, adapter_model.safetensors, perhaps quickchange.json, no more.
        max_rank: the largest rank of any module that is taken.
        beside: names of files that may lie there and are no part of it, such as a model card on its author's
            machine; a server allows none.

    Raises:
        InvalidAdapterError, UnsupportedAdapterError, WrongBaseError: the message names what is wrong, and its
            report everything else that is.
    """
    examination = examine_adapter(directory, layout, max_rank=max_rank, beside=beside)
    if examination.facts is None:
        assert examination.error is not None, "no facts without an error"
        raise examination.error
    return examination.facts


def examine_adapter(
    directory: Path, layout: BaseLayout, *, max_rank: int, beside: Collection[str] = ()
) -> Examination:
    """The same checks as `validate_adapter`, with their report whether they pass or not."""
    return _Examiner(directory, layout, max_rank, beside).examine()


class _Skipped(str):
    """Why a check was not needed; a check that returns any other text has passed."""


class _Examiner:
    """Runs the checks in order. Each needs others to have passed, and keeps what later ones need."""

    _spec: AdapterSpec
    _header: Mapping[str, TensorInfo]
    _measures: Measures

    def __init__(self, directory: Path, layout: BaseLayout, max_rank: int, beside: Collection[str]) -> None:
        self._directory, self._layout, self._max_rank = directory, layout, max_rank
        self._beside = beside
        self._bundle: Bundle | None = None
        self._report = ValidationReport(layout.fingerprint)
        self._errors: list[AdapterError] = []
        self._blocked: set[str] = set()
        """Checks that failed, or that could not run because of one that did."""

    def examine(self) -> Examination:
        steps: tuple[tuple[str, Callable[[], str], tuple[str, ...]], ...] = (
            ("files", self._check_files, ()),
            ("configuration", self._check_configuration, ()),
            ("manifest", self._check_manifest, ()),
            ("base", self._check_base, ("manifest",)),
            ("modules", self._check_modules, ("configuration",)),
            ("ranks", self._check_ranks, ("modules",)),
            ("header", self._check_header, ()),
            ("tensors", self._check_tensors, ("modules", "header")),
            # The only costly one: not of what is refused anyway.
            ("values", self._check_values, ("files", "configuration", "base", "ranks", "tensors")),
        )
        for name, check, needs in steps:
            done = self._run(name, check, needs)  # which adds to the report
            self._report = self._report.with_check(done)
        error = next(iter(self._errors), None)
        if error is not None:
            error.report = self._report
        return Examination(self._report, None if error else self._facts(), self._bundle, error)

    def _run(self, name: str, check: Callable[[], str], needs: tuple[str, ...]) -> Check:
        blocking = next((need for need in needs if need in self._blocked), None)
        if blocking is not None:
            self._blocked.add(name)
            return Check(name, Outcome.SKIPPED, f"needs the check of {blocking} to pass")
        try:
            detail = check()
        except AdapterError as error:
            self._errors.append(error)
            self._blocked.add(name)
            return failed(name, error)
        return Check(name, Outcome.SKIPPED if isinstance(detail, _Skipped) else Outcome.PASSED, detail)

    # The checks, each of which returns what it saw

    def _check_files(self) -> str:
        names = sorted(entry.name for entry in self._files())
        raise_first(_unwelcome(name) for name in names if name not in ADAPTER_FILES)
        return ", ".join(names)

    def _check_configuration(self) -> str:
        self._spec = parse_spec(read_bounded(self._directory / CONFIG_FILE, MAX_CONFIG_BYTES))
        self._report = replace(self._report, method=self._spec.method)
        return f"{self._spec.method}, r {self._spec.rank}, alpha {self._spec.alpha:g}"

    def _check_manifest(self) -> str:
        self._bundle = read_bundle(self._directory)
        if self._bundle is None:
            return _Skipped("there is none")
        self._report = replace(self._report, declared_base_fingerprint=self._bundle.base_fingerprint)
        return ", ".join(self._bundle.canonical())

    def _check_base(self) -> str:
        check_base(self._bundle.base_fingerprint if self._bundle else None, self._layout)
        if self._bundle is None:
            return _Skipped("the adapter does not say for which base it was made")
        return "the one it was made for"

    def _check_modules(self) -> str:
        planned = self._spec.ranks_and_scalings(self._layout)
        modules = tuple(ModuleUpdate(name, rank, scaling) for name, (rank, scaling) in planned.items())
        self._report = replace(self._report, modules=modules)
        return f"{len(modules)} of the base's {len(self._layout.modules)} linear modules"

    def _check_ranks(self) -> str:
        raise_first(
            InvalidAdapterError(
                f"{module.module} has rank {module.rank}, this server takes at most {self._max_rank}; "
                "retrain with a smaller r",
                reason="RANK_TOO_LARGE",
            )
            for module in self._report.modules
            if module.rank > self._max_rank
        )
        return f"at most {self._report.rank}, of the {self._max_rank} that are taken"

    def _check_header(self) -> str:
        self._header = read_header(self._directory / WEIGHTS_FILE)
        dtype = "+".join(sorted({info.dtype for info in self._header.values()}))
        self._report = replace(self._report, dtype=dtype)
        return f"{len(self._header)} tensors of {dtype or 'no type'}"

    def _check_tensors(self) -> str:
        ranks = {module.module: module.rank for module in self._report.modules}
        expected = expected_tensors(self._spec, ranks, self._layout)
        unmatched = [name for name in self._header if name not in expected]
        self._report = replace(
            self._report,
            unmatched_tensors=tuple(map(_shown, unmatched[:MAX_LISTED])),
            unmatched_tensor_count=len(unmatched),
        )
        check_tensors(self._header, expected, self._layout)
        return f"all {len(expected)}, of the right shapes"

    def _check_values(self) -> str:
        modules = self._report.modules
        names = in_digest_order(module.module for module in modules)
        self._measures = measure(
            self._spec,
            self._bundle,
            {module.module: module.scaling for module in modules},
            read_pairs(self._directory / WEIGHTS_FILE, self._header, names),
        )
        self._report = replace(
            self._report,
            modules=tuple(replace(module, norm=self._measures.norms[module.module]) for module in modules),
            delta_norm=self._measures.delta_norm,
        )
        return f"finite, |ΔW| {self._measures.delta_norm:.4g}"

    def _files(self) -> "Iterator[os.DirEntry[str]]":
        return (entry for entry in os.scandir(self._directory) if entry.name not in self._beside)

    def _facts(self) -> AdapterFacts:
        report, measures = self._report, self._measures
        return AdapterFacts(
            digest=measures.digest,
            method=self._spec.method,
            rank=report.rank,
            alpha=self._spec.alpha,
            target_modules=_as_tuple(self._spec),
            size_bytes=sum(entry.stat(follow_symlinks=False).st_size for entry in self._files()),
            base_fingerprint=self._layout.fingerprint,
            matched_modules=tuple(module.module for module in report.modules),
            delta_norm=measures.delta_norm,
            dtype=report.dtype,
            parameter_count=measures.parameter_count,
        )


def failed(name: str, error: AdapterError) -> Check:
    """The check that an error ended."""
    return Check(name, Outcome.FAILED, str(error), error.reason, error.problems, error.problem_count)


def _unwelcome(name: str) -> InvalidAdapterError:
    if name.endswith(_PICKLE_SUFFIXES):
        return InvalidAdapterError(
            f"{brief(name)} is a pickle, which could run code and is never read; save with "
            "save_pretrained(…, safe_serialization=True)",
            reason="PICKLE_REFUSED",
        )
    return InvalidAdapterError(
        f"{brief(name)} is not a file of an adapter; send only {', '.join(ADAPTER_FILES)}",
        reason="UNEXPECTED_FILE",
    )


def _shown(name: str) -> str:
    """A tensor's name as it is, unless it is long or does not print."""
    return name if name.isprintable() and len(name) <= _MAX_SHOWN_CHARS else brief(name)


def _as_tuple(spec: AdapterSpec) -> tuple[str, ...]:
    return (spec.target_modules,) if isinstance(spec.target_modules, str) else spec.target_modules
