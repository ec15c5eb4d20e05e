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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recollect.adaptation.head import Head
from recollect.adaptation.rules import Rule, sgd
from recollect.likelihoods import Likelihood
from recollect.memory import Context

_BUDGET = 4 * 2**20  # bytes that one chunk of queries works on: stays in the cache

_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
    *(nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink),
)
_NEUTRAL = (nn.Identity, nn.Dropout, nn.AlphaDropout)  # nothing to compute in evaluation mode


class _Layer(NamedTuple):
    """A linear layer, whether its weight and bias adapt, and the elementwise functions that follow it."""

    linear: nn.Linear
    weight_adapts: bool
    bias_adapts: bool
    activations: list[nn.Module]


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
        layers: list[_Layer],
        likelihood: Likelihood,
        *,
        rule: sgd,
        steps: int,
        prior: float,
        chunk_size: int | None,
    ) -> None:
        self._prefix = prefix
        self._first = layers[0]
        self._layers = layers
        self._likelihood = likelihood
        self._rule = rule
        self._steps = steps
        self._prior = prior
        self._chunk_size = chunk_size

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
    ) -> "Factored | None":
        """Returns the engine for ``head``, or None where the factored form would not be exact."""
        if type(rule) is not sgd or steps == 0:
            return None
        modules = _flatten(head.module)
        if modules is None:
            return None
        adapting = [any(f"{name}.{p}".lstrip(".") in names for p, _ in m.named_parameters()) for name, m in modules]
        start = adapting.index(True)
        layers = _layers(modules[start:], names)
        if layers is None:
            return None
        prefix = Head(nn.Sequential(*(m for _, m in modules[:start]))) if start else None
        return Factored(prefix, layers, likelihood, rule=rule, steps=steps, prior=prior, chunk_size=chunk_size)

    @property
    def is_linear(self) -> bool:
        """Whether the adapting part is one linear layer, so that each memory's contribution is exact."""
        return len(self._layers) == 1 and not self._first.activations

    def __call__(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
        """Returns the outputs of each query's own adapted head; queries and context are in the head's dtype."""
        return torch.cat([self._finish(adapted) for adapted in self._chunks(queries, context)])

    def contributions(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b k c"]:
        """Returns what each neighbor added to each output; only where ``is_linear``."""
        return torch.cat([adapted.cross.mT * adapted.coefficients for adapted in self._chunks(queries, context)])

    def _finish(self, adapted: "_Adapted") -> Float[Tensor, "b c"]:
        first = torch.baddbmm(adapted.target.unsqueeze(1), adapted.cross, adapted.coefficients)
        outputs = _apply(self._first.activations, first)
        for layer in adapted.deeper:
            outputs = _apply(layer.activations, layer(outputs))
        return outputs.squeeze(1)

    def _chunks(self, queries: Tensor, context: Context) -> Iterator["_Adapted"]:
        """Adapts a chunk of queries at a time."""
        count = context.slots.shape[1]
        # A memory that is the neighbor of many queries passes through the prefix and the first layer only once.
        slots, place = context.slots.unique(return_inverse=True)
        some = place.new_empty(len(slots)).scatter_(0, place.view(-1), torch.arange(place.numel(), device=place.device))
        keys = context.keys[some // count, some % count]
        if self._prefix is not None:
            keys, queries = self._prefix({}, keys), self._prefix({}, queries)
        base, target = self._linear(keys), self._linear(queries)
        rows = self._chunk_size or self._rows(count, queries)
        for start in range(0, len(queries), rows):
            part = slice(start, start + rows)
            near = context.keys[part] if self._prefix is None else keys[place[part]]
            cross = self._products(near, queries[part].unsqueeze(1))
            gram = self._products(near, near) if self._steps > 1 else None
            values, weights = context.values[part], context.weights[part].unsqueeze(-1)
            coefficients, deeper = self._descend(base[place[part]], gram, values, weights)
            yield _Adapted(target[part], cross, coefficients, deeper)

    def _linear(self, keys: Tensor) -> Tensor:
        return nn.functional.linear(keys, self._first.linear.weight, self._first.linear.bias)

    def _products(self, near: Float[Tensor, "b k d"], rows: Float[Tensor, "b m d"]) -> Float[Tensor, "b m k"]:
        """Returns how much each coefficient moves the first layer's output at ``rows``."""
        if not self._first.weight_adapts:
            return near.new_ones(len(near), rows.shape[1], near.shape[1])
        products = rows @ near.mT
        return products + 1 if self._first.bias_adapts else products

    def _rows(self, count: int, queries: Tensor) -> int:
        floats = 4 * count * sum(layer.linear.out_features for layer in self._layers) + 2 * count * count
        dense = sum(layer.linear.weight.numel() for layer in self._layers[1:] if layer.weight_adapts)
        floats += dense * (2 if self._rule.momentum else 1)
        return max(1, _BUDGET // (floats * queries.element_size()))

    def _descend(
        self, base: Float[Tensor, "b k h"], gram: Tensor | None, values: Tensor, weights: Float[Tensor, "b k 1"]
    ) -> tuple[Float[Tensor, "b k h"], "list[_Dense]"]:
        """Runs the steps; returns the first layer's coefficients and the adapted layers behind it."""
        rate, momentum, prior = self._rule.rate, self._rule.momentum, self._prior
        coefficients, velocity = torch.zeros_like(base), torch.zeros_like(base) if momentum else None
        deeper = [_Dense(layer) for layer in self._layers[1:]]
        for step in range(self._steps):
            first = base if step == 0 or gram is None else torch.baddbmm(base, gram, coefficients)
            signals = self._forward(first, deeper)
            pull = self._likelihood.gradient(signals[-1].value, values).mul_(weights).to(base.dtype)
            for layer, signal, source in zip(deeper[::-1], signals[:0:-1], signals[-2::-1], strict=True):
                pull = layer.ascend(_through(signal, pull), source.value, rate, momentum, prior)
            pull = _through(signals[0], pull)
            if velocity is not None:
                pull = velocity.mul_(momentum).add_(pull)
            coefficients.mul_(1 - prior).add_(pull, alpha=rate)
        return coefficients, deeper

    def _forward(self, first: Tensor, deeper: "list[_Dense]") -> "list[_Signal]":
        """Returns what each layer puts out, given what the first one does before its activations."""
        signals = [_activate(self._first.activations, first)]
        for layer in deeper:
            signals.append(_activate(layer.activations, layer(signals[-1].value)))
        return signals


class _Dense:
    """A layer behind the first: its own weights for each query, once it has moved."""

    def __init__(self, layer: _Layer) -> None:
        self.activations = layer.activations
        # Transposed, and shared by all queries until the first step.
        self.weight = _Moving(layer.linear.weight.detach().mT, layer.weight_adapts)
        self.bias = None if layer.linear.bias is None else _Moving(layer.linear.bias.detach()[None], layer.bias_adapts)

    def __call__(self, inputs: Float[Tensor, "b m i"]) -> Float[Tensor, "b m o"]:
        outputs = inputs @ self.weight.value
        return outputs if self.bias is None else outputs.add_(self.bias.value)

    def ascend(self, pull: Tensor, inputs: Tensor, rate: float, momentum: float, prior: float) -> Tensor:
        """Takes one step up the log-likelihood.

        Args:
            pull: Its gradient at this layer's outputs.
            inputs: This layer's inputs.

        Returns:
            Its gradient at the inputs.
        """
        back = pull @ self.weight.value.mT
        self.weight.ascend(inputs.mT, pull, rate, momentum, prior)
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
            step = (value > 0).to(value.dtype)
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


def _flatten(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]] | None:
    """Returns the modules of a (nested) Sequential in order; None where something else may happen in between."""
    if type(module) is nn.Sequential and not _watched(module):
        parts: list[tuple[str, nn.Module]] = []
        for name, child in module._modules.items():  # named_children would skip a function used twice
            inner = _flatten(child, f"{prefix}{name}.")
            if inner is None:
                return None
            parts += inner
        return parts
    return None if _watched(module) else [(prefix.rstrip("."), module)]


def _watched(module: nn.Module) -> bool:
    """Whether hooks or parametrizations make the module more than its type says."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or parametrize.is_parametrized(module)


def _layers(modules: list[tuple[str, nn.Module]], names: tuple[str, ...]) -> list[_Layer] | None:
    layers: list[_Layer] = []
    seen: set[int] = set()
    for name, module in modules:
        if type(module) is nn.Linear:
            shared = {id(p) for p in module.parameters()} & seen
            if shared:
                return None
            seen |= {id(p) for p in module.parameters()}
            weight, bias = (f"{name}.{p}".lstrip(".") in names for p in ("weight", "bias"))
            layers.append(_Layer(module, weight, bias, []))
        elif type(module) in _ELEMENTWISE:
            layers[-1].activations.append(module)
        elif type(module) not in _NEUTRAL:
            return None
    return layers
