"""The demo's data: real, the same everywhere, split without leakage, and judged fairly."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from training.answering import answer_all
from training.django_messages import translations
from training.rows import read_rows
from training.score import is_exact, is_mentioned, score
from training.tasks import SYSTEM, Question, Task, dates_task, language_task, sentiment_task
from training.vader import rated_snippets

MOVIES = (
    "1\t2.26\tA gorgeous,  funny and moving film.\n"
    "2\t-1.93\tA dull and joyless waste of time.\n"
    "3\t0.4\tA film about a man and his dog.\n"
    "4\t3.1\tToo short.\n"
    "5\t2.5\tA gorgeous, funny and moving film.\n"
)
REVIEWS = (
    "1_1\t-1.2\tthe battery died within a week.\n"
    "1_2\t1.05\tthe screen is sharp and bright.\n"
    "1_3\t-2\tit \ufffd broke after a day.\n"
)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive in the form of the package's own, a tar within a tar."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        _add(tar, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", MOVIES.encode())
        _add(
            tar,
            "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
            REVIEWS.encode().replace("\ufffd".encode(), b"\xff"),
        )
    path = tmp_path / "vader.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        _add(tar, name, inner.getvalue())
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(params=["dates", "language", "own names"])
def task(request: pytest.FixtureRequest) -> Task:
    if request.param == "dates":
        return dates_task(rows=120, held_out=30)
    return language_task(rows=120, held_out=30, own_names=request.param == "own names")


def test_people_make_the_labels(archive: Path) -> None:
    found = {snippet.text: (snippet.label, snippet.review) for snippet in rated_snippets(archive)}
    assert found == {
        "A gorgeous, funny and moving film.": ("positive", "movieReviewSnippets/1"),
        "A dull and joyless waste of time.": ("negative", "movieReviewSnippets/2"),
        "the battery died within a week.": ("negative", "amazonReviewSnippets/1"),
        "the screen is sharp and bright.": ("positive", "amazonReviewSnippets/1"),
        "it \ufffd broke after a day.": ("negative", "amazonReviewSnippets/1"),
    }


def test_sentences_of_one_review_stay_together(archive: Path) -> None:
    for held_out in (1, 2, 3):
        task = sentiment_task(archive, rows=10, held_out=held_out)
        sources = {question.source for question in task.held_out}
        assert not sources & {question.source for question in task.learned}
        assert len(task.held_out) == held_out


def test_sizes_and_no_leakage(task: Task) -> None:
    assert (len(task.learned), len(task.held_out)) == (120, 30)
    assert not {q.source for q in task.learned} & {q.source for q in task.held_out}
    texts = [question.text for question in (*task.learned, *task.held_out)]
    assert len(set(texts)) == len(texts)


def test_the_same_on_every_machine() -> None:
    assert dates_task(rows=20) == dates_task(rows=20)
    assert language_task(rows=20) == language_task(rows=20)
    assert dates_task(rows=1).learned[0].text == "Tuesday, September 10, 2013\n\nWrite this date as JSON."


def test_more_rows_leave_the_held_out_alone() -> None:
    assert language_task(rows=10).held_out == language_task(rows=300).held_out


def test_both_versions_of_the_language_task_ask_the_same() -> None:
    names, own = language_task(rows=50), language_task(rows=50, own_names=True)
    assert [question.text for question in names.learned] == [question.text for question in own.learned]
    assert {"German", "French"} <= set(names.labels)
    assert {"Deutsch", "français"} <= set(own.labels)


def test_answers_are_right() -> None:
    for question in dates_task(rows=50).learned:
        assert json.loads(question.answer) == {"date": question.gist}
        assert question.gist[:4] in question.text
    for question in language_task(rows=50).learned:
        assert question.answer in language_task(rows=1).labels


def test_messages_have_no_placeholders_and_one_language() -> None:
    found = translations(("de", "fr"))
    assert len(found) > 200
    texts = [translation.text for translation in found]
    assert len(set(texts)) == len(texts)
    assert not any(mark in text for text in texts for mark in "%{<\n")
    by_original = {(t.language, t.original): t.text for t in found}
    original = "A user with that username already exists."
    assert by_original["de", original] == "Dieser Benutzername ist bereits vergeben."


def test_rows_are_what_training_reads(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    task.write(path)
    rows = read_rows(path)
    assert len(rows) == len(task.learned)
    for row, question in zip(rows, task.learned, strict=True):
        assert list(row.messages[:-1]) == question.messages
        assert row.messages[-1] == {"role": "assistant", "content": question.answer}
        assert row.messages[0] == {"role": "system", "content": SYSTEM}


# Judging


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("positive", "positive", True),
        (" Positive.\n", "positive", True),
        ("positively", "positive", False),
        ("It is positive", "positive", False),
        ("", "positive", False),
        ('{"date": "2024-01-02"}', '{"date": "2024-01-02"}', True),
        ('{"date": "2024-01-03"}', '{"date": "2024-01-02"}', False),
    ],
)
def test_exact(answer: str, expected: str, right: bool) -> None:
    assert is_exact(answer, expected) is right


@pytest.mark.parametrize(
    ("answer", "gist", "labels", "right"),
    [
        ("This review is positive, not negative", "positive", ("positive", "negative"), True),
        ("This review is positive, not negative", "negative", ("positive", "negative"), False),
        ("No idea", "negative", ("positive", "negative"), False),
        ("NEGATIVE", "negative", ("positive", "negative"), True),
        ("The date is 2024-01-02, a Tuesday", "2024-01-02", (), True),
        ("The date is 2024-01-03", "2024-01-02", (), False),
    ],
)
def test_mentioned(answer: str, gist: str, labels: tuple[str, ...], right: bool) -> None:
    assert is_mentioned(answer, gist, labels) is right


def test_score_counts() -> None:
    questions = [
        Question("q", "yes", "s", "yes"),
        Question("q", "no", "s", "no"),
        Question("q", "no", "s", "no"),
    ]
    found = score(questions, ["yes", "well, no", "yes"], ("yes", "no"))
    assert (found.exact, found.mentioned, found.total) == (1, 2, 3)
    assert str(found) == "1/3 (33%)"


def test_answers_keep_the_order_and_errors_come_through() -> None:
    assert answer_all(str, list(range(20)), concurrency=4) == [str(n) for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        answer_all(lambda n: str(1 // n), [1, 0, 1], concurrency=2)
