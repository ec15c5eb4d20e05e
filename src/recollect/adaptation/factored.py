"""The factored engine: gradient descent on linear and MLP heads without a copy of their first layer.

With gradient descent (momentum and the prior included) the change of a linear layer stays in the span of the
neighbors' keys: ``W_x = W + sum_k a_k h_k^T`` and ``b_x = b + sum_k a_k``. So instead of W_x we keep the
coefficients ``a`` (k x c) and the Gram matrix of the keys (k x k), and one step is

    z_k  = W h_k + b + sum_j a_j (h_j . h_k + 1)
    a_k <- (1 - prior) a_k + rate * w_k * (gradient of log p(v_k | z_k) at z_k)

The query's output is ``W q + b + sum_k a_k (h_k . q + 1)``, whose k-th term is exactly what memory k added to it.
In an MLP the first adapting layer is handled this way on its pre-activations; the layers behind it see inputs that
change from step to step and are small, so their change is kept densely.

The "1" stands for the bias; it is dropped when the bias does not adapt, as ``h_j . h_k`` is when the weight does not.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from recollect.adaptation.entries import add_weighted_rows, distinct, dots, groups
from recollect.adaptation.head import Head
from recollect.adaptation.kept import Kept
from recollect.adaptation.layers import Layer, split
from recollect.adaptation.rules import Rule, sgd
from recollect.adaptation.workspace import workspace
from recollect.likelihoods import Likelihood
from recollect.memory import Context
from recollect.memory.protocol import Entries
from recollect.memory.scan import products

_BUDGET = 4 * 2**20  # bytes that one chunk of queries works on, for each thread
_NARROW = 64  # a layer of fewer outputs keeps its weights as they are


class _Signal(NamedTuple):
    """What a layer puts out after its activations, and their slope there (None: there are none)."""

    value: Float[Tensor, "b m h"]
    slope: Float[Tensor, "b m h"] | None


class _Adapted(NamedTuple):
    """What the steps have done for a chunk of queries."""

    target: Float[Tensor, "b h"]  # the first layer's output at the queries, before the steps
    cross: Float[Tensor, "b 1 k"]  # how much each coefficient moves it
    coefficients: Float[Tensor, "b k h"]
    deeper: "list[_Dense]"


class Factored:
    """Adapts ``prefix`` (frozen, any module) + linear layers with elementwise functions between them."""

    def __init__(
        self,
        prefix: Head | None,
        layers: list[Layer],
        likelihood: Likelihood,
        *,
        rule: sgd,
        steps: int,
        prior: float,
        chunk_size: int | None,
        keep_base: bool,
    ) -> None:
        self._prefix = prefix
        self._first = layers[0]
        self._layers = layers
        self._likelihood = likelihood
        self._rule = rule
        self._steps = steps
        self._prior = prior
        self._chunk_size = chunk_size
        self._kept = Kept() if keep_base else None
        self._inputs = Kept() if keep_base and prefix is not None else None  # what the prefix makes of the keys

    @staticmethod
    def build(
        head: Head,
        likelihood: Likelihood,
        names: tuple[str, ...],
        *,
        rule: Rule,
        steps: int,
        prior: float,
        chunk_size: int | None,
        keep_base: bool,
    ) -> "Factored | None":
        """Returns the engine for ``head``, or None where the factored form would not be exact."""
        if type(rule) is not sgd or steps == 0 or head.dtype() == torch.float16:  # in which h . q may overflow
            return None
        parts = split(head, names)
        if parts is None:
            return None
        prefix, layers = parts
        settings = {"steps": steps, "prior": prior, "chunk_size": chunk_size, "keep_base": keep_base}
        return Factored(prefix, layers, likelihood, rule=rule, **settings)

    @property
    def is_linear(self) -> bool:
        """Whether the adapting part is one linear layer, so that each memory's contribution is exact."""
        return len(self._layers) == 1 and not self._first.activations

    def __call__(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
        """Returns the outputs of each query's own adapted head; queries and context are in the head's dtype."""
        with self._alone():
            if self.takes_entries:
                return self._step_once(queries, distinct(context))
            return torch.cat([self._finish(adapted) for adapted in self._chunks(queries, context)])

    @property
    def takes_entries(self) -> bool:
        """Whether ``step`` will do."""
        return self.is_linear and self._steps == 1

    def step(self, queries: Float[Tensor, "b d"], entries: Entries) -> Float[Tensor, "b c"]:
        """Returns the same outputs from what was found, each entry once; only where ``takes_entries``."""
        with self._alone():
            return self._step_once(queries, entries)

    def contributions(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b k c"]:
        """Returns what each neighbor added to each output; only where ``is_linear``."""
        with self._alone():
            if self._steps == 1:
                shares, entries, _ = self._shares(queries, distinct(context))
                return shares.unsqueeze(-1) * self._pull(entries.keys, entries.values)[entries.place]
            return torch.cat([adapted.cross.mT * adapted.coefficients for adapted in self._chunks(queries, context)])

    def _alone(self) -> AbstractContextManager[object]:
        return nullcontext() if self._kept is None else self._kept.lock

    def _finish(self, adapted: "_Adapted") -> Float[Tensor, "b c"]:
        first = torch.baddbmm(adapted.target.unsqueeze(1), adapted.cross, adapted.coefficients)
        outputs = _apply(self._first.activations, first)
        for layer in adapted.deeper:
            outputs = _apply(layer.activations, layer(outputs))
        return outputs.squeeze(1)

    def _step_once(self, queries: Tensor, entries: Entries) -> Float[Tensor, "b c"]:
        """Returns the outputs after the only step of a linear head.

        Every entry is seen by the given head alone, so that the change is a sum over entries of what the gradient of
        ``log p(v | h)`` is there, each times its share: ``rate * w_k * (h_k . q + 1)``.
        """
        shares, entries, queries = self._shares(queries, entries)
        outputs = self._linear(queries)
        if self._kept is None:
            return add_weighted_rows(outputs, shares, entries, self._pull)
        self._kept.update(entries, self._parameters(), self._pull)
        return outputs.add_(self._kept.weighted_sum(entries.slots[entries.place], shares))

    def _shares(self, queries: Tensor, entries: Entries) -> tuple[Float[Tensor, "b k"], Entries, Tensor]:
        """Returns each neighbor's share, and entries and queries behind the prefix."""
        entries = self._behind_prefix(entries)
        if self._prefix is not None:
            queries = self._prefix({}, queries)
        shares = entries.weights * self._rule.rate
        if self._first.weight_adapts:
            reach = dots(queries, entries.keys, entries.place)
            shares = shares * (reach + 1 if self._first.bias_adapts else reach)
        return shares, entries, queries

    def _pull(self, keys: Float[Tensor, "m d"], values: Shaped[Tensor, "m *v"]) -> Float[Tensor, "m c"]:
        """Returns the gradient of ``log p(v | h)`` at the given head's outputs."""
        return self._likelihood.gradient(self._linear(keys), values).to(keys.dtype)

    def _parameters(self) -> tuple[Tensor, ...]:
        return tuple(self._first.linear.parameters())

    def _behind_prefix(self, entries: Entries) -> Entries:
        """Returns the entries with what the prefix makes of their keys; with ``keep_base`` once as long as it stays."""
        if self._prefix is None:
            return entries
        prefix, inputs = self._prefix, self._inputs
        if inputs is None:
            return entries._replace(keys=prefix({}, entries.keys))
        state = (*prefix.module.parameters(), *prefix.module.buffers())
        inputs.update(entries, state, lambda keys, values: prefix({}, keys))
        return entries._replace(keys=inputs.rows(entries.slots))

    def _chunks(self, queries: Tensor, context: Context) -> Iterator["_Adapted"]:
        """Adapts a chunk of queries at a time."""
        for group in groups(queries, context, self._first.linear.out_features):
            yield from self._group(*group)

    def _group(self, queries: Tensor, context: Context) -> Iterator["_Adapted"]:
        """Adapts the queries of a group, of which the entries in common pass through the first layer only once."""
        entries = self._behind_prefix(distinct(context))
        if self._prefix is not None:
            queries = self._prefix({}, queries)
        target = self._linear(queries)
        base = self._base_rows(entries, context.slots)
        chunk = self._chunk_size or self._rows(context.slots.shape[1], queries)
        for start in range(0, len(queries), chunk):
            part = slice(start, start + chunk)
            near = context.keys[part] if self._prefix is None else entries.keys[entries.place[part]]
            cross = self._reach(near, queries[part].unsqueeze(1))
            gram = self._reach(near, near) if self._steps > 1 else None
            values, weights = context.values[part], context.weights[part].unsqueeze(-1)
            coefficients, deeper = self._descend(base(part), gram, values, weights)
            yield _Adapted(target[part], cross, coefficients, deeper)

    def _base_rows(self, entries: Entries, slots: Tensor) -> Callable[[slice], Float[Tensor, "b k h"]]:
        """Returns what looks up the first layer's outputs at the neighbors of some of the queries."""
        if self._kept is None:
            rows = self._linear(entries.keys)
            return lambda part: rows[entries.place[part]]
        kept = self._kept
        kept.update(entries, self._parameters(), lambda keys, values: self._linear(keys))
        return lambda part: kept.rows(slots[part])

    def _linear(self, keys: Float[Tensor, "m d"]) -> Float[Tensor, "m h"]:
        """Returns the first layer's outputs, as they are before the steps."""
        outputs = products(keys, self._first.linear.weight.detach())
        return outputs if self._first.linear.bias is None else outputs.add_(self._first.linear.bias.detach())

    def _reach(self, near: Float[Tensor, "b k d"], rows: Float[Tensor, "b m d"]) -> Float[Tensor, "b m k"]:
        """Returns how much each coefficient moves the first layer's output at ``rows``."""
        if not self._first.weight_adapts:
            return near.new_ones(len(near), rows.shape[1], near.shape[1])
        reach = rows @ near.mT
        return reach + 1 if self._first.bias_adapts else reach

    def _rows(self, count: int, queries: Tensor) -> int:
        floats = 4 * count * sum(layer.linear.out_features for layer in self._layers) + 2 * count * count
        dense = sum(layer.linear.weight.numel() for layer in self._layers[1:] if layer.weight_adapts)
        floats += dense * (2 if self._rule.momentum else 1)
        return max(1, workspace(_BUDGET, queries.device) // (floats * queries.element_size()))

    def _descend(
        self, base: Float[Tensor, "b k h"], gram: Tensor | None, values: Tensor, weights: Float[Tensor, "b k 1"]
    ) -> tuple[Float[Tensor, "b k h"], "list[_Dense]"]:
        """Runs the steps; returns the first layer's coefficients and the adapted layers behind it."""
        rate, momentum, prior = self._rule.rate, self._rule.momentum, self._prior
        coefficients, velocity = torch.zeros_like(base), torch.zeros_like(base) if momentum else None
        deeper = [_Dense(layer) for layer in self._layers[1:]]
        first, pull = base.clone() if prior else base, coefficients
        for step in range(self._steps):
            if step > 0 and gram is not None:
                first = self._moved(first, base, gram, pull, coefficients)
            signals = self._forward(first, deeper)
            pull = (self._likelihood.gradient(signals[-1].value, values) * weights).to(base.dtype)
            for layer, signal, source in zip(deeper[::-1], signals[:0:-1], signals[-2::-1], strict=True):
                pull = layer.ascend(_through(signal, pull), source.value, rate, momentum, prior)
            pull = _through(signals[0], pull)
            if velocity is not None:
                pull = velocity.mul_(momentum).add_(pull)
            coefficients.mul_(1 - prior).add_(pull, alpha=rate)
        return coefficients, deeper

    def _moved(self, first: Tensor, base: Tensor, gram: Tensor, pull: Tensor, coefficients: Tensor) -> Tensor:
        """Returns ``base + gram @ coefficients``, in place and by what the last step changed where that is accurate."""
        if base.element_size() < 4:
            return torch.baddbmm(base, gram, coefficients)
        if self._prior:
            first.lerp_(base, self._prior)
        return first.baddbmm_(gram, pull, alpha=self._rule.rate)

    def _forward(self, first: Tensor, deeper: "list[_Dense]") -> "list[_Signal]":
        """Returns what each layer puts out, given what the first one does before its activations."""
        signals = [_activate(self._first.activations, first)]
        for layer in deeper:
            signals.append(_activate(layer.activations, layer(signals[-1].value)))
        return signals


class _Dense:
    """A layer behind the first: its own weights for each query, once it has moved."""

    def __init__(self, layer: Layer) -> None:
        self.activations = layer.activations
        linear = layer.linear
        # Shared by all queries until the first step. Transposed where that makes the products faster.
        self._transposed = linear.out_features >= _NARROW
        theta = linear.weight.detach()
        self.weight = _Moving(theta.mT if self._transposed else theta, layer.weight_adapts)
        self.bias = None if linear.bias is None else _Moving(linear.bias.detach()[None], layer.bias_adapts)

    def __call__(self, inputs: Float[Tensor, "b m i"]) -> Float[Tensor, "b m o"]:
        weight = self.weight.value
        outputs = inputs @ (weight if self._transposed else weight.mT)
        return outputs if self.bias is None else outputs.add_(self.bias.value)

    def ascend(self, pull: Tensor, inputs: Tensor, rate: float, momentum: float, prior: float) -> Tensor:
        """Takes one step up the log-likelihood.

        Args:
            pull: Its gradient at this layer's outputs.
            inputs: This layer's inputs.

        Returns:
            Its gradient at the inputs.
        """
        weight = self.weight.value
        back = pull @ (weight.mT if self._transposed else weight)
        left, right = (inputs, pull) if self._transposed else (pull, inputs)
        self.weight.ascend(left.mT, right, rate, momentum, prior)
        if self.bias is not None:
            ones = pull.new_ones(()).expand(len(pull), 1, pull.shape[1])
            self.bias.ascend(ones, pull, rate, momentum, prior)
        return back


class _Moving:
    """A matrix of parameters, one for each query once it has moved, whose gradient is the product of two factors."""

    def __init__(self, theta: Float[Tensor, "i o"], adapts: bool) -> None:
        self.value = theta
        self._theta = theta
        self._adapts = adapts
        self._velocity: Tensor | None = None

    def ascend(self, left: Tensor, right: Tensor, rate: float, momentum: float, prior: float) -> None:
        """Takes one step of Eq. (4) with the gradient ``left @ right``."""
        if not self._adapts:
            return
        shared = self.value is self._theta  # before the first step, when the prior has nothing to pull
        if shared:
            self.value = self._theta.expand(len(left), *self._theta.shape)
        elif prior:
            self.value.lerp_(self._theta, prior)
        if momentum:
            if self._velocity is None:
                self._velocity = left @ right
            else:
                self._velocity.baddbmm_(left, right, beta=momentum)
            self.value = self.value + rate * self._velocity
        elif shared:
            self.value = torch.baddbmm(self.value, left, right, alpha=rate)
        else:
            self.value.baddbmm_(left, right, alpha=rate)


def _apply(activations: list[nn.Module], value: Tensor) -> Tensor:
    """Returns the functions applied one after the other; some change ``value`` in place."""
    for function in activations:
        value = function(value)
    return value


def _activate(activations: list[nn.Module], inputs: Tensor) -> _Signal:
    """Returns the value and the slope of the functions applied one after the other; ``inputs`` stay as they are."""
    value, slope = inputs, None
    for function in activations:
        if type(function) is nn.ReLU:
            value = value.relu()
            step = value.sign()  # 0 or 1; four times as fast as a comparison
        else:
            with torch.enable_grad():
                leaf = value.detach().requires_grad_()
                value = function(leaf.clone())  # a function in place must not change a leaf
                (step,) = torch.autograd.grad(value.sum(), leaf)
            value = value.detach()
        slope = step if slope is None else slope * step
    return _Signal(value, slope)


def _through(signal: _Signal, pull: Tensor) -> Tensor:
    """Returns the gradient before a layer's activations, given the one behind them."""
    return pull if signal.slope is None else pull * signal.slope
