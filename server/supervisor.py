"""Tells systemd how the server stands, where systemd started it: sd_notify(3). Knows no gRPC.

Its watchdog ends what ours cannot: a process in which no Python runs any more.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

log = logging.getLogger(__name__)

_SOCKET_VARIABLE: Final = "NOTIFY_SOCKET"
_PERIOD_VARIABLE: Final = "WATCHDOG_USEC"
_PROCESS_VARIABLE: Final = "WATCHDOG_PID"


class Supervisor:
    """
    Attributes:
        period_s: a sign of life is due within so long; None if none is wanted.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get(_SOCKET_VARIABLE)
        self.period_s: float | None = None
        microseconds, process = environ.get(_PERIOD_VARIABLE, ""), environ.get(_PROCESS_VARIABLE)
        if microseconds.isdecimal() and process in (None, str(os.getpid())):
            self.period_s = int(microseconds) / 1e6 or None

    def tell_ready(self) -> None:
        """Requests are taken from now on."""
        self._tell("READY=1")

    def tell_stopping(self) -> None:
        """The server drains; it ends by itself."""
        self._tell("STOPPING=1")

    async def show_life(self) -> None:
        """Sends signs of life until it is cancelled, twice as often as they are due, if any are wanted."""
        while self.period_s is not None:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self.period_s / 2)

    def _tell(self, state: str) -> None:
        """Does not fail: whoever is not told will notice."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(state.encode(), address)
        except OSError as error:
            log.warning("systemd not told %s: %s", state, error)
