"""What a server opens, or looks at, before it is one: addresses, certificate, tokens, store. Knows no engine.

All of it comes before the base is loaded, which takes minutes.
"""

import ipaddress
import logging
import socket
from pathlib import Path

from adapters import host_memory
from adapters.errors import AdapterError
from adapters.quota import StoreQuota
from adapters.remote import RemotePlace
from adapters.replica import ReplicaStore
from adapters.store import AdapterStore
from quickchange.certificates import CertificateError
from server.access import Doorkeeper, OpenDoor
from server.config import GIB, ServerSettings
from server.metrics import Metrics
from server.services.audit import write_audit_to
from server.services.tls import ServerCertificates
from server.token_file import TokenFileError

log = logging.getLogger(__name__)


class StartError(Exception):
    """The server cannot start; the message is one line with the remedy."""


def check_exposure(settings: ServerSettings) -> None:
    """
    Raises:
        StartError: the address is not this machine's alone, nobody is asked for a token or a certificate, and
            nobody said that this is wanted.
    """
    host, tls, access = settings.grpc.host, settings.tls, settings.access
    if is_loopback(host):
        return
    if access.tokens is None and tls.client_ca is None:
        if access.insecure_open == "off":
            raise StartError(
                f"--host {host} would let everybody who reaches it do everything; give --tokens FILE "
                "(see `quickchange tokens create`) or --tls-client-ca FILE, or say that this is wanted with "
                "--insecure-open on"
            )
        log.warning("everybody who reaches %s may do everything: --insecure-open is on", host)
    elif tls.cert is None:
        log.warning("tokens travel to %s in plain text, where others can read them: give --tls-cert", host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it, by every address that the name has; False if it has none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    return bool(addresses) and all(address.is_loopback for address in addresses)


def doors_of(settings: ServerSettings, metrics: Metrics) -> Doorkeeper | OpenDoor:
    """Who decides about calls; StartError if the file of tokens is no good."""
    if settings.access.tokens is None:
        return OpenDoor()
    try:
        return Doorkeeper(settings.access.tokens, metrics.count_token_reload)
    except TokenFileError as error:
        raise StartError(f"--tokens: {error}") from None


def open_audit_log(settings: ServerSettings) -> None:
    """From here on changes of adapters are told where the settings say; StartError if that cannot be."""
    path = settings.access.audit_log
    if path is None:
        return
    try:
        write_audit_to(path)
    except OSError as error:
        raise StartError(f"--audit-log {path}: cannot be written: {error.strerror}") from None


def check_tokens(settings: ServerSettings) -> None:
    """Finds a bad file of tokens before minutes go into loading the base."""
    doors_of(settings, Metrics())


def check_certificate(settings: ServerSettings) -> None:
    """Finds a bad certificate before minutes go into loading the base."""
    if settings.tls.cert is None:
        return
    try:
        ServerCertificates(settings.tls, on_reload=lambda _: None)
    except CertificateError as error:
        raise StartError(f"--tls-cert, --tls-key or --tls-client-ca: {error}") from None


def open_store(settings: ServerSettings) -> AdapterStore:
    """The store of a folder, or a copy of the one at a URL; StartError if it cannot be used."""
    limits = settings.store
    quota = StoreQuota(limits.max_bytes, limits.max_bytes_per_name, limits.max_versions_per_name)
    try:
        if isinstance(limits.root, str):
            assert limits.cache is not None, "the settings checked it"
            return _open_replica(limits.root, limits.cache, limits.reserve_bytes)
        return AdapterStore(limits.root, quota)
    except AdapterError as error:
        raise StartError(f"--store {settings.store.root}: {error}") from None


def _open_replica(url: str, cache: Path, reserve_bytes: int) -> ReplicaStore:
    """As the store is now; or as it was, if there is a copy and the store does not answer."""
    store = ReplicaStore(cache, RemotePlace(url), reserve_bytes=reserve_bytes)
    try:
        store.refresh()
    except AdapterError as error:
        if not store.generation:
            store.close()
            raise
        log.warning("starting with snapshot %d of the store: %s", store.generation, error)
    else:
        log.info("store opened url=%s snapshot=%d", url, store.generation)
    return store


def no_memory(settings: ServerSettings, error: Exception) -> str:
    """What to say if the start ran out of memory where nobody had counted."""
    free = host_memory.now().available_bytes / GIB
    return (
        f"there is not enough memory to serve {settings.base.source} ({error}); {free:.1f} GiB of the host "
        "are free; lower --kv-bytes, --adapter-device-bytes or --adapter-host-bytes, or take a smaller base"
    )


def check_free(flag: str, host: str, port: int) -> None:
    """Finds a taken port before minutes go into loading the base."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise cannot_listen(flag, host, port, error) from None


def cannot_listen(flag: str, host: str, port: int, error: Exception) -> StartError:
    """The error that names the flag which says where to listen."""
    why = error.strerror if isinstance(error, OSError) else str(error)
    return StartError(
        f"cannot listen on {address_of(host, port)}: {why}; give another {flag}, 0 picks a free one"
    )


def address_of(host: str, port: int) -> str:
    """HOST:PORT, with brackets where the host needs them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
