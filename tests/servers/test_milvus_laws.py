"""The laws of every memory (tests/laws), on a real Milvus server."""

from collections.abc import Iterator

import pytest
from laws import test_memory_laws as laws
from servers.keeper import PYTHON, TOKEN, Server

from recollect import MilvusMemory
from recollect.memory import Memory

if PYTHON is None:
    pytest.skip("needs a Milvus server: make test-milvus", allow_module_level=True)

globals().update({name: law for name, law in vars(laws).items() if name.startswith("test_") or name == "filled"})


@pytest.fixture
def make(server: Server) -> Iterator[laws.Make]:
    """Makes memories in collections that are used again, as making one takes the server a second."""
    used: list[str] = []
    handles: list[MilvusMemory] = []

    def new(capacity: int = laws.CAPACITY, key_size: int = laws.KEY, **values) -> Memory:
        name = "_".join(["laws", str(capacity), str(key_size), *(str(value) for value in values.values())])
        name = "".join(letter if letter.isalnum() else "_" for letter in name)
        used.append(name)
        name = f"{name}_{used.count(name)}"
        memory = MilvusMemory(server.uri, name, capacity=capacity, key_size=key_size, token=TOKEN, **values)
        handles.append(memory)
        memory.clear()
        return memory

    yield new
    for handle in handles:
        handle.close()
