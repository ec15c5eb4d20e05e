"""The episodic memory: what it holds, how it is read, and how neighbors are found."""

from recollect.memory.episodic import EpisodicMemory
from recollect.memory.index import ExactIndex, Index
from recollect.memory.protocol import Context, Memory

__all__ = ["Context", "EpisodicMemory", "ExactIndex", "Index", "Memory"]
