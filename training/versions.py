"""Whether the libraries installed here are those that this version was made for. Knows no training."""

import importlib.metadata
from typing import Final

from packaging.requirements import Requirement

PACKAGES: Final = ("quickchange", "torch", "transformers", "peft", "bitsandbytes")
"""Whose versions decide what comes of a run."""

_EXTRA: Final = "server"


def installed_versions() -> dict[str, str]:
    """By package."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def misfits() -> list[str]:
    """One line for each library whose version is outside the range that quickchange states for it."""
    stated = [Requirement(line) for line in importlib.metadata.requires("quickchange") or ()]
    wanted = {
        requirement.name: requirement.specifier
        for requirement in stated
        if requirement.marker is None or requirement.marker.evaluate({"extra": _EXTRA})
    }
    return [
        f"{package} {version} is installed, quickchange {wanted[package]} was made for and tested with; "
        f"pip install '{package}{wanted[package]}'"
        for package, version in installed_versions().items()
        if package in wanted and not wanted[package].contains(version, prereleases=True)
    ]
