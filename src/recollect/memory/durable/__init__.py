"""A memory on disk: the ring in RAM, SQLite below it."""

from recollect.memory.durable.durable import DurableMemory

__all__ = ["DurableMemory"]
