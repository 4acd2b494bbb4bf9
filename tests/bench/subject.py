"""What is measured: a base, as every contender gets it, and random adapters for it on this disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from adapters.base import load_base
from adapters.layout import BaseLayout
from tests.bench.adapters import write_random_adapter

_FIRST_ID = 64  # below, tokenizers keep their special tokens


@dataclass(frozen=True, slots=True)
class Subject:
    """A base and what follows from it.

    Attributes:
        source: what `--base` was; folder: the same as files.
        storage_dtype: in which the server keeps keys, values and adapters on this machine.
    """

    source: str
    device: str
    folder: Path
    layout: BaseLayout
    vocab_size: int
    storage_dtype: torch.dtype

    @classmethod
    def load(cls, source: str, device: str) -> "Subject":
        base = load_base(source, device=device)  # type: ignore[arg-type]  # argparse checked the device
        return cls(source, device, base.folder, base.layout, base.vocab_size, base.storage_dtype)

    @property
    def prompt_ids(self) -> range:
        """Ordinary tokens."""
        return range(min(_FIRST_ID, self.vocab_size // 4), self.vocab_size * 9 // 10)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        config = AutoConfig.from_pretrained(self.folder).get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width * self.storage_dtype.itemsize)

    def adapter_device_bytes(self, rank: int) -> int:
        """An adapter of this rank on every linear layer but the head, as the server stores it."""
        shapes = [shape for name, shape in self.layout.modules.items() if name != self.layout.head]
        return sum(rank * (s.in_features + s.out_features) for s in shapes) * self.storage_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Pool:
    """Random adapters by name, in order."""

    folders: dict[str, Path]

    @classmethod
    def write(cls, root: Path, layout: BaseLayout, *, count: int, rank: int) -> "Pool":
        """Writes those that are not there yet; the same seed is the same adapter."""
        folders = {}
        for seed in range(count):
            folder = root / f"a{seed:03d}"
            if not (folder / "adapter_config.json").is_file():
                write_random_adapter(folder, layout, rank=rank, seed=seed)
            folders[folder.name] = folder
        return cls(folders)

    @property
    def names(self) -> Sequence[str]:
        return list(self.folders)

    def first(self, count: int) -> "Pool":
        return Pool(dict(list(self.folders.items())[:count]))
