"""A TCP proxy that cuts connections, as bad networks do. No test lives here."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

PIECE_BYTES = 16 * 1024
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset and throw away what is on its way


class CuttingProxy:
    """Forwards to a server; each connection lives for so many bytes of what its client sends.

    Args:
        target: HOST:PORT of the server.
        budgets: bytes that the first, second, … connection may send before it is cut; later ones live on.
        server_notices: False leaves the server's side open and silent, as when a cable is pulled.
        client_notices: the same of the client's side.
        of_answers: the budgets are of what its server sends instead.
        before_cut: called, in a thread of the proxy's, once a budget is spent.
    """

    def __init__(
        self,
        target: str,
        budgets: Iterable[int],
        *,
        server_notices: bool = True,
        client_notices: bool = True,
        of_answers: bool = False,
        before_cut: Callable[[], object] = lambda: None,
    ) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._budgets = iter(budgets)
        self._server_notices = server_notices
        self._client_notices = client_notices
        self._of_answers = of_answers
        self._before_cut = before_cut
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                counted, other = (server, client) if self._of_answers else (client, server)
                budget = next(self._budgets, None)
                for work in ((self._counted, counted, other, budget), (self._forwarded, other, counted)):
                    threading.Thread(target=work[0], args=work[1:], daemon=True).start()

    def _counted(self, source: socket.socket, sink: socket.socket, budget: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES if budget is None else min(PIECE_BYTES, budget)):
                sink.sendall(data)
                if budget is not None:
                    budget -= len(data)
                    if not budget:
                        self._before_cut()
                        self.cuts += 1
                        break
        client, server = (sink, source) if self._of_answers else (source, sink)
        if budget != 0 or self._client_notices:
            _reset(client)
        if budget != 0 or self._server_notices:
            _reset(server)

    def _forwarded(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                sink.sendall(data)
        _reset(sink)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()


@contextlib.contextmanager
def cutting(target: str, budgets: Iterable[int], **options: Any) -> Iterator[CuttingProxy]:
    """A proxy for the block; the options are those of its class."""
    proxy = CuttingProxy(target, budgets, **options)
    try:
        yield proxy
    finally:
        proxy.close()
