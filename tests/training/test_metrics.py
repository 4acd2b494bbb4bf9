"""Metrics against sacreBLEU and by hand, and intervals against what they promise."""

import math

import numpy as np
import pytest
from sacrebleu import corpus_bleu, corpus_chrf

from training.cases import Answer, Case, cases_of, sample
from training.comparison import difference, figures
from training.errors import DataError
from training.intervals import Resampling, percentiles, wilson
from training.metrics import EXACT, RowLoss, Sample, is_json, measure
from training.readers import Place
from training.rows import Row, turn

REFERENCES = [
    "The cat sat on the mat, and the dog slept.",
    "A quick brown fox jumps over the lazy dog",
    "one two three four five",
]
TEXTS = [
    "The cat sat on a mat and the dog slept.",
    "A quick brown fox jumped over the lazy dogs",
    "one two three four five",
]


def answers(*texts: str, ended: bool = True) -> list[Answer]:
    return [Answer(text, len(text.split()), ended) for text in texts]


def measured(references: list[str], *texts: str) -> dict[str, float]:
    return {sample.metric.name: sample.figure for sample in measure(references, answers(*texts))}


def test_bleu_and_chrf_are_sacrebleus_corpus_scores() -> None:
    found = measured(REFERENCES, *TEXTS)
    assert found["bleu"] == pytest.approx(corpus_bleu(TEXTS, [REFERENCES]).score)
    assert found["chrf"] == pytest.approx(corpus_chrf(TEXTS, [REFERENCES]).score)
    assert 30 < found["bleu"] < 95
    assert found["bleu"] != pytest.approx(found["chrf"])


def test_one_word_answers_that_are_right_have_full_marks() -> None:
    found = measured(["yes", "no"], "yes", "no")
    assert (found["bleu"], found["chrf"], found["exact"]) == (pytest.approx(100.0), 100.0, 1.0)
    assert measured(["yes", "no"], "", "")["bleu"] == 0.0


def test_an_exact_match_is_the_reference_but_for_outer_blanks() -> None:
    assert measured(["a", "b", "c", "d"], " a\n", "B", "c.", "d")["exact"] == 0.5


def test_json_counts_where_the_reference_is_json() -> None:
    references = ['{"a": 1, "b": [true]}', '{"a": 1}', "[1]", "words"]
    found = measured(references, '{"b": [true], "a": 1.0}', '{"a": true}', "[1", "[1]")
    assert found["json_valid"] == pytest.approx(2 / 3)
    assert found["json_equal"] == pytest.approx(1 / 3)
    assert "json_valid" not in measured(["words", "42", "true"], "words", "42", "true")
    assert not is_json('{"a": NaN}')


def test_loss_is_per_token_and_perplexity_its_exponential() -> None:
    losses = [RowLoss(2.0, 1), RowLoss(1.0, 5)]
    found = {s.metric.name: s.figure for s in measure(["a", "b"], answers("a", "b"), losses)}
    assert found["loss"] == pytest.approx(0.5)
    assert found["perplexity"] == pytest.approx(math.exp(0.5))


def test_ends_and_lengths() -> None:
    rows = [*answers("a b c"), *answers("a", ended=False)]
    found = {s.metric.name: s.figure for s in measure(["a", "a"], rows)}
    assert (found["ended"], found["tokens"]) == (0.5, 2.0)


def test_wilson_by_hand() -> None:
    interval = wilson(8, 10)
    assert (interval.low, interval.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10).low == 0.0
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10).high == 1.0


def test_a_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        rows = np.stack([random.exponential(2.0, size=80), np.ones(80)], axis=1)
        sums = Resampling(80, seed=trial).sums(rows)
        interval = percentiles(sums[:, 0] / sums[:, 1])
        covered += interval.low <= 2.0 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def hits(*values: int) -> Sample:
    return Sample(EXACT, np.array([(value, 1) for value in values], dtype=np.float64))


def test_pairs_are_compared_as_pairs() -> None:
    """Rows differ far more from each other than the two models do on any row."""
    random = np.random.default_rng(3)
    theirs = (random.random(200) < 0.5).astype(int)
    ours = theirs.copy()
    ours[np.flatnonzero(theirs == 0)[:12]] = 1
    found = difference(hits(*ours), hits(*theirs), Resampling(200))
    assert (found.wins, found.losses, found.ties) == (12, 0, 188)
    assert found.value == pytest.approx(0.06)
    assert 0.0 < found.interval.low < 0.06 < found.interval.high < 0.11
    alone = figures([hits(*ours), hits(*theirs)], Resampling(200))
    assert alone[0].interval.low < alone[1].interval.high  # which as two samples would show nothing


def test_a_tie_is_a_difference_of_nothing() -> None:
    found = difference(hits(1, 0, 1), hits(1, 0, 1), Resampling(3))
    assert (found.value, found.interval.low, found.interval.high) == (0.0, 0.0, 0.0)
    assert (found.wins, found.losses, found.ties) == (0, 0, 3)


def test_a_lower_loss_is_a_win() -> None:
    ours = measure(["a"] * 2, answers("a", "a"), [RowLoss(1.0, 1), RowLoss(3.0, 1)])
    theirs = measure(["a"] * 2, answers("a", "a"), [RowLoss(2.0, 1), RowLoss(2.0, 1)])
    pair = next((o, t) for o, t in zip(ours, theirs, strict=True) if o.metric.name == "loss")
    found = difference(*pair, Resampling(2))
    assert (found.wins, found.losses) == (1, 1)


# Cases


def chat(line: int) -> Row:
    return Row(
        Place(line),
        messages=(
            turn("user", "a"), turn("assistant", "b"), turn("user", f"c{line}"), turn("assistant", "d"),
        ),
    )  # fmt: skip


def test_the_last_answer_of_a_row_is_asked_for() -> None:
    (case,) = cases_of([chat(7)], source="rows")
    assert case == Case(Place(7), chat(7).messages[:3], "d")
    assert case.question == "c7"


def test_plain_text_is_refused_by_line() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl has plain text, .*line 2; line 3.*evaluation needs"):
        cases_of([chat(1), Row(Place(2), text="x"), Row(Place(3), text="y")], source="rows.jsonl")


def test_a_sample_is_the_same_for_the_same_seed() -> None:
    cases = cases_of([chat(line) for line in range(1, 30)], source="rows")
    chosen = sample(cases, 5, seed=1)
    assert chosen == sample(cases, 5, seed=1) != sample(cases, 5, seed=2)
    assert [case.place.number for case in chosen] == sorted(case.place.number for case in chosen)
    assert sample(cases, 99, seed=1) == sample(cases, None, seed=1) == cases
