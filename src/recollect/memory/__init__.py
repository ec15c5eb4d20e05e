"""The episodic memory: what it holds, how it is read, and how neighbors are found."""

from recollect.memory.approximate import ApproximateIndex
from recollect.memory.dictionary import NeuralDictionary
from recollect.memory.durable import DurableMemory
from recollect.memory.episodic import EpisodicMemory
from recollect.memory.exact import ExactIndex
from recollect.memory.index import Index
from recollect.memory.milvus import MilvusMemory
from recollect.memory.protocol import Context, Memory
from recollect.memory.static import Static

__all__ = [
    "ApproximateIndex",
    "Context",
    "DurableMemory",
    "EpisodicMemory",
    "ExactIndex",
    "Index",
    "Memory",
    "MilvusMemory",
    "NeuralDictionary",
    "Static",
]
