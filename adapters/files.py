"""Opening files that a stranger put there: regular ones only, never through a link. Knows no format."""

import io
import os
import stat
from pathlib import Path

from adapters.errors import InvalidAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BUNDLE_FILE = "quickchange.json"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, BUNDLE_FILE)
CARD_FILE = "README.md"
"""The model card that training writes beside them, for people and hubs; it is never sent to a server."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open for reading. A link, a pipe or a device is refused, and opening one never blocks.

    Raises:
        InvalidAdapterError: reason NOT_A_FILE or MISSING_FILE.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InvalidAdapterError(f"{path.name} is missing", reason="MISSING_FILE") from None
    except OSError as error:
        raise _not_a_file(path, os.strerror(error.errno or 0)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_file(path, "it is of another kind")
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The whole file, if it is regular and at most max_bytes long."""
    with open_regular(path) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise InvalidAdapterError(
            f"{path.name} is larger than the {max_bytes} bytes allowed", reason="FILE_TOO_LARGE"
        )
    return raw


def _not_a_file(path: Path, why: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{path.name} is not a regular file ({why}); send the file itself", reason="NOT_A_FILE"
    )
