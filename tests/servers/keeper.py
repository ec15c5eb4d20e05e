"""Starts, kills and stops a real Milvus server."""

import os
import signal
import subprocess
from pathlib import Path

PYTHON = os.environ.get("RECOLLECT_MILVUS")
TOKEN = "root:Milvus"


class Server:
    """One server, which can be killed and started again on its data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = ""
        self.pid = 0
        self._keeper: subprocess.Popen[str] | None = None

    def start(self) -> None:
        assert PYTHON is not None
        script = Path(__file__).with_name("milvus_process.py")
        command = [PYTHON, str(script), str(self.folder)]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        uri = f"http://127.0.0.1:{int(self._keeper.stdout.readline())}"
        assert self.uri in {"", uri}, "it has come back, but elsewhere"
        self.uri = uri

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Stops it if it runs: its keeper does so when its standard input closes, even if this process is killed."""
        if self._keeper is not None:
            self._keeper.communicate()
            self._keeper = None
