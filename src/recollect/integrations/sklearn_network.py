"""What is behind the scikit-learn estimators: their settings, a small network, and its training. Torch alone."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from recollect.adaptation import rules
from recollect.errors import LabelError, NonFiniteError, SettingError, require_number, require_whole

_ROWS = 8192  # examples whose keys are made at once

_KINDS = {"O": "text", "U": "text", "b": "truth values", "i": "numbers", "u": "numbers", "f": "numbers"}

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """The arguments of an estimator, but for ``random_state``, checked and without types of NumPy.

    Raises:
        SettingError: If one is out of its range.
    """

    hidden_sizes: tuple[int, ...]
    neighbors: int
    local_rate: float
    local_steps: int
    capacity: int | None
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float

    def __post_init__(self) -> None:
        if not isinstance(self.hidden_sizes, tuple):
            raise SettingError(f"hidden_sizes must be a tuple of widths, such as (128,), got {self.hidden_sizes!r}.")
        for width in self.hidden_sizes:
            require_whole("each of hidden_sizes", width)
        for name in ("neighbors", "epochs", "batch_size"):
            require_whole(name, getattr(self, name))
        require_whole("local_steps", self.local_steps, low=0)
        if self.capacity is not None:
            require_whole("capacity", self.capacity)
        require_number("local_rate", self.local_rate, low=0.0)
        require_number("learning_rate", self.learning_rate, above=0.0)
        require_number("weight_decay", self.weight_decay, low=0.0)

    @classmethod
    def checked(cls, arguments: dict[str, Any], *, rate_below: float) -> "Settings":
        """Returns the settings among an estimator's arguments."""
        settings = cls(**{field.name: plain(arguments[field.name]) for field in fields(cls)})
        if settings.local_rate >= rate_below:
            raise SettingError(
                f"local_rate must be below {rate_below:g} here, as larger steps may run away, got "
                f"{settings.local_rate!r}. Take more local_steps."
            )
        return settings


def same_kind(labels: Any, known: Any) -> Any:
    """Returns an array of labels, if it can be joined to those that are known without turning one into the other.

    Raises:
        LabelError: If one is text and the other numbers, say.
    """
    if len(labels) == 0:
        return known[:0]
    kinds = [_KINDS.get(some.dtype.kind, str(some.dtype)) for some in (labels, known)]
    if len(set(kinds)) > 1 and len(known):
        raise LabelError(f"labels must be {kinds[1]} like {known.tolist()[0]!r}, got {labels.tolist()[0]!r}.")
    return labels


def plain(value: Any) -> Any:
    """Returns numbers of NumPy, which grid searches hand over, as Python's, and lists and arrays as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if type(value).__module__ == "numpy":
        return plain(value.tolist())
    return value


class Network(nn.Module):
    """Standardization and hidden layers, which make the keys, and a linear head.

    All in float64, so that a prediction depends on what else is in its batch in its last digits alone. The keys are
    rounded to float32, which drops those digits: equal examples have equal keys, and which neighbors are nearest is
    the same for a batch and for its rows one by one.

    The layers end in tanh, so no key is longer than the square root of its size.

    Args:
        sizes: The number of features, the widths of the hidden layers, the number of outputs. Without hidden layers
            the keys are the standardized features.
        generator: Draws the weights, uniform in ``+-1/sqrt(inputs)`` as ``nn.Linear`` does; zeros when None.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, *sizes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(sizes[0], dtype=torch.float64))
        self.register_buffer("scale", torch.ones(sizes[0], dtype=torch.float64))
        layers: list[nn.Module] = []
        for inputs, width in itertools.pairwise(sizes[:-1]):
            layers += [_linear(inputs, width, generator), nn.Tanh()]
        self.hidden = nn.Sequential(*layers)
        self.head = _linear(sizes[-2], sizes[-1], generator)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What the network was made with; the head may have grown since."""
        widths = (layer.out_features for layer in self.hidden if isinstance(layer, nn.Linear))
        return len(self.mean), *widths, self.head.out_features

    def forward(self, inputs: Float[Tensor, "b f"]) -> Float[Tensor, "b c"]:
        """Returns the head's outputs; what training works on."""
        return self.head(self._hidden(inputs))

    @torch.no_grad()
    def keys(self, inputs: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        """Returns what goes into the head, in float32."""
        return torch.cat([self._hidden(rows).float() for rows in inputs.split(_ROWS)])

    def _hidden(self, inputs: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        return self.hidden((inputs - self.mean) / self.scale)


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, device="meta", dtype=torch.float64).to_empty(device="cpu")  # draws nothing
    with torch.no_grad():
        for parameter in linear.parameters():
            if generator is None:
                parameter.zero_()
            else:
                parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return linear


def mean_and_scale(columns: Float[Tensor, "n f"]) -> tuple[Float[Tensor, " f"], Float[Tensor, " f"]]:
    """Returns the mean and the standard deviation of each column; 1 for a column that does not vary.

    Raises:
        NonFiniteError: If squares overflow.
    """
    mean = columns.mean(0)
    scale = (columns - mean).square().mean(0).sqrt()
    if not bool(scale.isfinite().all()):
        column = int((~scale.isfinite()).nonzero()[0])
        raise NonFiniteError(f"column {column} holds numbers whose squares overflow float64. Scale it down.")
    rounding = 8 * torch.finfo(columns.dtype).eps * columns.abs().amax(0)  # a constant column's mean may be off by it
    return mean, scale.masked_fill(scale <= rounding, 1.0)


def train(
    network: Network,
    inputs: Float[Tensor, "n f"],
    targets: Shaped[Tensor, "n *c"],
    loss: Loss,
    *,
    settings: Settings,
    generator: torch.Generator,
) -> None:
    """Trains a network by AdamW, whose rate falls to zero along a line."""
    rate, epochs, size = settings.learning_rate, settings.epochs, settings.batch_size
    with torch.no_grad():
        for buffer, value in zip((network.mean, network.scale), mean_and_scale(inputs), strict=True):
            buffer.copy_(value)
    # Our own Adam, on all parameters as one vector: torch.optim's first step takes seconds, to import a compiler.
    parameters = list(network.parameters())
    weights = parameters_to_vector(parameters).detach()
    vector_to_parameters(weights, parameters)  # from now on they are views of it
    state, steps, step = rules.adam(rate).init({"all": weights}), epochs * -(-len(inputs) // size), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(size):
            value = loss(network(inputs[rows]), targets[rows])
            gradient = parameters_to_vector(torch.autograd.grad(value, parameters))
            now = rate * (1 - step / steps)
            delta, state = rules.adam(now).update({"all": gradient}, state, {"all": weights}, value.detach())
            weights.mul_(1 - now * settings.weight_decay).add_(delta["all"])
            step += 1
    for parameter in parameters:
        parameter.data = parameter.data.clone()  # each by itself again
