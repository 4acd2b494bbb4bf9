"""What each process gets of a batch, which launches a run refuses, and what the shipped ones say."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from training.batches import IGNORED
from training.errors import ProcessLostError, RecipeError
from training.processes import Processes, joined, speaks
from training.sharing import Idle, Shares, nothing_to_learn

SHIPPED = Path("deploy/accelerate")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 3, 11, 12, 13, 24])
def test_shares_are_every_row_once_in_order_and_even(count: int, rows: int) -> None:
    batch_size, order = 4, [row * 7 % rows for row in range(rows)] if rows % 7 else list(range(rows))
    parts = [list(Shares(order, batch_size, Processes(rank, count))) for rank in range(count)]
    assert {len(part) for part in parts} == {len(Shares(order, batch_size, Processes(0, count)))}
    learned = []
    for batches in zip(*parts, strict=True):
        sizes = [sum(not isinstance(index, Idle) for index in batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size
        assert all(batches)
        learned += [index for index in chain(*batches) if not isinstance(index, Idle)]
    assert learned == order


def test_an_idle_batch_is_computed_and_counts_nothing() -> None:
    labels, mask = torch.tensor([[IGNORED, 5, 6]]), torch.tensor([[1, 1, 1]])
    idle = nothing_to_learn({"labels": labels, "attention_mask": mask, "logits_to_keep": 3})
    assert (idle["labels"] == IGNORED).all()
    assert idle["attention_mask"].sum() == 0
    assert idle["visible"] is mask
    packed = nothing_to_learn({"labels": labels, "attention_mask": mask, "visible": None})
    assert packed["visible"] is None


def test_one_process_waits_for_nobody() -> None:
    processes = Processes()
    assert processes.together(lambda: 3) == processes.alone(lambda: 3) == processes.from_main(3) == 3
    assert processes.gathered(3) == [3]
    assert processes.any_of(False, True) == (False, True)
    with pytest.raises(ZeroDivisionError):
        processes.together(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="closed"), processes.connected():
        raise RuntimeError("connection closed by peer")


def test_a_lost_process_is_named_and_other_errors_are_not_taken_for_one() -> None:
    processes = Processes(0, 2)
    with pytest.raises(ProcessLostError, match="--resume goes on"), processes.connected():
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="shape"), processes.connected():
        raise RuntimeError("shape mismatch")


def test_without_a_launcher_there_is_one_process_that_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of somebody else's
    monkeypatch.setenv("RANK", "1")
    assert joined("cpu") == Processes(0, 1)
    assert speaks()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "launches with DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision bf16; launch with no"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}, "on several machines"),
    ],
)
def test_a_launch_that_no_run_can_use_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=message):
        joined("cpu")


# Shipped configurations


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp-1x2.yaml", DistributedType.MULTI_GPU), ("fsdp-qlora.yaml", DistributedType.FSDP)],
)
def test_a_shipped_configuration_is_what_accelerate_reads(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(SHIPPED / name))
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (2, 1, "no")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate's FSDP plugin wants a device to exist")
def test_the_sharding_configuration_is_read_as_the_plugin_that_it_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `accelerate launch` does it: members become variables, and variables the plugin."""
    options = load_config_from_file(str(SHIPPED / "fsdp-qlora.yaml")).fsdp_config
    for name, value in options.items():
        monkeypatch.setenv(name.upper(), str(value))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.use_orig_params is False
    assert plugin.cpu_ram_efficient_loading
    assert plugin.sync_module_states
    assert plugin.cpu_offload.offload_params
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    with pytest.raises(RecipeError, match="launches with FSDP"):
        joined("auto")
