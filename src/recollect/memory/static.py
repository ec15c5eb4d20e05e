"""``Static``: a memory that was filled beforehand and is only read from."""

from jaxtyping import Int, Shaped
from torch import Tensor, nn

from recollect.errors import SettingError, require
from recollect.kernels import Kernel, inverse_distance
from recollect.memory.protocol import Context, Memory


class Static(nn.Module):
    """A memory whose entries are older than anything that is read: ``before=`` hides none of them.

    ``recollect.language.evaluate`` shows each word what a memory knew when the word's turn came, counted in entries
    since the text's beginning. Of a memory that was filled before, it would show the first entries only; of this one
    it shows all.

    Args:
        memory: The memory, filled. It is shared, not copied.

    Raises:
        SettingError: If it is no memory.

    Example:
        >>> import torch
        >>> from recollect import EpisodicMemory
        >>> memory = EpisodicMemory(capacity=10, key_size=2)
        >>> slots = memory.write(torch.eye(2), torch.tensor([7, 8]))
        >>> Static(memory).read(torch.tensor([0.0, 1.0]), neighbors=1, before=0).values
        tensor([8])
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        require("memory", memory, Memory, "a memory, such as EpisodicMemory(capacity=1000, key_size=64)")
        self.memory = memory

    @property
    def capacity(self) -> int:
        """The largest number of entries."""
        return self.memory.capacity

    def __len__(self) -> int:
        return len(self.memory)

    def __bool__(self) -> bool:
        return True  # an empty memory is still a memory

    def read(
        self,
        queries: Shaped[Tensor, "*b d"],
        neighbors: int | None,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, "*b"] | None = None,
    ) -> Context:
        """Retrieves the nearest of all entries; ``before`` is accepted and has no effect."""
        return self.memory.read(queries, neighbors, kernel=kernel)

    def forget(self, slots: int | Int[Tensor, "..."]) -> None:
        """Removes entries, at once and for good."""
        self.memory.forget(slots)

    def write(self, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]) -> Int[Tensor, " n"]:
        """Refuses: what is written while a text is read would be seen before its time.

        Raises:
            SettingError: Always.
        """
        raise SettingError("a static memory is only read from. Write to the memory that it was made of, beforehand.")

    def clear(self) -> None:
        """Refuses, as ``write`` does.

        Raises:
            SettingError: Always.
        """
        raise SettingError("a static memory is only read from. Clear the memory that it was made of, beforehand.")
