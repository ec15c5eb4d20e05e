"""The predictors that ``MbPA`` is measured against and mixed with.

Each is a layer that maps keys ``(*batch, d)`` to log-probabilities ``(*batch, classes)``, or to a mean for
regression, and each is a choice of the adaptation A(theta, C): none at all (``Parametric``), or a constant fitted to
the neighbors in closed form (``NonParametric``).
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recollect.adaptation import Head
from recollect.adaptation.workspace import workspace
from recollect.errors import NonFiniteError, SettingError, ShapeError, require, require_tensor
from recollect.kernels import Kernel, dot_product, inverse_distance
from recollect.likelihoods import Categorical, Likelihood
from recollect.memory import Memory
from recollect.memory.checks import bad_query

_BUDGET = 128 * 2**20  # bytes that one chunk of queries reads from the memory
_MIXED = 2**20  # bytes of each component's predictions that are mixed at once, for each thread

Before = int | Int[Tensor, "*b"] | None


@runtime_checkable
class Predictor(Protocol):
    """What ``Mixture`` needs of its components."""

    likelihood: Likelihood

    def __call__(self, keys: Float[Tensor, "*b d"], *, before: Before = None) -> Float[Tensor, "*b c"]: ...


def key_bytes(keys: Tensor) -> int:
    """Returns how many bytes one key takes in float32."""
    require_tensor("keys", keys)
    return 4 * keys.shape[-1:].numel()


@contextmanager
def undisturbed(device: torch.device, *, differentiable: bool = False) -> Iterator[None]:
    """Keeps gradients, and the caller's autocast and inference mode, out of a prediction: none may change it.

    A prediction that is ``differentiable`` passes gradients on where the caller records them.
    """
    known = torch.amp.is_autocast_available(device.type)
    autocast = torch.autocast(device.type, enabled=False) if known else nullcontext()
    if differentiable and torch.is_grad_enabled():
        with autocast:
            yield
        return
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


def require_parts(memory: object, kernel: object, likelihood: object) -> None:
    """Refuses what is no memory, kernel or likelihood.

    Raises:
        SettingError: By the argument's name.
    """
    require("memory", memory, Memory, "a memory, such as EpisodicMemory(capacity=1000, key_size=64)")
    require("kernel", kernel, Kernel, "a kernel, such as inverse_distance(epsilon=1e-3)")
    require("likelihood", likelihood, Likelihood, "a likelihood, such as Categorical()")


def in_chunks(
    predict: Callable[[Tensor, Before], Tensor],
    keys: Float[Tensor, "*b d"],
    before: Before,
    *,
    bytes_per_query: int,
    differentiable: bool = False,
) -> Float[Tensor, "*b c"]:
    """Applies ``predict`` to a few queries at a time: a batch of any size must not need more memory.

    Args:
        predict: Maps keys ``(b, d)`` and their limits, one for each or None, to outputs ``(b, c)``.
        keys: The queries.
        before: As in ``EpisodicMemory.read``.
        bytes_per_query: What one query needs while ``predict`` works on it.
        differentiable: Whether outputs have gradients.
    """
    require_tensor("keys", keys)
    if keys.dim() == 0:
        raise ShapeError("keys must have shape (*, key_size), got a single number.")
    batch = keys.shape[:-1]
    flat = (keys if differentiable else keys.detach()).reshape(-1, keys.shape[-1])
    limits = None if before is None else _limits(before, batch, keys.device)
    rows = max(1, _BUDGET // max(1, bytes_per_query))
    parts = []
    with undisturbed(keys.device, differentiable=differentiable):
        for start in range(0, max(1, len(flat)), rows):
            part = slice(start, start + rows)
            try:
                parts.append(predict(flat[part], None if limits is None else limits[part]))
            except NonFiniteError as error:
                if start == 0 or error.query is None:
                    raise
                row = start + error.query  # the memory has counted from the start of this chunk
                raise bad_query(row, finite=bool(flat[row].isfinite().all())) from error
    outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
    return outputs.reshape(*batch, outputs.shape[-1])


def _limits(before: int | Tensor, batch: torch.Size, device: torch.device) -> Int[Tensor, " b"]:
    limits = torch.as_tensor(before, device=device)
    if limits.dim() and limits.shape != batch:
        raise ShapeError(
            f"before must be one number or have one for each query, shape {tuple(batch)}, got {tuple(limits.shape)}."
        )
    return limits.expand(batch).reshape(-1)


class Parametric(nn.Module):
    """The head by itself.

    Paper: Eq. (1). Like every predictor it computes what the head computes in evaluation mode.

    Args:
        head: Maps keys ``(b, d)`` to outputs ``(b, c)``, each key by itself.
        likelihood: What outputs say about values.

    Raises:
        HeadError: If the head is no function of single keys.

    Example:
        >>> import torch
        >>> Parametric(torch.nn.Linear(4, 3))(torch.zeros(2, 4)).exp().sum(-1).allclose(torch.ones(2))
        True
    """

    def __init__(self, head: nn.Module, *, likelihood: Likelihood = Categorical()) -> None:
        super().__init__()
        self.head = head
        self.likelihood = likelihood
        self._head = Head(head)

    def forward(self, keys: Float[Tensor, "*b d"], *, before: Before = None) -> Float[Tensor, "*b c"]:
        """Returns the head's prediction; ``before`` is accepted and has no effect, as there is no memory."""
        return in_chunks(self._predict, keys, before, bytes_per_query=key_bytes(keys))

    def _predict(self, keys: Float[Tensor, "b d"], before: Before) -> Float[Tensor, "b c"]:
        return self.likelihood.predict(self._head({}, keys.to(self._head.dtype())))


class NonParametric(nn.Module):
    """The neighbors' weighted vote (or mean): attention, and k-NN with a kernel.

    Paper: Eq. (9) and (10), Appendix E: the constant that fits the neighborhood best. A class that no neighbor has
    gets probability 0; a query without neighbors gets the uniform distribution (labels) or an error (regression).

    The prediction passes on the gradients that the memory's reads have: over a ``NeuralDictionary`` to its keys, its
    values and the queries, over an ``EpisodicMemory`` to nothing.

    Args:
        memory: Where the neighbors come from.
        classes: The number of classes; needed for labels only.
        neighbors: How many neighbors vote; all entries when None.
        kernel: How they are weighted.
        likelihood: ``Categorical()`` for labels, ``Gaussian()`` for regression.

    Raises:
        SettingError: If ``classes`` is missing for labels, or ``neighbors`` is not a positive whole number.

    Example:
        >>> import torch
        >>> from recollect import EpisodicMemory
        >>> memory = EpisodicMemory(capacity=10, key_size=2)
        >>> slots = memory.write(torch.eye(2), torch.tensor([0, 1]))
        >>> NonParametric(memory, classes=2, neighbors=1)(torch.tensor([0.9, 0.1])).exp()
        tensor([1., 0.])
    """

    def __init__(
        self,
        memory: Memory,
        *,
        classes: int | None = None,
        neighbors: int | None,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        likelihood: Likelihood = Categorical(),
    ) -> None:
        super().__init__()
        require_parts(memory, kernel, likelihood)
        if isinstance(likelihood, Categorical) and not (isinstance(classes, int) and classes > 0):
            raise SettingError(f"a vote over labels needs the number of classes, got classes={classes!r}.")
        if neighbors is not None and (isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 1):
            raise SettingError(f"neighbors must be a whole number above 0, or None for all entries, got {neighbors!r}.")
        self.memory = memory
        self.classes = classes
        self.neighbors = neighbors
        self.kernel = kernel
        self.likelihood = likelihood

    def forward(self, keys: Float[Tensor, "*b d"], *, before: Before = None) -> Float[Tensor, "*b c"]:
        """Predicts from the neighbors alone.

        Args:
            keys: The queries, ``(*batch, key_size)``.
            before: Only memories with a write time below this are used; see ``EpisodicMemory.read``.

        Returns:
            Log-probabilities ``(*batch, classes)``, or for ``Gaussian`` the mean.

        Raises:
            LabelError: If a retrieved label is not below ``classes``.
            EmptyMemoryError: For regression, if a query sees no entry.
        """
        if self.neighbors is None:
            size = 64 * len(self.memory)  # distances, weights and votes, but no copies of the keys
        else:
            size = key_bytes(keys) * (1 + min(self.neighbors, self.memory.capacity))
        return in_chunks(self._predict, keys, before, bytes_per_query=size, differentiable=True)

    def _predict(self, keys: Float[Tensor, "b d"], before: Before) -> Float[Tensor, "b c"]:
        context = self.memory.read(keys, self.neighbors, kernel=self.kernel, before=before)
        size = context.values.shape[2:].numel() if self.classes is None else self.classes
        self.likelihood.check_values(context.values, size)
        return self.likelihood.fit_constant(context.values, context.weights, self.classes)


def neural_cache(memory: Memory, *, classes: int, flatness: float = 0.3) -> NonParametric:
    """Returns the continuous cache of Grave et al. (2016): all entries vote with weight ``exp(flatness * q.h)``.

    Args:
        memory: The window of recent (hidden state, next word) pairs.
        classes: The size of the vocabulary.
        flatness: The inverse temperature theta (0.3 is the value of the paper's PTB model).

    Example:
        >>> import torch
        >>> from recollect import EpisodicMemory
        >>> memory = EpisodicMemory(capacity=10, key_size=2)
        >>> slots = memory.write(torch.eye(2), torch.tensor([0, 1]))
        >>> neural_cache(memory, classes=2, flatness=0.0)(torch.ones(2)).exp()
        tensor([0.5000, 0.5000])
    """
    return NonParametric(memory, classes=classes, neighbors=None, kernel=dot_product(flatness))


class Mixture(nn.Module):
    """A convex combination of predictors.

    Paper: Eq. (5), ``p = lambda p_param + (1 - lambda) p_mem``, for any number of components. For regression it is
    the combination of the means.

    Args:
        components: Predictors over the same classes.
        weights: One weight for each, non-negative and summing to one.

    Raises:
        SettingError: If the weights are not that, a component is no predictor, or some predict labels and others
            means.

    Example:
        >>> import torch
        >>> a, b = (Parametric(torch.nn.Linear(4, 3)) for _ in range(2))
        >>> Mixture(a, b, weights=(0.25, 0.75))(torch.zeros(4)).exp().sum().allclose(torch.tensor(1.0))
        True
    """

    def __init__(self, *components: Predictor, weights: tuple[float, ...]) -> None:
        super().__init__()
        if len(components) < 1 or len(weights) != len(components):
            raise SettingError(f"each of the {len(components)} components needs one weight, got {len(weights)}.")
        self.components = nn.ModuleList()
        for component in components:
            if not (isinstance(component, nn.Module) and isinstance(component, Predictor)):
                raise SettingError(f"{type(component).__name__} is no predictor: wrap a head as Parametric(head).")
            self.components.append(component)
        if not (all(w >= 0 for w in weights) and math.isclose(sum(weights), 1.0, abs_tol=1e-6)):
            raise SettingError(f"weights must be non-negative and sum to one, got {tuple(weights)}.")
        if len({type(component.likelihood) for component in components}) > 1:
            raise SettingError("the components must all predict labels or all predict means; these mix the two.")
        self.weights = tuple(float(w) for w in weights)
        self.likelihood = components[0].likelihood

    def forward(self, keys: Float[Tensor, "*b d"], *, before: Before = None) -> Float[Tensor, "*b c"]:
        """Returns the mixture's log-probabilities, or for regression its mean.

        Args:
            keys: The queries, ``(*batch, key_size)``.
            before: Handed on to every component.

        Raises:
            ShapeError: If the components' predictions differ in shape.
        """
        parts = [component(keys, before=before) for component in self.components]
        shapes = [tuple(part.shape) for part in parts]
        if len(set(shapes)) > 1:
            raise ShapeError(f"the components must predict the same outputs, but theirs have the shapes {shapes}.")
        with undisturbed(keys.device):
            if isinstance(self.likelihood, Categorical):
                return _mixed(parts, self.weights)
            outputs = torch.stack(parts)
            return (outputs * outputs.new_tensor(self.weights).view(-1, *(1,) * parts[0].dim())).sum(0)


def _mixed(parts: list[Tensor], weights: tuple[float, ...]) -> Float[Tensor, "*b c"]:
    """Returns ``log sum_i weights[i] exp(parts[i])``, a few rows at a time: large new tensors cost more than it."""
    logs = [math.log(weight) if weight else -math.inf for weight in weights]
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    mixture = torch.empty_like(parts[0], dtype=dtype, memory_format=torch.contiguous_format)
    rows = max(1, workspace(_MIXED, mixture.device) // max(1, 4 * mixture.shape[-1]))
    tables = (table.reshape(-1, table.shape[-1]).split(rows) for table in (mixture, *parts))
    for mixed, *some in zip(*tables, strict=True):
        terms = [part.to(dtype) + log for part, log in zip(some, logs, strict=True)]
        mixed.copy_(functools.reduce(torch.logaddexp, terms))
    return mixture
