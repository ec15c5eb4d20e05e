"""Memory-based Parameter Adaptation: the one idea of this library. Open this file first.

    C        = the neighbors of q = f(x) in the memory          Section 2
    theta_x  = theta, fitted to C by a few steps of a rule      Eq. (4), (7)
    p(y | q) = likelihood(g_{theta_x}(q))                       Eq. (2)

and theta_x is thrown away. Nothing is trained here: train the head as always, write (key, value) pairs as they come.
"""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from recollect.adaptation import Adaptation, Head, LocalAdaptation
from recollect.adaptation.factored import Factored
from recollect.errors import ShapeError, require, require_tensor, require_whole
from recollect.kernels import Kernel, inverse_distance
from recollect.likelihoods import Categorical, Likelihood
from recollect.memory import Context, Memory
from recollect.memory.protocol import SharesEntries
from recollect.predictors import Before, in_chunks, key_bytes, require_parts, undisturbed

_SMALL = 64 * 2**20  # bytes of keys of a memory all of which a batch may find


class Explanation(NamedTuple):
    """Why a prediction came out as it did; see ``MbPA.explain``."""

    before: Float[Tensor, " c"]
    """The head's own prediction."""
    after: Float[Tensor, " c"]
    """The adapted prediction."""
    contributions: Float[Tensor, "k c"]
    """What each retrieved memory added to each output (logit), near to far."""
    exact: bool
    """True: the contributions sum to the whole change of the outputs. False: each is what would be missing without
    that memory, and as memories overlap, these need not sum to the whole."""
    values: Shaped[Tensor, "k *v"]
    weights: Float[Tensor, " k"]
    distances: Float[Tensor, " k"]
    slots: Int[Tensor, " k"]


class MbPA(nn.Module):
    """A layer that fits its head to the memories near each key, predicts with it, and forgets the change.

    Paper: Section 2, Algorithm 1 (MbPA-Test). It takes the place of a network's output layer:
    ``nn.Sequential(features, MbPA(head, memory, ...))``. ``forward`` is a pure function of keys, memory and
    parameters: it changes none of them, does not depend on ``.training``, uses no random numbers, and
    passes no gradient on. With an empty memory, or no steps, it predicts exactly what the head predicts.

    A learned rule, as in ``LocalAdaptation(MetaLSTM(), steps=3)``, becomes a part of this layer, ``rule``: it is saved,
    loaded and moved with it, and ``parameters()`` has the rule's parameters as well as the head's. An optimizer for the
    head alone takes ``head.parameters()``. Another rule needs a new ``MbPA``.

    Args:
        head: The output network g: maps keys ``(b, d)`` to outputs ``(b, c)``, each key by itself. It is shared, not
            copied: training it changes the predictions. Putting another layer into it needs a new ``MbPA``.
        memory: Where the neighbors come from.
        neighbors: How many of them, K. (Paper: 50 for images, 256 for language.)
        adaptation: How the head is fitted, such as ``LocalAdaptation(rules.sgd(0.1), steps=5)``.
        kernel: How the neighbors are weighted.
        likelihood: What outputs say about values: ``Categorical()`` for labels, ``Gaussian()`` for regression.

    Raises:
        SettingError: If ``neighbors`` is not a positive whole number.
        HeadError: If the head cannot be adapted key by key, by the submodule's name.

    Example:
        >>> import torch
        >>> from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
        >>> memory = EpisodicMemory(capacity=100, key_size=2)
        >>> head = torch.nn.Linear(2, 3)
        >>> model = MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rules.sgd(1.0), steps=5))
        >>> slots = memory.write(torch.tensor([[4.0, 0.0]]), torch.tensor([2]))  # a correction
        >>> int(model(torch.tensor([4.0, 0.1])).argmax())
        2
    """

    def __init__(
        self,
        head: nn.Module,
        memory: Memory,
        *,
        neighbors: int,
        adaptation: Adaptation,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        likelihood: Likelihood = Categorical(),
    ) -> None:
        super().__init__()
        require_whole("neighbors", neighbors)
        require("adaptation", adaptation, Adaptation, "an adaptation, such as LocalAdaptation(rules.sgd(0.1), steps=5)")
        require_parts(memory, kernel, likelihood)
        self.head = head
        self.memory = memory
        self.neighbors = neighbors
        self._adaptation = adaptation
        rule = adaptation.rule if isinstance(adaptation, LocalAdaptation) else None
        self.rule = rule if isinstance(rule, nn.Module) else None  # registered here: a LocalAdaptation is no module
        self.kernel = kernel
        self.likelihood = likelihood
        self._head = Head(head)
        self._adapter = adaptation.bind(self._head, likelihood)

    @property
    def adaptation(self) -> Adaptation:
        """How the head is fitted; bound to the head for good, so that another one needs a new ``MbPA``."""
        return self._adaptation

    def forward(self, keys: Float[Tensor, "*b d"], *, before: Before = None) -> Float[Tensor, "*b c"]:
        """Predicts with the head adapted to each key.

        Args:
            keys: The queries q = f(x), ``(*batch, key_size)``.
            before: Only memories with a write time below this are used; see ``EpisodicMemory.read``.

        Returns:
            Log-probabilities ``(*batch, classes)``, or for ``Gaussian`` the mean ``(*batch, outputs)``.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError: If the keys do not fit the memory.
            LabelError: If a retrieved label is not one of the head's outputs.
        """
        adapter, memory, size = self._adapter, self.memory, key_bytes(keys)
        if isinstance(adapter, Factored) and adapter.takes_entries and isinstance(memory, SharesEntries):
            count = len(memory)
            if size * count <= _SMALL:
                per_query = size + 64 * min(self.neighbors, count) + 8 * count
                return in_chunks(partial(self._step, adapter, memory), keys, before, bytes_per_query=per_query)
        # Its capacity, since to ask how many entries there are can cost as much as to read them.
        per_query = size * (1 + min(self.neighbors, memory.capacity))
        return in_chunks(self._predict, keys, before, bytes_per_query=per_query)

    def _predict(self, keys: Float[Tensor, "b d"], before: Before) -> Float[Tensor, "b c"]:
        queries, context = self._read(keys, before)
        if context.slots.numel() == 0:
            return self.likelihood.predict(self._head({}, queries))
        return self.likelihood.predict(self._adapter(queries, context))

    def _step(
        self, adapter: Factored, memory: SharesEntries, keys: Float[Tensor, "b d"], before: Before
    ) -> Float[Tensor, "b c"]:
        """Predicts the same where the keys of each query's neighbors need not be repeated."""
        entries = memory.read_entries(keys, self.neighbors, kernel=self.kernel, before=before)
        queries = keys.to(self._head.dtype())
        if entries.place.numel() == 0:
            return self.likelihood.predict(self._head({}, queries))
        self._check(queries, entries.values.unsqueeze(0))
        entries = entries._replace(keys=entries.keys.to(queries.dtype), weights=entries.weights.to(queries.dtype))
        return self.likelihood.predict(adapter.step(queries, entries))

    def _read(self, keys: Float[Tensor, "b d"], before: Before) -> tuple[Tensor, Context]:
        """Returns queries and context in the head's dtype, the values checked against the head's outputs."""
        context = self.memory.read(keys, self.neighbors, kernel=self.kernel, before=before)
        queries = keys.to(self._head.dtype())
        if context.slots.numel():
            self._check(queries, context.values)
        return queries, context._replace(keys=context.keys.to(queries.dtype), weights=context.weights.to(queries.dtype))

    def _check(self, queries: Float[Tensor, "b d"], values: Shaped[Tensor, "..."]) -> None:
        """Checks the values that were found against the head's outputs."""
        try:
            outputs = self._head({}, queries[:1])
        except RuntimeError as error:
            if "shape" not in str(error):
                raise
            raise ShapeError(f"the head failed on keys of shape (1, {queries.shape[-1]}): {error}") from error
        if outputs.dim() != 2:
            raise ShapeError(f"the head must map keys (b, d) to outputs (b, c), but (1, d) became {outputs.shape}.")
        self.likelihood.check_values(values, outputs.shape[1])

    def explain(self, key: Float[Tensor, " d"], *, before: int | None = None) -> Explanation:
        """Says what each retrieved memory added to each output (logit) of one prediction.

        For a linear head under gradient descent this is exact: the contributions are ``a_k (h_k . q + 1)`` of the
        factored form and sum to the change of the outputs. For other heads and rules each contribution is the
        difference that leaving this one memory out of the adaptation makes.

        Args:
            key: One query, ``(key_size,)``.
            before: As in ``forward``.

        Raises:
            ShapeError: If ``key`` is not a single key.
        """
        require_tensor("key", key)
        if key.dim() != 1:
            raise ShapeError(f"explain takes one key of shape (key_size,), got {tuple(key.shape)}.")
        with undisturbed(key.device):
            queries, context = self._read(key.detach().unsqueeze(0), before)
            seen = context.slots[0] >= 0  # ``before`` may leave places that nothing fills
            context = Context(*(part[:, seen] for part in context))
            adapter = self._adapter
            linear = adapter if isinstance(adapter, Factored) and adapter.is_linear else None
            base = outputs = self._head({}, queries)
            parts = base.new_zeros(0, base.shape[-1])
            if context.slots.numel():
                outputs = adapter(queries, context)
                if linear is not None:
                    parts = linear.contributions(queries, context)[0]
                else:
                    parts = outputs - self._without_each(queries, context)
            predict = self.likelihood.predict
            return Explanation(
                *(predict(base)[0], predict(outputs)[0], parts, linear is not None),
                *(context.values[0], context.weights[0], context.distances[0], context.slots[0]),
            )

    def _without_each(self, queries: Float[Tensor, "1 d"], context: Context) -> Float[Tensor, "k c"]:
        """Returns the outputs when one memory after the other is left out of the adaptation."""
        count = context.slots.shape[1]
        repeated = Context(*(part.expand(count, *part.shape[1:]) for part in context))
        weights = repeated.weights * (1 - torch.eye(count, dtype=repeated.weights.dtype, device=queries.device))
        return self._adapter(queries.expand(count, -1), repeated._replace(weights=weights))
