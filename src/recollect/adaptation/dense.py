"""The dense engine: rmsprop and adam on a head whose last linear layer adapts, with the gradient written by hand.

Under an elementwise rule the change of a layer has full rank, so that every query needs weights of its own. With
``a_k`` the gradient of the loss at the outputs for memory k, the gradient is ``sum_k a_k h_k^T`` for the weight and
``sum_k a_k`` for the bias, and the classes have to do with each other only in the likelihood. So a step goes through
the classes in tiles that stay in the cache: gradient, rule, new weights and at once the outputs of the next step.
Weights and states then pass through the main memory once a step. A small head is one tile for several queries.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.adaptation.entries import distinct, groups
from recollect.adaptation.head import Head
from recollect.adaptation.layers import Layer, split
from recollect.adaptation.rules import Rule, adam, rmsprop
from recollect.adaptation.workspace import workspace
from recollect.likelihoods import Likelihood
from recollect.memory import Context

_BUDGET = 4 * 2**20  # bytes of a tile's weights and of what a step makes of them, for each thread
_NAME = "parameter"  # of the only one that the rule is shown at a time


class Dense:
    """Adapts ``layer`` behind ``prefix`` (frozen, any module), in a copy of its own for each query."""

    def __init__(
        self,
        prefix: Head | None,
        layer: Layer,
        likelihood: Likelihood,
        *,
        rule: Rule,
        steps: int,
        prior: float,
        chunk_size: int | None,
    ) -> None:
        self._prefix = prefix
        self._layer = layer
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
    ) -> "Dense | None":
        """Returns the engine for ``head``, or None for other rules, or where more adapts than the last linear layer."""
        parts = split(head, names) if type(rule) in {rmsprop, adam} and steps > 0 else None
        if parts is None:
            return None
        prefix, layers = parts
        if len(layers) > 1 or layers[0].activations:
            return None
        return Dense(prefix, layers[0], likelihood, rule=rule, steps=steps, prior=prior, chunk_size=chunk_size)

    def __call__(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
        """Returns the outputs of each query's own adapted head; queries and context are in the head's dtype."""
        parts = groups(queries, context, self._layer.linear.out_features)
        return torch.cat([outputs for part in parts for outputs in self._group(*part)])

    def _group(self, queries: Tensor, context: Context) -> list[Float[Tensor, "_ c"]]:
        """Adapts queries whose entries in common pass through the prefix and the given layer only once."""
        entries = distinct(context)
        keys, place = entries.keys, entries.place
        if self._prefix is not None:
            keys, queries = self._prefix({}, keys), self._prefix({}, queries)
        linear = self._layer.linear
        base = nn.functional.linear(keys, linear.weight, linear.bias).detach()
        fitting = self._fitting(keys.device)
        rows = self._chunk_size or max(1, fitting // linear.out_features)
        tiles, bias = self._tiles(max(1, fitting // min(rows, len(queries)))), self._bias()
        parts = []
        for start in range(0, len(queries), rows):
            part = slice(start, start + rows)
            near = context.keys[part] if self._prefix is None else keys[place[part]]
            values, weights = context.values[part], context.weights[part].unsqueeze(-1)
            query = queries[part].unsqueeze(1)
            parts.append(self._descend(tiles, bias, base[place[part]], near, query, values, weights))
        return parts

    def _fitting(self, device: torch.device) -> int:
        """Returns how many classes, of one query or of several, fit the budget."""
        weight = self._layer.linear.weight
        budget = workspace(_BUDGET, device)
        # A row of the weight, its gradient and its state, and two arrays within the rule.
        return max(1, budget // (5 * weight.shape[1] * weight.element_size()))

    def _tiles(self, classes: int) -> "list[_Stepped]":
        """Returns the weight in tiles of at most so many classes, all but the last of the same size."""
        weight = self._layer.linear.weight.detach()
        count = -(-len(weight) // classes)
        return [self._start(tile, self._layer.weight_adapts) for tile in weight.split(-(-len(weight) // count))]

    def _bias(self) -> "_Stepped | None":
        bias = self._layer.linear.bias
        return None if bias is None else self._start(bias.detach()[None], self._layer.bias_adapts)

    def _start(self, theta: Float[Tensor, "m n"], adapts: bool) -> "_Stepped":
        return _Stepped(theta, theta, self._rule.init({_NAME: theta}) if adapts else None)

    def _descend(
        self,
        tiles: "list[_Stepped]",
        bias: "_Stepped | None",
        outputs: Float[Tensor, "b k c"],
        near: Float[Tensor, "b k h"],
        query: Float[Tensor, "b 1 h"],
        values: Tensor,
        weights: Float[Tensor, "b k 1"],
    ) -> Float[Tensor, "b c"]:
        """Runs the steps, given the outputs at the neighbors before them; returns the outputs at the query."""
        tiles = list(tiles)
        for step in range(self._steps):
            pull = (self._likelihood.gradient(outputs, values) * -weights).to(outputs.dtype)
            inputs = near if step < self._steps - 1 else query
            parts = []
            for i, part in enumerate(pull.split([len(tile.theta) for tile in tiles], -1)):
                tiles[i] = self._step(tiles[i], part.mT, near)
                parts.append(inputs @ tiles[i].value.mT)
            outputs = torch.cat(parts, -1)
            if bias is not None:
                bias = self._step(bias, pull.new_ones(()).expand(len(pull), 1, pull.shape[1]), pull)
                outputs.add_(bias.value)
        return outputs.squeeze(1)

    def _step(self, before: "_Stepped", left: Float[Tensor, "b m k"], right: Float[Tensor, "b k n"]) -> "_Stepped":
        """Takes one step where the gradient of the loss is ``left @ right``."""
        if before.state is None:
            return before
        loss = left.new_zeros(len(left))  # which an elementwise rule ignores
        delta, state = self._rule.update({_NAME: left @ right}, before.state, {_NAME: before.value}, loss)
        kept = before.value.lerp(before.theta, self._prior) if self._prior else before.value
        return _Stepped(before.theta, delta[_NAME].add_(kept), state)


class _Stepped(NamedTuple):
    """Parameters and the rule's state: shared by all queries until the first step, then one of each for each query."""

    theta: Float[Tensor, "m n"]
    value: Float[Tensor, "*b m n"]
    state: Any  # None: they do not adapt
