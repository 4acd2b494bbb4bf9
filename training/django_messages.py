"""Reads the translations that Django ships for its own interface. Knows nothing of questions or models."""

import functools
import gettext
import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from training.errors import DataError

_SHORTEST, _LONGEST = 15, 90
_PLACEHOLDERS: Final = ("%", "{", "<", "\n")
_CONTEXT: Final = "\x04"  # gettext's mark between a context and its message


@dataclass(frozen=True, slots=True)
class Translation:
    """One message in one language; `original` is its English text."""

    language: str
    original: str
    text: str


@functools.cache
def translations(languages: tuple[str, ...]) -> tuple[Translation, ...]:
    """Messages of a readable length without placeholders, which read the same in no two of the languages."""
    found = [
        Translation(language, original, text)
        for language in languages
        for original, text in sorted(_catalogue(language).items())
        if _is_plain(text) and text != original
    ]
    times = Counter(translation.text for translation in found)
    return tuple(translation for translation in found if times[translation.text] == 1)


def _is_plain(text: str) -> bool:
    return _SHORTEST <= len(text) <= _LONGEST and not any(mark in text for mark in _PLACEHOLDERS)


def _catalogue(language: str) -> Mapping[str, str]:
    """English → translation, over all parts of Django; the first part to have a message wins."""
    merged: dict[str, str] = {}
    for path in sorted(_root().glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            for original, text in _messages(gettext.GNUTranslations(file)):
                merged.setdefault(original, text.replace("\xa0", " "))
    return merged


def _messages(catalogue: gettext.GNUTranslations) -> Iterator[tuple[str, str]]:
    entries: Mapping[object, str] = catalogue._catalog  # type: ignore[attr-defined]  # no public listing
    for original, text in entries.items():
        if isinstance(original, str) and original and text and _CONTEXT not in original:
            yield original, text


def _root() -> Path:
    """Where Django lies; it is not imported, only read."""
    spec = importlib.util.find_spec("django")
    if spec is None or spec.origin is None:
        raise DataError(
            "Django is not installed, whose translations are read; pip install 'quickchange[demo]'"
        )
    return Path(spec.origin).parent
