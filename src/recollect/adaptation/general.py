"""The general engine: any head, any rule, one parameter copy per query, side by side under ``vmap``."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value, vmap

from recollect.adaptation.head import Head
from recollect.adaptation.rules import Rule
from recollect.likelihoods import Likelihood
from recollect.memory import Context

_BUDGET = 64 * 2**20  # bytes of parameter copies, gradients and states at once


class General:
    """Algorithm 1, MbPA-Test, as written, for a whole batch of queries at once."""

    def __init__(
        self,
        head: Head,
        likelihood: Likelihood,
        names: tuple[str, ...],
        *,
        rule: Rule,
        steps: int,
        prior: float,
        chunk_size: int | None,
    ) -> None:
        self._head = head
        self._likelihood = likelihood
        self._names = names
        self._rule = rule
        self._steps = steps
        self._prior = prior
        self._chunk_size = chunk_size

    def __call__(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
        """Returns the outputs ``(b, c)`` of each query's own adapted head."""
        live = self._head.parameters()
        params = {name: live[name] for name in self._names}
        copy = 4 * sum(p.numel() * p.element_size() for p in params.values())
        rows = self._chunk_size or max(1, _BUDGET // copy)
        parts = [
            self._adapt(params, queries[start : start + rows], Context(*(c[start : start + rows] for c in context)))
            for start in range(0, len(queries), rows)
        ]
        return torch.cat(parts)

    def _adapt(self, theta: dict[str, Tensor], queries: Tensor, context: Context) -> Tensor:
        def loss(params: dict[str, Tensor], keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
            return -(weights * self._likelihood.log_prob(self._head(params, keys), values)).sum()

        step = vmap(grad_and_value(loss))
        prior = self._prior
        weights = context.weights.to(context.keys.dtype)
        params = {name: p.expand(len(queries), *p.shape) for name, p in theta.items()}
        state = self._rule.init(params)
        for _ in range(self._steps):
            grads, losses = step(params, context.keys, context.values, weights)
            delta, state = self._rule.update(grads, state, params, losses)
            params = {n: p + delta[n] - prior * (p - theta[n]) if prior else p + delta[n] for n, p in params.items()}
        return vmap(self._head)(params, queries)
