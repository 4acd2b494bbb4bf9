"""Owns what is measured of answers: each metric as sums over rows, and the figure that the sums give.

A metric is additive: every row has a few statistics, and the figure of any set of rows is a function of
their sums. That gives sacreBLEU's corpus-level BLEU and chrF, and any bootstrap, from one pass over the rows.
Knows no server and no intervals.

N rows, K statistics of a row.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from training.cases import Answer

Array = NDArray[np.float64]
Better = Literal["higher", "lower", "neither"]

# Of answers shorter than four words only the orders that exist count; of longer ones it changes nothing.
_BLEU: Final = BLEU(effective_order=True)
_CHRF: Final = CHRF()
_NO_JSON: Final = object()


@dataclass(frozen=True, slots=True)
class RowLoss:
    """Of a reference answer: the sum over its tokens, the one that ends it included, in nats."""

    nats: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Metric:
    """
    Attributes:
        name: in files and options.
        title: for people.
        better: which way is better, if any.
        is_rate: hits by cases, from 0 to 1.
        figure: from the K sums over any rows; NaN if there is nothing to measure in them.
    """

    name: str
    title: str
    better: Better
    is_rate: bool
    figure: Callable[[Array], float]


@dataclass(frozen=True, slots=True)
class Sample:
    """A metric's statistics [N, K] of every row; of a row that does not count they are nought."""

    metric: Metric
    stats_NK: Array

    @property
    def figure(self) -> float:
        """Of all rows."""
        return self.metric.figure(self.stats_NK.sum(axis=0))

    @property
    def counted(self) -> Any:
        """[N]: which rows count."""
        return self.stats_NK.any(axis=1)


def _ratio(sums_K: Array) -> float:
    return float(sums_K[0] / sums_K[1]) if sums_K[1] else float("nan")


def _exponential(sums_K: Array) -> float:
    return float(np.exp(sums_K[0] / sums_K[1])) if sums_K[1] else float("nan")


def _bleu(sums_K: Array) -> float:
    return float(_BLEU._compute_score_from_stats(sums_K.astype(int).tolist()).score)


def _chrf(sums_K: Array) -> float:
    return float(_CHRF._compute_score_from_stats(sums_K.astype(int).tolist()).score)


EXACT: Final = Metric("exact", "exact match", "higher", True, _ratio)
BLEU_: Final = Metric("bleu", "BLEU", "higher", False, _bleu)
CHRF_: Final = Metric("chrf", "chrF", "higher", False, _chrf)
JSON_VALID: Final = Metric("json_valid", "valid JSON", "higher", True, _ratio)
JSON_EQUAL: Final = Metric("json_equal", "equal JSON", "higher", True, _ratio)
ENDED: Final = Metric("ended", "ended by itself", "higher", True, _ratio)
TOKENS: Final = Metric("tokens", "tokens of an answer", "neither", False, _ratio)
LOSS: Final = Metric("loss", "loss, nats per token", "lower", False, _ratio)
PERPLEXITY: Final = Metric("perplexity", "perplexity", "lower", False, _exponential)
METRICS: Final = {
    metric.name: metric
    for metric in (EXACT, BLEU_, CHRF_, JSON_VALID, JSON_EQUAL, ENDED, TOKENS, LOSS, PERPLEXITY)
}
"""By name."""


def measure(
    references: Sequence[str], answers: Sequence[Answer], losses: Sequence[RowLoss] | None = None
) -> list[Sample]:
    """Every metric that these rows have: JSON only if a reference is JSON, loss only if it is given."""
    texts = [answer.text.strip() for answer in answers]
    expected = [reference.strip() for reference in references]
    samples = [
        _hits(EXACT, [text == wanted for text, wanted in zip(texts, expected, strict=True)]),
        Sample(BLEU_, _statistics(_BLEU, texts, expected)),
        Sample(CHRF_, _statistics(_CHRF, texts, expected)),
        *_json_samples(texts, expected),
        _hits(ENDED, [answer.ended for answer in answers]),
        Sample(TOKENS, _array([(answer.tokens, 1) for answer in answers])),
    ]
    if losses is not None:
        sums_NK = _array([(loss.nats, loss.tokens) for loss in losses])
        samples += [Sample(LOSS, sums_NK), Sample(PERPLEXITY, sums_NK)]
    return samples


def signatures() -> dict[str, str]:
    """What sacreBLEU was asked for, in its own words, so that others can compare."""
    for scorer in (_BLEU, _CHRF):
        scorer.corpus_score(["a"], [["a"]])  # it knows the number of references only afterwards
    return {"bleu": str(_BLEU.get_signature()), "chrf": str(_CHRF.get_signature())}


def is_json(text: str) -> bool:
    """Whether it is a JSON object or array: "true" or "42" may be plain words."""
    return isinstance(_parsed(text), dict | list)


def _json_samples(texts: Sequence[str], expected: Sequence[str]) -> list[Sample]:
    counts = [is_json(wanted) for wanted in expected]
    if not any(counts):
        return []
    valid = [_parsed(text) is not _NO_JSON for text in texts]
    equal = [_same(_parsed(text), _parsed(wanted)) for text, wanted in zip(texts, expected, strict=True)]
    return [_hits(JSON_VALID, valid, counts), _hits(JSON_EQUAL, equal, counts)]


def _hits(metric: Metric, hits: Sequence[bool], counts: Sequence[bool] | None = None) -> Sample:
    counts = counts or [True] * len(hits)
    pairs = zip(hits, counts, strict=True)
    return Sample(metric, _array([(hit and counted, counted) for hit, counted in pairs]))


def _statistics(scorer: BLEU | CHRF, texts: Sequence[str], expected: Sequence[str]) -> Array:
    return _array(scorer._extract_corpus_statistics(texts, [expected]))


def _array(rows: Sequence[Sequence[float]]) -> Array:
    return np.array(rows, dtype=np.float64)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _NO_JSON


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: the order of members does not matter, 1 is 1.0, and true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)
