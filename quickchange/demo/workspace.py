"""Where everything of the demo lies: one folder, which a later run goes on from. Knows no step."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from quickchange import Client, PlainText, QuickchangeError
from quickchange.demo.errors import DemoError


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder of the demo.

    data/       rows that the adapters learn from
    adapters/   trained adapters, kept for later runs
    merged/     a model with an adapter folded in
    store/      the server's adapters, new in every run
    server.log  what the server said
    """

    root: Path

    @classmethod
    def open(cls, root: Path) -> "Workspace":
        """Makes the folder if need be.

        Raises:
            DemoError: the server of an earlier run still works in it.
        """
        workspace = cls(root.resolve())
        workspace._refuse_running_server()
        shutil.rmtree(workspace.store, ignore_errors=True)
        for folder in (workspace.data, workspace.adapters, workspace.merged, workspace.store):
            folder.mkdir(parents=True, exist_ok=True)
        return workspace

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def server_log(self) -> Path:
        return self.root / "server.log"

    @property
    def _server_file(self) -> Path:
        return self.root / "server.json"

    def remember_server(self, pid: int, address: str) -> None:
        """So that the next run does not work under a server that was kept."""
        self._server_file.write_text(json.dumps({"pid": pid, "grpc": address}))

    def forget_server(self) -> None:
        self._server_file.unlink(missing_ok=True)

    def _refuse_running_server(self) -> None:
        if not self._server_file.is_file():
            return
        kept = json.loads(self._server_file.read_text())
        try:
            with Client(kept["grpc"], credentials=PlainText(), timeout_s=2.0, retry_window_s=0.1) as client:
                client.server_info()
        except QuickchangeError:
            self.forget_server()
            return
        raise DemoError(
            f"the server of an earlier demo still runs on {self.store} at {kept['grpc']}; stop it with "
            f"`kill {kept['pid']}`, or give another --out"
        )
