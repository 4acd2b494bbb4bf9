"""Settings of who may call, and how the connection is protected. Does not know how they are used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from server.sections import About, RangeError, Section


@dataclass(frozen=True, slots=True)
class TlsSettings(Section):
    """Encryption of the gRPC face; without a certificate it is plain text."""

    cert: Annotated[Path | None, About("PEM file: the server's certificate, then its chain")] = None
    key: Annotated[Path | None, About("PEM file: its private key, not encrypted")] = None
    client_ca: Annotated[
        Path | None, About("PEM file: who signs clients' certificates, which are then demanded")
    ] = None

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.cert is not None and self.key is None:
            raise RangeError("key", f"is not set: give the private key of {self.cert}")
        if self.cert is None and self.key is not None:
            raise RangeError("cert", f"is not set: give the certificate that {self.key} belongs to")
        if self.cert is None and self.client_ca is not None:
            raise RangeError("cert", "is not set: clients' certificates need the server to have one")


@dataclass(frozen=True, slots=True)
class AccessSettings(Section):
    """Who may call what."""

    tokens: Annotated[
        Path | None, About("file of tokens, from `quickchange tokens`; unset: everybody may do everything")
    ] = None
    audit_log: Annotated[
        Path | None, About("file of one JSON line per change of an adapter; unset: among the log's lines")
    ] = None
    insecure_open: Annotated[
        Literal["on", "off"],
        About("listen on addresses that others reach with neither tokens nor clients' certificates"),
    ] = "off"
