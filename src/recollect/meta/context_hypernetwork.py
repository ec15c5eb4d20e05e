"""``ContextHypernetwork``: an adaptation in one forward pass, from a query's neighbors to its head's parameters."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from recollect.adaptation import Head
from recollect.adaptation.local import Adapter
from recollect.adaptation.workspace import workspace
from recollect.errors import (
    DtypeError,
    HeadError,
    SettingError,
    ShapeError,
    require,
    require_number,
    require_tensor,
    require_whole,
)
from recollect.likelihoods import Categorical, Likelihood
from recollect.memory import Context
from recollect.meta.initial import drawn

_BUDGET = 8 * 2**20  # bytes of what is computed for each neighbor of a chunk of queries, for each thread
_LABELS = Categorical()


class ContextHypernetwork(nn.Module):
    """Generates the change of a linear head from a query's neighbors: learned once, then no steps and no rates.

    Each neighbor k of a query (key h_k, label v_k, weight w_k) passes through one small network, the same for all, and
    what comes out is summed:

        r_k = onehot(v_k) - softmax(W h_k + b)
        e_k = tanh(A (h_k, w_k, r_k[v_k]) + c)
        m_k = h_k + M e_k,    s_k = u . e_k + rate
        W_x = W + sum_k w_k s_k r_k m_k^T,    b_x = b + sum_k w_k s_k r_k

    so the order of the neighbors means nothing, their number is free, and so is the number of classes: the parameters
    A, c, M, u and rate know of labels only how much the head was surprised, ``r_k[v_k]``. Neighbors of weight 0 add
    nothing. M and u start at zero: with ``rate=0`` the adapted head is the given one, with any other it is what one
    step of ``rules.sgd(rate)`` makes of it, and training goes on from there. W_x is never built: the outputs are
    ``W q + b + sum_k w_k s_k (m_k . q + 1) r_k``, without the 1 where the head has no bias.

    It takes the place of ``LocalAdaptation`` in ``MbPA(head, memory, adaptation=...)``, of whose parameters its own are
    then part. ``MbPA`` passes no gradient on, so train it by ``adapted``: the examples and the entries of the memory
    they find must be different ones, as each finds itself otherwise, and learns to copy one label.

    Paper: none; the form is our own. Of Ha, Dai and Le 2017, "HyperNetworks", is the idea: weights that another network
    puts out, which here reads neighbors in place of layer embeddings.

    Args:
        key_size: The length of a key, the head's ``in_features``.
        hidden_size: The length of e_k. (32 is our choice.)
        rate: The first value of the learned rate.
        generator: Draws the initial A and c, uniform in ``+-1/sqrt(inputs)`` as ``nn.Linear`` does; torch's global
            random state does when None.

    Raises:
        SettingError: If a size is not a positive whole number, or ``rate`` no finite number.

    Example:
        >>> from recollect import EpisodicMemory, MbPA
        >>> head, memory = nn.Linear(2, 3), EpisodicMemory(capacity=100, key_size=2)
        >>> slots = memory.write(torch.randn(50, 2), torch.randint(3, (50,)))
        >>> hyper = ContextHypernetwork(2)
        >>> optimizer = torch.optim.Adam(hyper.parameters())
        >>> for _ in range(3):
        ...     queries, labels = torch.randn(20, 2), torch.randint(3, (20,))
        ...     outputs = hyper.adapted(head, queries, memory.read(queries, 5))
        ...     loss = nn.functional.cross_entropy(outputs, labels)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> model = MbPA(head, memory, neighbors=5, adaptation=hyper)
        >>> model(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        key_size: int,
        *,
        hidden_size: int = 32,
        rate: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_whole("key_size", key_size)
        require_whole("hidden_size", hidden_size)
        require_number("rate", rate)
        self.key_size = key_size
        self.reader = drawn(nn.Linear(key_size + 2, hidden_size, device="meta"), key_size + 2, generator)
        self.key = nn.Linear(hidden_size, key_size, bias=False, device="meta").to_empty(device="cpu")
        self.strength = nn.Linear(hidden_size, 1, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            self.key.weight.zero_()
            self.strength.weight.zero_()
            self.strength.bias.fill_(rate)

    def bind(self, head: Head, likelihood: Likelihood) -> Adapter:
        """Returns what ``MbPA`` calls with each batch of queries and their neighbors.

        Raises:
            HeadError: If the head is no ``nn.Linear``, or of other keys.
            SettingError: If the likelihood is not ``Categorical``.
        """
        if not isinstance(likelihood, Categorical):
            raise SettingError(
                f"a ContextHypernetwork reads labels: it needs likelihood=Categorical(), got {likelihood!r}. "
                "For other values use LocalAdaptation."
            )
        return _Bound(self, self._checked(head.module))

    def adapted(self, head: nn.Linear, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
        """Returns the outputs (logits) of each query's own adapted head, with gradients.

        Gradients reach this network and whatever else asks for them: the head, the queries, the keys. Detach what is
        not to be trained.

        Args:
            head: The head, of whose dtype and device everything else is too.
            queries: Keys to predict at.
            context: Their neighbors, as from ``memory.read(queries, neighbors)``. One of no neighbors changes nothing.

        Raises:
            HeadError: If the head is no ``nn.Linear``, or of other keys.
            ShapeError: If queries and context are not of these keys, or not of as many queries.
            DtypeError: If they or this network are not of the head's dtype, queries are no tensor, or labels no whole
                numbers.
            SettingError: If ``context`` is something else.
            LabelError: If a label is not one of the head's outputs.
        """
        head = self._checked(head)
        require_tensor("queries", queries)
        require("context", context, Context, "what memory.read(queries, neighbors) returns")
        count = context.weights.shape[-1:].numel()
        shapes = tuple(queries.shape), tuple(context.keys.shape)
        if shapes != ((len(queries), self.key_size), (len(queries), count, self.key_size)):
            raise ShapeError(
                f"queries must have shape (b, {self.key_size}) and the keys of their context "
                f"(b, neighbors, {self.key_size}), got {shapes[0]} and {shapes[1]}."
            )
        dtype = head.weight.dtype
        for name, tensor in {"queries": queries, "keys": context.keys, "weights": context.weights}.items():
            if tensor.dtype != dtype:
                raise DtypeError(f"{name} must be {dtype} as the head, got {tensor.dtype}. Use .to({dtype}).")
        _LABELS.check_values(context.values, head.out_features)
        return self._outputs(head, queries, context)

    def _outputs(self, head: nn.Linear, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
        if self.reader.weight.dtype != head.weight.dtype:
            raise DtypeError(
                f"the ContextHypernetwork is {self.reader.weight.dtype}, the head {head.weight.dtype}. "
                f"Use .to({head.weight.dtype}) on it."
            )
        keys, weights = context.keys, context.weights
        residuals = _LABELS.gradient(linear(keys, head.weight, head.bias), context.values)
        surprise = residuals.gather(-1, context.values.long().unsqueeze(-1))
        read = self.reader(torch.cat([keys, weights.unsqueeze(-1), surprise], -1)).tanh()
        reach = ((keys + self.key(read)) @ queries.unsqueeze(-1)).squeeze(-1)
        shares = weights * self.strength(read).squeeze(-1) * (reach if head.bias is None else reach + 1)
        return linear(queries, head.weight, head.bias) + (shares.unsqueeze(1) @ residuals).squeeze(1)

    def _checked(self, head: nn.Module) -> nn.Linear:
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
            raise HeadError(
                "a ContextHypernetwork generates the change of a torch.nn.Linear without hooks or parametrizations, "
                f"but the head is {head}. Take the last layer alone as the head, and the rest into the embedding; or "
                "use LocalAdaptation."
            )
        if head.in_features != self.key_size:
            raise HeadError(
                f"the head's keys have length {head.in_features}, this ContextHypernetwork's {self.key_size}. Use "
                f"ContextHypernetwork({head.in_features})."
            )
        return head


class _Bound:
    """A context hypernetwork with the head whose change it generates."""

    def __init__(self, hypernetwork: ContextHypernetwork, head: nn.Linear) -> None:
        self._hypernetwork = hypernetwork
        self._head = head

    def __call__(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
        """Returns the outputs of each query's own adapted head, some of the queries at a time."""
        hypernetwork, head = self._hypernetwork, self._head
        floats = 2 * (head.out_features + head.in_features + hypernetwork.reader.out_features)
        size = context.slots.shape[1] * floats * queries.element_size()
        rows = max(1, workspace(_BUDGET, queries.device) // max(1, size))
        parts = zip(queries.split(rows), *(part.split(rows) for part in context), strict=True)
        return torch.cat([hypernetwork._outputs(head, some, Context(*near)) for some, *near in parts])
