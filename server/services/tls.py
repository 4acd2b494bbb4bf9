"""The server's certificate: checked at the start, and read again when its files change. Knows no calls."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import grpc

from quickchange.certificates import (
    CertificateError,
    check_authorities,
    check_pair,
    read_pem,
    standing_of,
)
from server.access_settings import TlsSettings
from server.file_marks import Mark, mark_of

log = logging.getLogger(__name__)


class ServerCertificates:
    """What new connections are served with. Files that are no good leave the last good ones in use.

    Attributes:
        expires_s: until when clients take what is in use, Unix time; 0 if they refuse it already.

    Args:
        settings: with a certificate.
        on_reload: told whether each look at changed files found them good; any thread.

    Raises:
        CertificateError: the files of the start are no good.
    """

    def __init__(self, settings: TlsSettings, on_reload: Callable[[bool], None]) -> None:
        assert settings.cert is not None, "the settings checked it"
        assert settings.key is not None, "the settings checked it"
        self._cert, self._key, self._client_ca = settings.cert, settings.key, settings.client_ca
        self._on_reload = on_reload
        self._lock = threading.Lock()  # gRPC asks from several threads
        self.expires_s = 0.0
        self._marks, self._current = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For a port; each new connection looks whether the files have changed."""
        return grpc.dynamic_ssl_server_credentials(
            self._current,
            self._changed,  # type: ignore[arg-type]  # the stubs do not know of None, the documentation does
            require_client_authentication=self._client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC goes on with; None for what it has."""
        with self._lock:
            if self._looked() == self._marks:
                return None
            try:
                self._marks, self._current = self._read()
            except CertificateError as error:
                self._marks = self._looked()  # said once for each state of the files
                log.error("certificate not reloaded, the last one stays in use: %s", error)
                self._on_reload(False)
                return None
            log.info("certificate reloaded file=%s", self._cert)
            self._on_reload(True)
            return self._current

    def _read(self) -> tuple[tuple[Mark | None, ...], grpc.ServerCertificateConfiguration]:
        marks = self._looked()
        context = check_pair(self._cert, self._key)
        if self._client_ca is not None:
            check_authorities(self._client_ca)
        standing = standing_of(self._cert, context)
        pair = (read_pem(self._key), read_pem(self._cert))
        roots = None if self._client_ca is None else read_pem(self._client_ca)
        if self._looked() != marks:  # what was checked may not be what was read
            raise CertificateError(f"{self._cert} or a file that belongs to it changed while it was read")
        if standing.complaint:
            log.warning(
                "clients will refuse the certificate file=%s: %s; renew it", self._cert, standing.complaint
            )
        self.expires_s = standing.expires_s
        return marks, grpc.ssl_server_certificate_configuration([pair], roots)

    def _looked(self) -> tuple[Mark | None, ...]:
        files: tuple[Path | None, ...] = (self._cert, self._key, self._client_ca)
        return tuple(mark_of(path) for path in files if path is not None)
