"""What the tools of this folder need of a language model: ``LSTMModel`` is one, and any other can be."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn


@runtime_checkable
class LanguageModel(Protocol):
    """Words to hidden states, hidden states to the inputs of a softmax layer, and that layer."""

    @property
    def output(self) -> nn.Linear:
        """The softmax layer."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """Maps hidden states to logits: ``output(inputs(hidden))``."""
        ...

    def hidden(self, tokens: Int[Tensor, "b t"], state: Any = None) -> tuple[Float[Tensor, "b t h"], Any]:
        """Returns a vector for each word, from it and those before it, and what is needed to go on; no dropout.

        Gradients go through the vectors to the weights, but no further back than to ``state``.

        Args:
            tokens: The words.
            state: As returned for the segment before; the beginning of a text when None.
        """
        ...

    def inputs(self, hidden: Float[Tensor, "*n h"]) -> Float[Tensor, "*n d"]:
        """Maps hidden states to what goes into the softmax layer."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights, each once."""
        ...
