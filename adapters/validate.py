"""The checks an adapter passes before anyone may use it, cheapest first. Knows neither store nor model."""

import os
from pathlib import Path

from adapters.bundle import Bundle, read_bundle
from adapters.errors import InvalidAdapterError, WrongBaseError
from adapters.facts import AdapterFacts
from adapters.files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, read_bounded
from adapters.layout import BaseLayout
from adapters.measures import content_digest, delta_norm
from adapters.spec import MAX_CONFIG_BYTES, AdapterSpec, parse_spec
from adapters.strict_json import brief
from adapters.weights import dtype_name, load_pairs

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def validate_adapter(directory: Path, layout: BaseLayout, *, max_rank: int) -> AdapterFacts:
    """Checks everything about an adapter against a base; what passes can be applied as it is.

    Args:
        directory: holds adapter_config.json, adapter_model.safetensors, perhaps quickchange.json, no more.
        max_rank: the largest rank of any module that is taken.

    Raises:
        InvalidAdapterError, UnsupportedAdapterError, WrongBaseError: the message names what is wrong.
    """
    _check_files(directory)
    spec = parse_spec(read_bounded(directory / CONFIG_FILE, MAX_CONFIG_BYTES))
    bundle = read_bundle(directory)
    _check_base(bundle, layout)
    planned = spec.ranks_and_scalings(layout)
    _check_ranks({module: rank for module, (rank, _) in planned.items()}, max_rank)
    pairs = load_pairs(directory / WEIGHTS_FILE, spec, layout)
    return AdapterFacts(
        digest=content_digest(spec, bundle, pairs),
        method=spec.method,
        rank=max(rank for rank, _ in planned.values()),
        alpha=spec.alpha,
        target_modules=_as_tuple(spec),
        size_bytes=sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(directory)),
        base_fingerprint=layout.fingerprint,
        matched_modules=tuple(planned),
        delta_norm=delta_norm(pairs, {module: scaling for module, (_, scaling) in planned.items()}),
        dtype="+".join(sorted({dtype_name(t) for pair in pairs.values() for t in (pair.a_RD, pair.b_OR)})),
        parameter_count=sum(pair.a_RD.numel() + pair.b_OR.numel() for pair in pairs.values()),
    )


def _check_files(directory: Path) -> None:
    names = sorted(entry.name for entry in os.scandir(directory))
    for name in names:
        if name.endswith(_PICKLE_SUFFIXES):
            raise InvalidAdapterError(
                f"{brief(name)} is a pickle, which could run code and is never read; save with "
                "save_pretrained(…, safe_serialization=True)",
                reason="PICKLE_REFUSED",
            )
        if name not in ADAPTER_FILES:
            raise InvalidAdapterError(
                f"{brief(name)} is not a file of an adapter; send only {', '.join(ADAPTER_FILES)}",
                reason="UNEXPECTED_FILE",
            )


def _check_base(bundle: Bundle | None, layout: BaseLayout) -> None:
    if bundle is not None and bundle.base_fingerprint != layout.fingerprint:
        raise WrongBaseError(
            f"the adapter was made for base {bundle.base_fingerprint}, the server has {layout.fingerprint}; "
            "send it to a server with its base, or train it on this one"
        )


def _check_ranks(ranks: dict[str, int], max_rank: int) -> None:
    for module, rank in ranks.items():
        if rank > max_rank:
            raise InvalidAdapterError(
                f"{module} has rank {rank}, this server takes at most {max_rank}; retrain with a smaller r",
                reason="RANK_TOO_LARGE",
            )


def _as_tuple(spec: AdapterSpec) -> tuple[str, ...]:
    return (spec.target_modules,) if isinstance(spec.target_modules, str) else spec.target_modules
