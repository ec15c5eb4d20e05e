"""What is served: an encoder, an ``MbPA`` with its memory, and what inputs and classes look like."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from recollect.errors import SettingError, ShapeError, require
from recollect.likelihoods import Categorical
from recollect.mbpa import MbPA
from recollect.memory import DurableMemory, EpisodicMemory, Memory

_NAME = 100  # characters of a class name at most

Batch = Float[Tensor, "b ..."] | list[str]  # inputs as an encoder gets them


class Examples(NamedTuple):
    """Inputs with the names of their classes."""

    inputs: Batch
    labels: list[str]


@dataclass(frozen=True)
class Service:
    """A model as a service: what a factory returns to ``recollect serve module:factory``.

    Args:
        encode: Maps a batch of inputs to keys ``(b, d)``: the network up to the layer that ``layer`` replaces. A module
            is put into evaluation mode.
        layer: Predicts labels from keys. What is taught goes into its memory.
        input_shape: The shape of one input, a list of numbers in JSON; inputs reach ``encode`` as a float32 tensor
            ``(b, *input_shape)``. With None inputs are texts and reach it as a list of strings. Inputs of shape
            ``(height, width)`` are pictures in gray, from 0 (paper) to 1 (ink), and can be drawn on the page.
        classes: The names of the head's first outputs. The others are room for classes that are taught later. Without
            names, each output is called by its number.
        examples: What an empty memory begins with, the first time it is served.
        samples: Inputs that the page offers to try.
        folder: Where the entries of an ``EpisodicMemory`` are kept: it becomes a ``DurableMemory`` there, beside the
            names, idempotency keys and pictures of what is taught. Without one they last as long as the process, unless
            the memory is durable by itself.

    Raises:
        SettingError: If a part is not what it should be.

    Example:
        >>> from recollect import EpisodicMemory, LocalAdaptation, rules
        >>> memory = EpisodicMemory(capacity=100, key_size=4)
        >>> adapt = LocalAdaptation(rules.sgd(0.1), steps=5)
        >>> layer = MbPA(torch.nn.Linear(4, 3), memory, neighbors=5, adaptation=adapt)
        >>> service = Service(torch.nn.Flatten(), layer, input_shape=(2, 2), classes=("cat", "dog"))
        >>> service.is_picture
        True
    """

    encode: Callable[[Any], Tensor]
    layer: MbPA
    _: KW_ONLY
    input_shape: tuple[int, ...] | None
    classes: tuple[str, ...] = ()
    examples: Examples | None = None
    samples: Examples | None = None
    folder: Path | str | None = None

    def __post_init__(self) -> None:
        require("layer", self.layer, MbPA, "an MbPA, which has a memory to teach")
        if not isinstance(self.layer.likelihood, Categorical):
            raise SettingError(f"serve predicts labels, but this MbPA has the likelihood {self.layer.likelihood}.")
        if not callable(self.encode):
            raise SettingError(f"encode must be a function or a module, got {self.encode!r}.")
        shape = self.input_shape
        if shape is not None and not (
            isinstance(shape, tuple) and shape and all(type(size) is int and size > 0 for size in shape)
        ):
            raise SettingError(f"input_shape must be a tuple of sizes above 0, or None for texts, got {shape!r}.")
        names = self.classes
        if not isinstance(names, tuple) or len(set(names)) < len(names):
            raise SettingError(f"classes must be a tuple of different names, got {names!r}.")
        for name in names:
            require_name(name)
        self._check_pairs()

    def _check_pairs(self) -> None:
        for name, pairs in (("examples", self.examples), ("samples", self.samples)):
            if pairs is not None and len(pairs.inputs) != len(pairs.labels):
                raise SettingError(f"{name} have {len(pairs.inputs)} inputs, but {len(pairs.labels)} labels.")

    @property
    def is_picture(self) -> bool:
        """Whether inputs are pictures in gray."""
        return self.input_shape is not None and len(self.input_shape) == 2

    def blank(self, count: int) -> Batch:
        """Returns inputs that say nothing."""
        return ["a text"] * count if self.input_shape is None else torch.zeros(count, *self.input_shape)

    def keys(self, inputs: Batch) -> Shaped[Tensor, "b d"]:
        """Returns the inputs' keys.

        Raises:
            ShapeError: If the encoder does not return one key for each input.
        """
        try:
            with torch.no_grad():
                keys = self.encode(inputs)
        except SystemExit as error:  # one input must not end the service
            raise RuntimeError(f"encode wants to exit, with status {error.code}") from error
        if not isinstance(keys, Tensor) or keys.dim() != 2 or len(keys) != len(inputs):
            got = tuple(keys.shape) if isinstance(keys, Tensor) else type(keys).__name__
            raise ShapeError(f"encode must map {len(inputs)} inputs to keys ({len(inputs)}, d), got {got}.")
        return keys


def ring(memory: Memory) -> EpisodicMemory | None:
    """Returns the slots of a memory with their write times (-1: empty), where it shows them."""
    if isinstance(memory, DurableMemory):
        return memory.ring
    return memory if isinstance(memory, EpisodicMemory) else None


def require_name(name: object) -> None:
    """Refuses what cannot be the name of a class.

    Raises:
        SettingError: If it is empty, too long, or has characters that cannot be printed.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > _NAME or not name.isprintable():
        shown = repr(name if not isinstance(name, str) or len(name) <= _NAME else name[:_NAME] + "...")
        raise SettingError(f"a class needs a name of 1 to {_NAME} printable characters, got {shown}.")
