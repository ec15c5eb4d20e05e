"""The general engine: any head, any rule, one parameter copy per query, side by side under ``vmap``."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from recollect.adaptation.head import Head
from recollect.adaptation.rules import Rule
from recollect.adaptation.workspace import workspace
from recollect.errors import HeadError
from recollect.likelihoods import Likelihood
from recollect.memory import Context

_BUDGET = 8 * 2**20  # bytes of parameter copies, gradients and states at once, for each thread


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
        self._runs_side_by_side = False  # not known yet

    def __call__(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
        """Returns the outputs of each query's own adapted head; queries and context are in the head's dtype."""
        if self._steps == 0:
            return self._head({}, queries)
        theta = self._head.parameters()
        rows = self._chunk_size or self._rows(theta, context)
        theta = {name: theta[name] for name in self._names}
        parts = [
            self._adapt(theta, queries[start : start + rows], Context(*(c[start : start + rows] for c in context)))
            for start in range(0, len(queries), rows)
        ]
        return torch.cat(parts)

    def _rows(self, theta: dict[str, Tensor], context: Context) -> int:
        """Returns how many queries fit the budget, from their parameter copies and the widths of the layers."""
        copies = sum(theta[name].numel() * theta[name].element_size() for name in self._names)
        widths = sum(p.shape[0] * p.element_size() for p in theta.values() if p.dim() > 1)
        return max(1, workspace(_BUDGET, context.keys.device) // (4 * (copies + context.slots.shape[1] * widths)))

    def _adapt(self, theta: dict[str, Tensor], queries: Tensor, context: Context) -> Tensor:
        prior = self._prior
        params = {name: p.expand(len(queries), *p.shape) for name, p in theta.items()}
        state = self._rule.init(params)
        for _ in range(self._steps):
            with torch.enable_grad():
                leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
                likelihoods = self._likelihood.log_prob(self._outputs(leaves, context.keys), context.values)
                losses = -(context.weights * likelihoods).sum(-1)
                # No query's loss depends on another query's parameters: the gradient of the sum is that of each.
                parts = torch.autograd.grad(losses.sum(), tuple(leaves.values()), materialize_grads=True)
            grads = dict(zip(leaves, parts, strict=True))
            delta, state = self._rule.update(grads, state, params, losses.detach())
            params = {n: p + delta[n] - prior * (p - theta[n]) if prior else p + delta[n] for n, p in params.items()}
        return self._outputs(params, queries.unsqueeze(1)).squeeze(1)  # a head takes rows, not a bare vector

    def _outputs(self, params: dict[str, Tensor], keys: Float[Tensor, "b k d"]) -> Float[Tensor, "b k c"]:
        if len(keys) == 1 and self._runs_side_by_side:  # vmap would take as long as the head itself
            return self._head({name: p[0] for name, p in params.items()}, keys[0]).unsqueeze(0)
        try:
            outputs = vmap(self._head)(params, keys)
            self._runs_side_by_side = True  # one query needs it no less: a batch is its rows one by one
            return outputs
        except RuntimeError as error:
            if not str(error).startswith("vmap"):
                raise
            raise HeadError(
                f"the head ({type(self._head.module).__name__}) cannot be adapted for many queries side by side: its "
                f"forward decides by the values in a tensor, or is random. Leave that part in the embedding. ({error})"
            ) from error
