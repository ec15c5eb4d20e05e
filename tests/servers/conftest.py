"""A real Milvus server, for ``make test-milvus``: it sets RECOLLECT_MILVUS to the Python that the server lies in.

The server listens on all interfaces, so the tests run where there is but the loopback (``unshare --net``).
"""

import fcntl
import shutil
import socket
import struct
from collections import Counter
from collections.abc import Iterator

import pytest
from servers.keeper import Server

pytest.register_assert_rewrite("laws.test_memory_laws")
collect_ignore = ["milvus_process.py"]  # a script for another environment


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each law's cases every sixth runs here: what differs between them is not what a server does."""
    counts: Counter[str] = Counter()
    left_out: list[pytest.Item] = []
    for item in items:
        law = item.nodeid.partition("[")[0]
        if "test_milvus_laws" in law and counts[law] % 6:
            left_out.append(item)
        counts[law] += 1
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    names = {name for _, name in socket.if_nameindex()}
    assert names == {"lo"}, f"the server would listen on {names}: run this by make test-milvus"
    with socket.socket() as some:  # the loopback of a new network is down; SIOCSIFFLAGS with IFF_UP and IFF_RUNNING
        fcntl.ioctl(some, 0x8914, struct.pack("16sH22x", b"lo", 0x41))
    server = Server(tmp_path_factory.mktemp("milvus"))
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.folder)
