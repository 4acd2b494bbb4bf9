"""Owns what follows a publication: the new version against the one that an alias has, and the alias's move.

The alias moves only if the new version is better by a stated rule, and only from where it was when the two
were compared: nobody else's move is overwritten. Knows the public client, as any user does, and no training.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quickchange import AbortedError, Client, NotFoundError, QuickchangeError
from training.cases import Case, cases_of
from training.comparison import Difference, plain_difference
from training.data import sides
from training.errors import EvaluationError, PublishError, RecipeError
from training.evaluation import Answered, Evaluation, evaluate
from training.live import LiveModel
from training.metrics import is_json
from training.recipe import Recipe
from training.rows import read_rows

PROMOTION_FILE: Final = "promotion.json"
MIN_ROWS: Final = 10
"""Of fewer rows an interval says too little: a few lucky ones leave it above nought."""

_MAX_LABEL_CHARS: Final = 256


@dataclass(frozen=True, slots=True)
class Promotion:
    """What became of a published version.

    Attributes:
        reference: "name@version".
        alias: "name:alias".
        against: what the alias had, "name@version", or "base".
        difference: of the metric that decides; None if they were not compared.
    """

    reference: str
    alias: str
    against: str
    promoted: bool
    reason: str
    difference: Difference | None

    def __str__(self) -> str:
        verdict = f"{self.alias} is {self.reference} now" if self.promoted else f"{self.alias} was not moved"
        return f"{verdict}: {self.reason}"


def promotion_cases(recipe: Recipe) -> list[Case]:
    """The held-out rows that decide; none if nothing is compared.

    Raises:
        DataError, RecipeError: they cannot be asked, are too few, or have no such metric.
    """
    if recipe.promote_if in (None, "always"):
        return []
    _, held_out = sides(recipe, read_rows(recipe.data))
    cases = cases_of(held_out, source=recipe.eval_data or recipe.data)
    check_cases(recipe, cases)
    return cases


def check_cases(recipe: Recipe, cases: Sequence[Case]) -> None:
    """Finds out before training whether the rows that are held out can decide anything.

    Raises:
        RecipeError: there are too few, or they have no such metric.
    """
    if len(cases) < MIN_ROWS:
        raise RecipeError(
            f"promote_if is {recipe.promote_if}, which needs {MIN_ROWS} held-out rows, and there are "
            f"{len(cases)}; raise eval_fraction or give eval_data with more"
        )
    if recipe.promote_metric.startswith("json") and not any(is_json(case.reference) for case in cases):
        raise RecipeError(
            f"promote_metric is {recipe.promote_metric}, and no held-out answer is JSON; choose another"
        )


def promote(
    recipe: Recipe,
    reference: str,
    cases: Sequence[Case],
    artefacts: Path,
    *,
    max_new_tokens: int,
    progress: bool,
) -> Promotion:
    """Compares, decides, moves the alias, and records why: in promotion.json and as labels of the version.

    Args:
        reference: "name@version", just published.
        artefacts: the folder that gets promotion.json.

    Raises:
        PublishError: the server failed meanwhile; the message says what stands.
    """
    assert recipe.publish is not None
    with Client(recipe.publish) as client:
        return _Candidate(client, recipe, reference, artefacts).run(cases, max_new_tokens, progress)


class _Candidate:
    """One published version on its way to an alias."""

    def __init__(self, client: Client, recipe: Recipe, reference: str, artefacts: Path) -> None:
        self._client, self._recipe, self._reference = client, recipe, reference
        self._artefacts = artefacts
        self._alias = f"{recipe.name}:{recipe.promoted_alias}"

    def run(self, cases: Sequence[Case], max_new_tokens: int, progress: bool) -> Promotion:
        try:
            holder = self._holder()
            against = f"{self._recipe.name}@{holder}" if holder else "base"
            evaluation = self._compared(against if holder else "", cases, max_new_tokens, progress)
        except (QuickchangeError, EvaluationError) as error:
            raise self._failed("was not compared", f"{self._alias} is where it was", error) from error
        promoted, reason = self._judged(against, evaluation)
        if promoted:
            promoted, reason = self._moved(holder, reason)
        difference = None if evaluation is None else self._decisive(evaluation)
        promotion = Promotion(self._reference, self._alias, against, promoted, reason, difference)
        write_record(self._artefacts, promotion, evaluation, self._recipe)
        self._label(promotion)
        return promotion

    def _holder(self) -> int:
        """The version that the alias has; 0 for none."""
        try:
            return self._client.adapters.get(self._alias).version
        except NotFoundError:
            return 0

    def _compared(
        self, against: str, cases: Sequence[Case], max_new_tokens: int, progress: bool
    ) -> Evaluation | None:
        if self._recipe.promote_if == "always" or against == self._reference:
            return None
        ours, theirs = (
            Answered(
                name or "base",
                LiveModel(self._client, name, max_new_tokens).answers(cases, progress=progress),
            )
            for name in (self._reference, against)
        )
        return evaluate(cases, ours, theirs)

    def _judged(self, against: str, evaluation: Evaluation | None) -> tuple[bool, str]:
        if against == self._reference:
            return False, f"it is {self._reference} already, the same content"
        if evaluation is None:
            return True, f"promote_if is always; it had {against}"
        is_better, seen = judged(self._decisive(evaluation), self._recipe.promote_margin)
        if self._recipe.promote_if == "never":
            return False, f"promote_if is never; against {against}, {seen}"
        return is_better, f"{'better' if is_better else 'not better'} than {against}, {seen}"

    def _moved(self, holder: int, reason: str) -> tuple[bool, str]:
        name, _, version = self._reference.partition("@")
        try:
            self._client.adapters.alias(name, self._recipe.promoted_alias, int(version), from_version=holder)
        except AbortedError as error:
            return False, f"somebody else moved it meanwhile ({error.message}); {reason}"
        except QuickchangeError as error:
            what = f"whether {self._alias} moved is not known: `quickchange adapters list` shows it"
            raise self._failed("was to be promoted", what, error) from error
        return True, reason

    def _decisive(self, evaluation: Evaluation) -> Difference:
        metric = self._recipe.promote_metric
        return next(difference for difference in evaluation.differences if difference.name == metric)

    def _label(self, promotion: Promotion) -> None:
        try:
            labels = dict(self._client.adapters.get(self._reference).labels)
            self._client.adapters.set_labels(self._reference, labels | _labels(promotion))
        except QuickchangeError as error:
            raise self._failed("has no labels that say why", str(promotion), error) from error

    def _failed(self, what: str, state: str, error: Exception) -> PublishError:
        version = self._reference.partition("@")[2]
        return PublishError(
            f"{self._reference} is published at {self._recipe.publish} and stays, but it {what}: {error}; "
            f"{state}; compare with `quickchange evaluate --against {self._alias}`, and promote with "
            f"`quickchange adapters alias {self._recipe.name} {self._recipe.promoted_alias} {version}`"
        )


def judged(difference: Difference, margin: float) -> tuple[bool, str]:
    """Whether the lower end of the difference's interval is above the margin, and what was seen."""
    interval = difference.interval
    seen = (
        f"{difference.name} {difference.value:+.4g} [{interval.low:.4g}, {interval.high:.4g}], better on "
        f"{difference.wins} rows and worse on {difference.losses} of "
        f"{difference.wins + difference.losses + difference.ties}; margin {margin:g}"
    )
    return interval.low > margin, seen  # NaN fails too


def write_record(
    artefacts: Path, promotion: Promotion, evaluation: Evaluation | None, recipe: Recipe
) -> None:
    """promotion.json, whole or not at all."""
    record: dict[str, Any] = {
        "format": 1,
        "reference": promotion.reference,
        "alias": promotion.alias,
        "against": promotion.against,
        "promoted": promotion.promoted,
        "reason": promotion.reason,
        "rule": {
            "promote_if": recipe.promote_if,
            "metric": recipe.promote_metric,
            "margin": recipe.promote_margin,
        },
    }
    if promotion.difference is not None:
        record["difference"] = plain_difference(promotion.difference)
    if evaluation is not None:
        record["evaluation"] = evaluation.to_mapping()
    staged = artefacts / f".{PROMOTION_FILE}"
    staged.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, artefacts / PROMOTION_FILE)


def _labels(promotion: Promotion) -> dict[str, str]:
    """Within the registry's rules: short and printable."""
    reason = "".join(character for character in promotion.reason if character.isprintable())
    return {
        "promotion": "promoted" if promotion.promoted else "not-promoted",
        "promotion/alias": promotion.alias.partition(":")[2],
        "promotion/against": promotion.against,
        "promotion/reason": reason[:_MAX_LABEL_CHARS],
    }
