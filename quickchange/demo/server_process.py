"""The demo's server: a local one on the demo's store, remembered so that no later run works under it."""

from quickchange.demo.errors import DemoError
from quickchange.demo.workspace import Workspace
from quickchange.local_server import LocalServer, LocalServerError


class ServerProcess(LocalServer):
    """A local server with SmolLM2 on a workspace's store."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        try:
            super().__init__("smollm2", workspace.store, workspace.server_log)
        except LocalServerError as error:
            raise DemoError(str(error)) from error
        workspace.remember_server(self.pid, self.grpc)

    def stop(self) -> None:
        super().stop()
        self._workspace.forget_server()
