"""What is behind the scikit-learn estimators: a small network, its training, and a memory that grows. Torch alone."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from recollect import snapshot
from recollect.adaptation import rules
from recollect.errors import FormatError, LabelError, NonFiniteError, SettingError, require_number, require_whole
from recollect.memory import EpisodicMemory

_ROWS = 8192  # examples whose keys are made at once
_TWINS = 8  # how many entries with the key of a new one are looked for at once

_KINDS = {"O": "text", "U": "text", "b": "truth values", "i": "numbers", "u": "numbers", "f": "numbers"}

Loss = Callable[[Tensor, Tensor], Tensor]
Tensors = dict[str, Shaped[Tensor, "..."]]


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

    The layers end in tanh, so no key is longer than the square root of its size: one far-away example cannot force
    small steps on all others.

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


def new_memory(capacity: int, key_size: int, *, values: Shaped[Tensor, "n *v"]) -> EpisodicMemory:
    """Returns an empty memory for the keys of a network and values of this shape and dtype."""
    return EpisodicMemory(capacity, key_size, value_shape=tuple(values.shape[1:]), value_dtype=values.dtype)


def filled_memory(
    network: Network,
    inputs: Float[Tensor, "n f"],
    values: Shaped[Tensor, "n *v"],
    settings: Settings,
    generator: torch.Generator,
) -> EpisodicMemory:
    """Returns a memory of the examples, in a random order.

    Data are often sorted by class, and the oldest entries are the first to go: in a random order some of each stay.
    """
    memory = new_memory(settings.capacity or len(inputs), network.head.in_features, values=values)
    order = torch.randperm(len(inputs), generator=generator)
    memory.write(network.keys(inputs[order]), values[order])
    return memory


def remember(
    memory: EpisodicMemory, keys: Float[Tensor, "n d"], values: Shaped[Tensor, "n *v"], *, grows: bool
) -> EpisodicMemory:
    """Writes to the memory in the place of what it held for these very keys.

    Args:
        memory: Is written to, unless it must grow.
        keys, values: The entries; those with the same key among them are all kept.
        grows: Whether a larger memory takes the place of one that is too small; otherwise the oldest entries go.

    Returns:
        The memory to use from now on.

    Raises:
        NonFiniteError: If a key is too large. Then nothing changes.
    """
    while bool((same := (found := memory.read(keys, _TWINS)).distances == 0).any()):
        memory.forget(found.slots[same])
    if grows and len(memory) + len(keys) > memory.capacity:
        order = memory.written.argsort()[memory.capacity - len(memory) :]  # the empty slots come first
        larger = new_memory(max(2 * memory.capacity, len(memory) + len(keys)), memory.key_size, values=memory.values)
        larger.write(memory.keys[order], memory.values[order])
        memory = larger
    memory.write(keys, values)
    return memory


def squared_lengths(memory: EpisodicMemory) -> Float[Tensor, " n"]:
    """Returns ``|h|^2`` of each key in the memory, in float64; a zero if there is none."""
    return (
        memory.keys.new_zeros(1).double()
        if len(memory) == 0
        else memory.keys[memory.written >= 0].double().square().sum(1)
    )


class Saved(NamedTuple):
    """What a folder holds of an estimator."""

    settings: dict[str, Any]
    sizes: list[int]
    learned: dict[str, Any]
    tensors: Tensors

    def restore(self) -> tuple[Network, EpisodicMemory]:
        """Returns network and memory.

        Raises:
            LookupError, TypeError, RuntimeError, ValueError: If the tensors are not theirs.
        """
        tensors = self.tensors
        network = Network(*self.sizes)
        memory = new_memory(*tensors["memory.keys"].shape, values=tensors["memory.values"])
        for part, module in (("network.", network), ("memory.", memory)):
            module.load_state_dict({name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)})
        return network, memory


def save(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    network: Network,
    memory: EpisodicMemory,
    learned: dict[str, Any],
) -> None:
    """Writes an estimator of the class ``name`` to a folder.

    Raises:
        SettingError: If a setting is nothing that JSON can hold.
        FormatError, OSError: As ``snapshot.write`` does.
    """
    parts = {"network": network, "memory": memory}
    tensors = {f"{part}.{key}": t for part, module in parts.items() for key, t in module.state_dict().items()}
    settings = {key: plain(value) for key, value in settings.items()}
    for key, value in settings.items():
        if not (value is None or isinstance(value, bool | int | float | str | tuple)):
            raise SettingError(f"{key} must be a number or None to be saved, got {value!r}. Use set_params, then save.")
    estimator = {"class": name, "settings": settings, "sizes": network.sizes, "learned": learned}
    # So that ``recollect.load`` says what this is: a model that it cannot build by itself.
    model = {"foreign": name, "parts": {}, "tensors": {key: key for key in tensors}}
    snapshot.write(folder, {"model": model, "parameters": {}, "evaluating": [], "estimator": estimator}, tensors)


def read(folder: Path, name: str) -> Saved:
    """Returns what a folder holds of an estimator of the class ``name``.

    Raises:
        MissingDataError: If there is no such folder.
        FormatError: If it is not a complete, undamaged save of such an estimator.
    """
    description, tensors = snapshot.read(folder)
    found = description.get("estimator")
    if not (isinstance(found, dict) and found.keys() >= {"class", "settings", "sizes", "learned"}):
        raise FormatError(f"{folder} holds a save of recollect, but no estimator. Use recollect.load.")
    if found["class"] != name:
        raise FormatError(f"{folder} holds a {found['class']}, need a {name}. Use {found['class']}.load.")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in found["settings"].items()}
    return Saved(settings, found["sizes"], found["learned"], tensors)
