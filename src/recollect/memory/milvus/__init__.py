"""A memory in Milvus: in a file of one process, or on a server that many share."""

from recollect.memory.milvus.remote import MilvusMemory

__all__ = ["MilvusMemory"]
