"""Owns the demo's tasks: real data that Python packages ship, as questions with one right answer each.

Whatever is held out shares no source (review, date, message) with what is learned. Every task is the same on
every machine. Knows nothing of training or serving.
"""

import datetime
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from babel import Locale
from babel.dates import format_date

from training.django_messages import translations
from training.vader import rated_snippets

SYSTEM: Final = "Answer with no further words."
"""In place of the base's own, longer system message: a third of the tokens of a short question."""

_DATE_LOCALES: Final = ("en_US", "de_DE", "fr_FR", "es_ES", "it_IT", "nl_NL", "pt_BR", "sv_SE")
_LANGUAGES: Final = ("de", "fr", "es", "it", "nl", "pt", "sv", "pl", "fi", "tr")
_FIRST_DAY: Final = datetime.date(1980, 1, 1)
_DAYS: Final = 20_000

HELD_OUT: Final = 60


@dataclass(frozen=True, slots=True)
class Question:
    """One row.

    Attributes:
        source: what it was made from; rows of one source are all learned or all held out.
        gist: what every right answer says, however it words it.
    """

    text: str
    answer: str
    source: str
    gist: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """What is sent to the server."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]


@dataclass(frozen=True, slots=True)
class Task:
    """Questions to learn and questions to hold out.

    Attributes:
        name: of the adapter that learns it.
        title: what it does, in a few words.
        credit: where the data comes from and under which licence.
        labels: all possible answers, if they are few.
    """

    name: str
    title: str
    credit: str
    learned: tuple[Question, ...]
    held_out: tuple[Question, ...]
    labels: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        """The questions to learn as rows for `quickchange train`."""
        rows = (
            {"messages": [*question.messages, {"role": "assistant", "content": question.answer}]}
            for question in self.learned
        )
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sentiment_task(archive: Path, *, rows: int, held_out: int = HELD_OUT) -> Task:
    """Reviews that at least 20 people rated; the label is the sign of their mean.

    Args:
        archive: what `training.vader.fetch_archive` returned.
    """
    questions = [
        Question(
            f"{snippet.text}\n\nIs this review positive or negative?",
            snippet.label,
            snippet.review,
            snippet.label,
        )
        for snippet in rated_snippets(archive)
    ]
    return _task(
        "sentiment",
        "is a review positive or negative?",
        "film and product reviews rated by people (VADER, Hutto & Gilbert 2014; MIT)",
        questions,
        rows,
        held_out,
        labels=("positive", "negative"),
    )


def dates_task(*, rows: int, held_out: int = HELD_OUT) -> Task:
    """Dates as eight languages write them, to JSON."""
    rng = random.Random(0)  # noqa: S311  the same questions everywhere, no secret
    questions = []
    for _ in range(4 * (rows + held_out)):
        day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_DAYS))
        written = format_date(day, format=rng.choice(("long", "full")), locale=rng.choice(_DATE_LOCALES))
        iso = day.isoformat()
        text = f"{written}\n\nWrite this date as JSON."
        questions.append(Question(text, json.dumps({"date": iso}), source=iso, gist=iso))
    return _task(
        "dates",
        "a date in any of eight languages as JSON",
        "date patterns and month names of Unicode CLDR (Unicode License v3) through Babel (BSD-3-Clause)",
        questions,
        rows,
        held_out,
    )


def language_task(*, rows: int, held_out: int = HELD_OUT, own_names: bool = False) -> Task:
    """Messages of Django's interface in ten languages; which one is it?

    Args:
        own_names: answers "Deutsch" in place of "German".
    """
    names = {code: _language_name(code, code if own_names else "en") for code in _LANGUAGES}
    questions = [
        Question(
            f"{message.text}\n\nWhich language is this?",
            names[message.language],
            source=message.original,
            gist=names[message.language],
        )
        for message in translations(_LANGUAGES)
    ]
    return _task(
        "language",
        f"which language is this?{' (by its own name)' if own_names else ''}",
        "Django's translations (BSD-3-Clause); names of languages from Unicode CLDR (Unicode License v3)",
        questions,
        rows,
        held_out,
        labels=tuple(names.values()),
    )


def _language_name(code: str, in_language: str) -> str:
    return str(Locale(in_language).languages[code])


def _task(
    name: str,
    title: str,
    credit: str,
    questions: Sequence[Question],
    rows: int,
    held_out: int,
    *,
    labels: tuple[str, ...] = (),
) -> Task:
    held_out_pool, learned_pool = _split_by_source(_distinct(questions), held_out)
    return Task(name, title, credit, tuple(learned_pool[:rows]), tuple(held_out_pool[:held_out]), labels)


def _distinct(questions: Iterable[Question]) -> list[Question]:
    """Each text once; texts with different answers not at all."""
    by_text: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_text[question.text].append(question)
    return [same[0] for same in by_text.values() if len({question.answer for question in same}) == 1]


def _split_by_source(questions: Sequence[Question], held_out: int) -> tuple[list[Question], list[Question]]:
    """At least `held_out` questions whose sources nothing else has, and the others; both shuffled."""
    rng = random.Random(1)  # noqa: S311  the same split everywhere, no secret
    shuffled = sorted(questions, key=lambda question: question.text)
    rng.shuffle(shuffled)
    reserved: set[str] = set()
    for question in shuffled[:held_out]:
        reserved.add(question.source)
    return (
        [question for question in shuffled if question.source in reserved],
        [question for question in shuffled if question.source not in reserved],
    )
