"""Files of certificates and keys: whether they can be used, in words. Knows neither client nor server."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

_MISMATCHES: Final = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH")
_MAX_ROUNDS: Final = 8  # of a handshake in memory; TLS 1.3 takes three


class CertificateError(ValueError):
    """A file is missing, not what it should be, or does not belong to the other; the message names it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a client that knows who signed it thinks of a server's certificate.

    Attributes:
        complaint: why it refuses it: its dates, its purpose; None if it does not.
        expires_s: until when it takes it, Unix time; 0 if it refuses it now.
    """

    complaint: str | None
    expires_s: float


class _EncryptedError(Exception):
    """The key asks for a password."""


def read_pem(path: Path) -> bytes:
    """
    Raises:
        CertificateError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}") from None


def check_authorities(path: Path) -> None:
    """
    Raises:
        CertificateError: the file holds no certificate.
    """
    read_pem(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise CertificateError(
            f"{path} holds no certificate; give a PEM file that begins with -----BEGIN CERTIFICATE-----"
        ) from None


def check_pair(certificate: Path, key: Path) -> ssl.SSLContext:
    """A context that would serve with them.

    Raises:
        CertificateError: one is not what it should be, or the key is not the certificate's.
    """
    check_authorities(certificate)  # tells a bad certificate from a bad key, which the next step does not
    read_pem(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except _EncryptedError:
        raise CertificateError(
            f"{key} is encrypted; decrypt it with `openssl pkey -in KEY -out PLAIN`, for you alone to read"
        ) from None
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise CertificateError(
                f"{key} is not the key of {certificate}; give the one it was made with"
            ) from None
        raise CertificateError(
            f"{key} holds no private key that can be used; give an unencrypted PEM file"
        ) from None
    return context


def standing_of(certificate: Path, server: ssl.SSLContext) -> Standing:
    """A client in memory that trusts this very certificate is served by the context of `check_pair`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cafile=certificate)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server)
    serving = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(_MAX_ROUNDS):
        for side in (client, serving):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return Standing(error.verify_message, 0.0)
    names = client.getpeercert()
    assert names is not None, "the handshake ended"
    return Standing(None, ssl.cert_time_to_seconds(cast(str, names["notAfter"])))


def _no_password() -> str:
    raise _EncryptedError
