"""What an adapter's tensors amount to: identity, strength, and whether they are sane. Knows no store.

R rank, K and L blocks of ranks, D in-features, O out-features.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.bundle import Bundle, read_bundle
from adapters.errors import InvalidAdapterError, raise_first
from adapters.files import CONFIG_FILE, WEIGHTS_FILE, open_regular, read_bounded
from adapters.spec import MAX_CONFIG_BYTES, AdapterSpec, parse_spec
from adapters.weights import LoraPair, dtype_name, read_header, tensor_name

# Far above anything trained (the weights of a base layer have norms of 10 to 1000); activations times this
# are still far below where float32 overflows.
MAX_NORM = 1e9

_CHUNK_BYTES = 1024 * 1024
_BLOCK_RANKS = 512  # in float64: some 8 MiB of a factor with 2048 features
_DOMAIN = b"quickchange adapter 1\n"


@dataclass(frozen=True, slots=True)
class Measures:
    """What an adapter amounts to.

    Attributes:
        digest: "sha256:…" over the canonical configuration, the bundle if there is one, and every tensor in
            order of name. The order of tensors in the file and whatever carries no meaning in the JSON are no
            part of it.
        norms: Frobenius norm of every module's update scaling · B @ A.
        parameter_count: elements of all tensors.
    """

    digest: str
    norms: Mapping[str, float]
    parameter_count: int

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of all updates together."""
        return math.hypot(*self.norms.values())


def in_digest_order(modules: Iterable[str]) -> list[str]:
    """The order of their tensors' names, in which they are hashed."""
    return sorted(modules, key=lambda module: tensor_name(module, "A"))


def measure(
    spec: AdapterSpec,
    bundle: Bundle | None,
    scalings: Mapping[str, float],
    pairs: Iterable[tuple[str, LoraPair]],
) -> Measures:
    """Looks at every pair once, and keeps none.

    Args:
        scalings: by module.
        pairs: every module's, `in_digest_order`.

    Raises:
        InvalidAdapterError: reason NOT_FINITE, TOO_LARGE (naming every such tensor or module), or ALL_ZERO.
    """
    sha256 = _begun(spec, bundle)
    norms: dict[str, float] = {}
    faults: list[InvalidAdapterError] = []
    count = 0
    for module, pair in pairs:
        tensors = {tensor_name(module, "A"): pair.a_RD, tensor_name(module, "B"): pair.b_OR}
        count += _hash(tensors, sha256)
        found = [_not_finite(name) for name, tensor in tensors.items() if not _is_finite(tensor)]
        faults += found
        if not found:
            try:
                norms[module] = _module_norm(module, pair, scalings[module])
            except InvalidAdapterError as fault:
                faults.append(fault)
        del pair, tensors  # before the next one is read
    raise_first(faults)
    if not any(norms.values()):
        raise InvalidAdapterError(
            "every update is zero, so the adapter would do nothing; was it saved before it was trained?",
            reason="ALL_ZERO",
        )
    return Measures(f"sha256:{sha256.hexdigest()}", norms, count)


def _hash(tensors: Mapping[str, Tensor], sha256: "hashlib._Hash") -> int:
    """How many elements they have."""
    for name, tensor in tensors.items():
        sha256.update(_line([name, dtype_name(tensor), list(tensor.shape)]))
        sha256.update(tensor.view(torch.uint8).numpy().data)
    return sum(tensor.numel() for tensor in tensors.values())


def _not_finite(name: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"tensor {name} has NaN or infinite values; retrain with a lower learning rate", reason="NOT_FINITE"
    )


def stored_digest(directory: Path) -> str:
    """The digest of an adapter's files, by themselves: without a base, and without reading them as a whole.

    Raises:
        InvalidAdapterError, UnsupportedAdapterError: they are no adapter's.
    """
    spec = parse_spec(read_bounded(directory / CONFIG_FILE, MAX_CONFIG_BYTES))
    sha256 = _begun(spec, read_bundle(directory))
    header = read_header(directory / WEIGHTS_FILE)
    with open_regular(directory / WEIGHTS_FILE) as file:
        for name, info in sorted(header.items()):
            sha256.update(_line([name, info.dtype, list(info.shape)]))
            file.seek(info.offset)
            for start in range(0, info.size_bytes, _CHUNK_BYTES):
                sha256.update(file.read(min(_CHUNK_BYTES, info.size_bytes - start)))
    return f"sha256:{sha256.hexdigest()}"


def _begun(spec: AdapterSpec, bundle: Bundle | None) -> "hashlib._Hash":
    sha256 = hashlib.sha256(_DOMAIN)
    sha256.update(_line([spec.canonical(), None if bundle is None else bundle.canonical()]))
    return sha256


def _is_finite(tensor: Tensor) -> bool:
    """Without a temporary of its size."""
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


def _module_norm(module: str, pair: LoraPair, scaling: float) -> float:
    """‖scaling·BA‖ by R×R products only: ‖BA‖² = sum((AAᵀ) ∘ (BᵀB)). In float64, where nothing overflows."""
    squared = a_squared = b_squared = 0.0
    starts = range(0, len(pair.a_RD), _BLOCK_RANKS)  # or memory would grow with R²
    for start in starts:
        a_KD, b_OK = _block(pair, start, scaling)
        a_gram_KK, b_gram_KK = a_KD @ a_KD.T, b_OK.T @ b_OK
        squared += (a_gram_KK * b_gram_KK).sum().item()
        a_squared, b_squared = a_squared + a_gram_KK.trace().item(), b_squared + b_gram_KK.trace().item()
        for other in starts[: start // _BLOCK_RANKS]:  # both products are symmetric
            a_LD, b_OL = _block(pair, other, scaling)
            squared += 2 * ((a_KD @ a_LD.T) * (b_OK.T @ b_OL)).sum().item()
    norm = math.sqrt(max(squared, 0.0))  # rounding may leave -1e-20 of a zero
    a_norm, b_norm = math.sqrt(a_squared), math.sqrt(b_squared)
    if max(norm, a_norm, b_norm) > MAX_NORM:
        raise InvalidAdapterError(
            f"the update of {module} is absurdly large: the norms of A, scaled B and their product are "
            f"{a_norm:.3g}, {b_norm:.3g} and {norm:.3g}; at most {MAX_NORM:g} is taken",
            reason="TOO_LARGE",
        )
    return norm


def _block(pair: LoraPair, start: int, scaling: float) -> tuple[Tensor, Tensor]:
    ranks = slice(start, start + _BLOCK_RANKS)
    return pair.a_RD[ranks].double(), pair.b_OR[:, ranks].double().mul_(scaling)


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
