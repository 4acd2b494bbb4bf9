"""Uploads a trained adapter through the public client, as any user would. Knows nothing of its training."""

from pathlib import Path

from quickchange import Client, QuickchangeError
from training.errors import PublishError


def check_server(target: str, base_fingerprint: str) -> None:
    """Finds out before hours of training whether the server will take the result.

    Raises:
        PublishError: nobody answers at HOST:PORT, or another base is resident there.
    """
    try:
        with Client(target) as client:
            resident = client.server_info()
    except QuickchangeError as error:
        raise PublishError(f"--publish {target}: {error}") from error
    if resident.base_fingerprint != base_fingerprint:
        raise PublishError(
            f"--publish {target}: resident there is {resident.base_model} ({resident.quantization}, "
            f"{resident.base_fingerprint}); this run trains on {base_fingerprint}: give its base as --base, "
            "and method qlora for nf4 or lora for none"
        )


def publish_adapter(directory: Path, target: str, name: str, *, progress: bool) -> str:
    """Uploads the folder as the next version of `name`; returns "name@version".

    Raises:
        PublishError: the server refused it; the folder stays.
    """
    try:
        with Client(target) as client:
            result = client.adapters.push(directory, name, progress=progress)
    except QuickchangeError as error:
        raise PublishError(
            f"{directory} is trained, but {target} did not take it: {error}; upload it later with "
            f"`quickchange adapters push {directory} --name {name}`"
        ) from error
    return result.adapter.reference
