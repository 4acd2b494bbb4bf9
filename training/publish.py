"""Uploads a trained adapter through the public client, as any user would. Knows nothing of its training.

Whether the server will take it is found out before anything is spent.
"""

import contextlib
from pathlib import Path
from typing import TypeAlias

from adapters.base import Base
from quickchange import Client, PermissionDeniedError, QuickchangeError, ResourceExhaustedError, ServerInfo
from training.errors import PublishError
from training.recipe import Recipe
from training.stopwatch import Stopwatch
from training.targets import adapter_bytes

Resident: TypeAlias = ServerInfo


def resident_at(recipe: Recipe) -> Resident | None:
    """What the server to publish to holds and takes; None if nothing is to be published.

    Raises:
        PublishError: no server applies what the method makes, nobody answers, or the server holds a base in
            another quantisation or takes smaller ranks.
    """
    if recipe.publish is None:
        return None
    _check_method(recipe)
    try:
        with Client(recipe.publish) as client:
            resident = client.server_info()
    except QuickchangeError as error:
        raise PublishError(f"--publish {recipe.publish}: {error}") from error
    _check_rank(recipe, resident)
    if recipe.base_quantization != resident.quantization or not recipe.quantizes_scales:
        raise _other_base(recipe, resident, _described(recipe))
    return resident


def check_resident(recipe: Recipe, resident: Resident, base: Base) -> None:
    """Whether the server holds this very base, and takes an adapter as large as this one will be.

    Raises:
        PublishError: it does not.
    """
    if resident.base_fingerprint != base.fingerprint:
        raise _other_base(recipe, resident, base.fingerprint)
    size, limit = adapter_bytes(recipe, base.layout), resident.limits.max_upload_bytes
    if size > limit:
        raise PublishError(
            f"--publish {recipe.publish}: the adapter will have {size} bytes, the server takes {limit}; "
            "lower rank, give fewer target_modules, or raise its --max-upload-bytes"
        )


def publish_adapter(directory: Path, target: str, name: str, since_step: Stopwatch, *, progress: bool) -> str:
    """Uploads the folder as the next version of `name`, asks it for a token; returns "name@version".

    Raises:
        PublishError: the server refused it; the folder stays.
    """
    try:
        with Client(target) as client:
            reference = client.adapters.push(directory, name, progress=progress).adapter.reference
            since_step.lap("upload")
            _first_token(client, reference)
            since_step.lap("first_token")
    except QuickchangeError as error:
        raise PublishError(
            f"{directory} is trained, but {target} did not take it: {error}; upload it later with "
            f"`quickchange adapters push {directory} --name {name}`"
        ) from error
    return reference


def _first_token(client: Client, reference: str) -> None:
    """Asks for one; a server too busy to give it, or that lets nobody ask, has the adapter all the same."""
    with contextlib.suppress(ResourceExhaustedError, PermissionDeniedError):
        client.generate([0], adapter=reference, max_new_tokens=1)


def _check_method(recipe: Recipe) -> None:
    why = recipe.kind.why_not_served
    if why is not None:
        raise PublishError(
            f"--publish {recipe.publish}: method {recipe.method} makes what no server applies ({why}); train "
            f"with qlora, or without --publish and afterwards {recipe.afterwards}"
        )


def _check_rank(recipe: Recipe, resident: Resident) -> None:
    rank, limit = recipe.saved_rank, resident.limits.max_adapter_rank
    if rank is None or rank <= limit:
        return
    twice = " (method pissa saves twice the rank that it trains)" if recipe.kind.rank_factor > 1 else ""
    raise PublishError(
        f"--publish {recipe.publish}: the adapter will have rank {rank}{twice}, the server takes {limit}; "
        f"train with rank {limit // recipe.kind.rank_factor}, or raise its --max-adapter-rank"
    )


def _described(recipe: Recipe) -> str:
    plain = "" if recipe.quantizes_scales else " without double quantisation"
    return f"a base in {recipe.base_quantization}{plain}"


def _other_base(recipe: Recipe, resident: Resident, ours: str) -> PublishError:
    return PublishError(
        f"--publish {recipe.publish}: resident there is {resident.base_model} ({resident.quantization}, "
        f"{resident.base_fingerprint}); this run trains on {ours}: give its base as --base, "
        "and method qlora for nf4 or lora for none"
    )
