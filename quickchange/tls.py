"""How a client speaks TLS: from files, or as the environment says. Knows no address and no call."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, final

import grpc

from quickchange.certificates import CertificateError, check_authorities, check_pair, read_pem
from quickchange.errors import InvalidArgumentError

USE_VARIABLE: Final = "QUICKCHANGE_TLS"
AUTHORITY_VARIABLE: Final = "QUICKCHANGE_SERVER_CA"
CERTIFICATE_VARIABLE: Final = "QUICKCHANGE_CLIENT_CERT"
KEY_VARIABLE: Final = "QUICKCHANGE_CLIENT_KEY"
NAME_VARIABLE: Final = "QUICKCHANGE_SERVER_NAME"
_YES: Final = ("1", "on", "true", "yes")
_NO: Final = ("", "0", "off", "false", "no")


@final
class PlainText:
    """Given as credentials: no TLS, whatever the environment asks for."""


Credentials = grpc.ChannelCredentials | PlainText | None
"""What clients take; None leaves it to the environment."""


def tls_credentials(
    ca: str | Path | None = None, cert: str | Path | None = None, key: str | Path | None = None
) -> grpc.ChannelCredentials:
    """Credentials for `Client` and `AsyncClient`, from PEM files that are read now.

    Args:
        ca: certificates of whoever signs servers' certificates; None takes the roots that come with gRPC.
        cert, key: this client's own, for servers that ask for one; both or neither.

    Raises:
        InvalidArgumentError: a file cannot be read, is no PEM file, or the key is not the certificate's.
    """
    if (cert is None) != (key is None):
        given, missing = ("certificate", "key") if key is None else ("key", "certificate")
        raise InvalidArgumentError(f"TLS: there is a client's {given} without its {missing}; give both")
    try:
        if ca is not None:
            check_authorities(Path(ca))
        if cert is not None and key is not None:
            check_pair(Path(cert), Path(key))
        roots, chain, private = (None if path is None else read_pem(Path(path)) for path in (ca, cert, key))
    except CertificateError as error:
        raise InvalidArgumentError(f"TLS: {error}") from None
    return grpc.ssl_channel_credentials(roots, private, chain)


def resolved(credentials: Credentials, environ: Mapping[str, str]) -> grpc.ChannelCredentials | None:
    """What was given, else what the environment asks for; None is plain text. Errors as that."""
    if isinstance(credentials, PlainText):
        return None
    return credentials or credentials_from(environ)


def credentials_from(environ: Mapping[str, str]) -> grpc.ChannelCredentials | None:
    """What the environment asks for; None for plain text.

    Raises:
        InvalidArgumentError: as `tls_credentials`, or QUICKCHANGE_TLS is neither yes nor no.
    """
    ca, cert, key = (
        environ.get(each) or None for each in (AUTHORITY_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE)
    )
    wish = environ.get(USE_VARIABLE, "").lower()
    if wish not in _YES + _NO:
        raise InvalidArgumentError(f"{USE_VARIABLE} is {wish!r}; set it to on or off, or unset it")
    if wish in _YES or (not wish and (ca or cert or key)):
        return tls_credentials(ca, cert, key)
    return None
