"""Runs the Milvus server of the package ``milvus`` until standard input closes. For that package's own environment.

    python milvus_process.py FOLDER

Prints the server's process id as soon as there is one, and its port when it answers.
"""

import socket
import sys
from pathlib import Path
from threading import Thread

from milvus import default_server

folder = Path(sys.argv[1])
unpacked = Path(sys.prefix) / "milvus-bin"  # unpacking the server takes half a minute: once for each environment
unpacked.mkdir(exist_ok=True)
folder.mkdir(exist_ok=True)
if not (folder / "bin").exists():
    (folder / "bin").symlink_to(unpacked)
default_server.set_base_dir(str(folder))
default_server.config.set("authorization_enabled", True)
default_server.config.set("proxy.timeTickInterval", 50)  # ms; what a session waits for its own writes
# A killed server leaves connections behind that hold its port for a minute, but not for who says that this is fine.
default_server.config.try_bind_port = lambda port: socket.create_server(("127.0.0.1", port))
default_server.wait_for_started = False
default_server.start()
print(default_server.server_proc.pid, flush=True)


def report() -> None:
    default_server.wait_started()
    print(default_server.listen_port, flush=True)


Thread(target=report, daemon=True).start()
try:
    sys.stdin.read()
finally:
    default_server.stop()
