"""The adapter that is folded into the resident base, as requests and clients know it. Knows no weights."""

from dataclasses import dataclass
from typing import Literal

from adapters.errors import UnsupportedAdapterError
from server.request import AdapterIdentity

Into = Literal["dequantized", "requantized"]


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """What is in the base's weights.

    Attributes:
        identity: the version it was at start; of a folder its name, and version 0.
        into: what the sum became.
        bare_fingerprint: of the base without it.
    """

    identity: AdapterIdentity
    into: Into
    bare_fingerprint: str

    @property
    def label(self) -> str:
        """As people know it: "name@3", or a folder's name."""
        version = self.identity.version
        return f"{self.identity.name}@{version}" if version else self.identity.name


@dataclass(frozen=True, slots=True)
class Answerer:
    """What answers a request.

    Attributes:
        applied: an adapter that is added to the base; None if there is none to add.
        merged: what is in the base already and answers; None if the bare base or `applied` does.
    """

    applied: AdapterIdentity | None
    merged: AdapterIdentity | None = None

    @property
    def identity(self) -> AdapterIdentity | None:
        """What the caller is told; None for the bare base."""
        return self.applied or self.merged

    def check_scale(self, scale: float) -> None:
        """What is in the weights has its own strength; UnsupportedAdapterError for any other than 1."""
        if self.merged is not None and scale != 1.0:
            raise UnsupportedAdapterError(
                f"adapter_scale is {scale:g}, and {self.merged.name!r} is merged into this server's base as "
                "it is; leave the scale unset, or ask a server that applies the adapter",
                feature="adapter_scale",
            )


def answerer_of(wanted: AdapterIdentity | None, merged: MergedAdapter | None) -> Answerer:
    """Of a request for an adapter, or for none: then the base answers with what is merged into it."""
    if merged is None:
        return Answerer(wanted)
    if wanted is None:
        return Answerer(None, merged.identity)
    if wanted.digest == merged.identity.digest:
        return Answerer(None, wanted)  # perhaps by another name or version of the same content
    return Answerer(wanted)
