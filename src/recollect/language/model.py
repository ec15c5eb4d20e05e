"""What the tools of this folder need of a language model: ``LSTMModel`` is one, and any other can be."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recollect.errors import DeviceError, DtypeError, LabelError, ShapeError, require_tensor


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


def check_tokens(name: str, tokens: Tensor, *, vocabulary: int, device: torch.device) -> Int[Tensor, "b t"]:
    """Returns the words of some texts as an embedding takes them, or says what is wrong with them.

    Raises:
        ShapeError: If they are not of shape ``(texts, words)``, with at least one word.
        DtypeError: If they are no whole numbers.
        DeviceError: If they are not on the model's device.
        LabelError: If one of them is not in the vocabulary.
    """
    require_tensor(name, tokens)
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ShapeError(f"{name} must have shape (texts, words), with at least one word, got {(*tokens.shape,)}.")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise DtypeError(f"{name} must be whole numbers, got {tokens.dtype}. Use .long().")
    if tokens.device != device:
        raise DeviceError(f"{name} are on {tokens.device}, the model is on {device}. Move one of them with .to().")
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= vocabulary:
        raise LabelError(
            f"words are numbered from 0 to {vocabulary - 1} in this model, got {low if low < 0 else high}. Was "
            "the text read with another vocabulary or tokenizer?"
        )
    return tokens.long()
