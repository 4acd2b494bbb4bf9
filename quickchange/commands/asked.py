"""What `quickchange evaluate` gets from whoever answers, server or reference. Knows neither."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from training.cases import Answer
    from training.evaluation import Answered

BASE: Final = "base"
"""What the bare base is called, on the command line and in reports."""


@dataclass(frozen=True, slots=True)
class Asked:
    """
    Attributes:
        theirs: of what ours is compared with; None if it is with nothing.
        base_answers: to the rows that are shown, where neither of the two is the base.
        who: facts about what answered, for the report.
        loss: where the losses are from, or why there are none.
    """

    ours: "Answered"
    theirs: "Answered | None"
    base_answers: "Sequence[Answer]"
    who: Mapping[str, Any]
    loss: str


def loss_on(base_name: str, quantization: str) -> str:
    """How a report says where losses are from."""
    return f"of the reference answers, in a float32 pass over {base_name} ({quantization})"
