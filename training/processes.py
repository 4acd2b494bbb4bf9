"""Owns what several processes of one run agree on: who is the main one, what it alone does, who failed.

Knows no run and no model. `accelerate launch` and `torchrun` start the processes, tell each its rank in the
environment, and end the others when one ends in error. Without them there is one process, and nothing here
waits for anybody.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

from training.errors import ElsewhereError, ProcessLostError, RecipeError

ResultT = TypeVar("ResultT")

_PATIENCE: Final = timedelta(days=1)
"""The others wait while the main process publishes and compares; of a lost one they hear at once."""
_LAST_WORDS_S: Final = 5.0
_SHARDED: Final = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""Variable that `accelerate launch` sets → what it is called."""
_LOST: Final = ("connection closed", "connection reset", "broken pipe", "remote process exited", "timed out")
"""Of what gloo and NCCL say, in small letters, when the other end is gone."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: of this one; 0 is the main process.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes, publishes and speaks."""
        return self.rank == 0

    def alone(self, work: Callable[[], ResultT]) -> ResultT | None:
        """What `work` returns, done by the main process while the others wait; None to these.

        Raises:
            ElsewhereError: in the others, if it failed in the main process.
        """
        return self.together(work if self.is_main else lambda: None)

    def together(self, work: Callable[[], ResultT]) -> ResultT:
        """What `work` returns, done by every process.

        Raises:
            ElsewhereError: it failed in another process; where it failed its own error is raised.
        """
        if self.count == 1:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        said = self.gathered(None if failure is None else str(failure) or type(failure).__name__)
        if failure is not None:
            raise failure
        for rank, message in enumerate(said):
            if message is not None:
                raise ElsewhereError(message if rank == 0 else f"process {rank}: {message}")
        return result

    def from_main(self, value: ResultT) -> ResultT:
        """The main process' value, which must be small and picklable."""
        return self.gathered(value)[0] if self.count > 1 else value

    def gathered(self, value: ResultT) -> list[ResultT]:
        """Every process' value, by rank; small and picklable."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        with self.connected():
            torch.distributed.all_gather_object(values, value)
        return values

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether it is set in any process."""
        if self.count == 1:
            return flags
        import torch

        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        raised = torch.tensor(flags, dtype=torch.int32, device=device)
        with self.connected():
            torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
        return tuple(map(bool, raised.tolist()))

    def wait(self) -> None:
        """Until every process is here."""
        self.gathered(None)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Around work with the other processes.

        Raises:
            ProcessLostError: one of them is not there any more.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not any(word in str(error).lower() for word in _LOST):
                raise
            raise ProcessLostError(
                "another process of this run ended in the middle of it; --resume goes on from the last "
                "checkpoint, --restart begins anew"
            ) from error


def joined(device: str) -> Processes:
    """The processes that this one was started with, once all of them are there.

    Args:
        device: of the recipe: auto, cpu or cuda. On CUDA each process gets the device of its own rank.

    Raises:
        RecipeError: they are started in a way that a run cannot use.
    """
    _check_launch(os.environ)
    count = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if count == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes)


def speaks() -> bool:
    """Whether this process tells people anything: all but the main one are silent."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def let_main_speak() -> None:
    """Before a silent process ends in error: whoever started it then ends the main one, maybe in mid-word."""
    time.sleep(_LAST_WORDS_S)


def _check_launch(environment: Mapping[str, str]) -> None:
    for variable, name in _SHARDED.items():
        if environment.get(variable, "false").lower() in ("true", "1"):
            raise RecipeError(
                f"accelerate launches with {name}, and training here keeps the whole base in each process; "
                "launch with distributed_type MULTI_GPU, as in deploy/accelerate/ddp-1x2.yaml"
            )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise RecipeError(
            f"accelerate launches with mixed_precision {precision}; launch with no, and say it with products"
        )
    if environment.get("LOCAL_WORLD_SIZE", "1") != environment.get("WORLD_SIZE", "1") and (
        "LOCAL_RANK" in environment
    ):
        raise RecipeError(
            "the processes are on several machines, and a run's checkpoints lie on one; launch with "
            "num_machines 1"
        )
