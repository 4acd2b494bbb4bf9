"""Owns what a method costs: time, memory and size, by name, and how each is read. Knows no cells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from training.quantities import count, duration, number, size
from training.study_result import Measured

MEMORY_AIM: Final = 0.15
"""How far a prediction of memory may be from what is measured, as part of the latter."""


@dataclass(frozen=True, slots=True)
class Cost:
    """
    Attributes:
        title: for the head of a column and for an axis.
        of: in seconds, bytes, tokens a second or parameters.
        shown: as people write so much of it.
    """

    title: str
    of: Callable[[Measured], float]
    shown: Callable[[float], str]


TIME: Final = Cost("training time", lambda one: one.train_seconds, duration)
SPEED: Final = Cost("tokens/s", lambda one: one.tokens_per_s, number)
PEAK: Final = Cost("peak memory", lambda one: one.peak_memory_bytes, size)
ADDED: Final = Cost("added memory", lambda one: one.added_bytes, size)
PARAMETERS: Final = Cost("trained parameters", lambda one: one.trained_parameters, count)
RESULT: Final = Cost("size of the result", lambda one: one.result_bytes, size)
COSTS: Final = (TIME, SPEED, PEAK, ADDED, PARAMETERS, RESULT)
LEAST: Final = {
    TIME: "shortest training",
    PEAK: "lowest peak of memory",
    ADDED: "least added memory",
    RESULT: "smallest result",
}
"""What has the least of it is called that; the other costs follow from these."""
