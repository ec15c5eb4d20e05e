"""The Meta-LSTM: a rule whose gates decide, coordinate by coordinate, what to keep and how far to follow the gradient.

Gradient descent is the update of an LSTM's cell state with ``c = theta``, forget gate 1, input gate the rate and
candidate ``-gradient``. Here the two gates are learned.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.adaptation.rules import Params
from recollect.errors import require_whole
from recollect.meta.coordinates import LSTMStep, State, flatten, log_and_sign, require_p, unflatten

_BOUND = 0.01  # of all initial weights (the authors' code)


class MetaLSTM(nn.Module):
    """A learned rule: ``delta = (f_t - 1) * theta - i_t * grad`` with gates from an LSTM that all coordinates share.

    Paper: Ravi and Larochelle (2017), "Optimization as a model for few-shot learning"; sizes and start as in the
    authors' code:

        h_t = LSTM([preprocessed loss, preprocessed gradient], h_{t-1})            4 -> 20 units
        f_t = sigmoid(a_t),  a_t = w_F . [h_t, theta_{t-1}, a_{t-1}] + b_F         a_0 = 0
        i_t = sigmoid(e_t),  e_t = w_I . [h_t, theta_{t-1}, e_{t-1}] + b_I         e_0 = 0

    It is a module, whose parameters an outer loop trains, and a rule, so ``LocalAdaptation(rule, steps)`` and
    ``RuleOptimizer`` take it. The learned start c_0 of the paper is no part of it: it is the learner's own parameters,
    which the outer loop trains together with the rule's. Losses and gradients should come detached, as the paper
    neglects their derivatives.

    *Differs from the paper:* as in the authors' code a gate sees its last value before the sigmoid, and loss and
    gradient through ``h_t``. The LSTM has one bias, not two.

    Args:
        hidden: Units of the LSTM (20 in the authors' code).
        p: Of the preprocessing, see ``log_and_sign`` (10 in the paper).
        generator: Draws the initial weights: uniform in +-0.01, ``b_F`` in (4, 5) and ``b_I`` in (-5, -4), so it
            starts as gradient descent with a rate of about 0.01 and a little decay. From torch's global random state
            when None.

    Raises:
        SettingError: If ``hidden`` is no whole number above 0, or ``p`` not above 0 or beyond 88
            (see ``log_and_sign``).

    Example:
        >>> rule = MetaLSTM(generator=torch.Generator().manual_seed(0))
        >>> params, grads = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 0.0, -1.0])}
        >>> delta, state = rule.update(grads, rule.init(params), params, torch.tensor(0.5))
        >>> delta["w"].sign().tolist()
        [-1.0, 0.0, 1.0]
    """

    def __init__(self, *, hidden: int = 20, p: float = 10.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        require_whole("hidden", hidden)
        require_p(p, torch.get_default_dtype())
        self.hidden = hidden
        self.p = p
        self.lstm = LSTMStep(4, hidden, bound=_BOUND, generator=generator)
        self.weight = nn.Parameter(torch.empty(2, hidden + 2).uniform_(-_BOUND, _BOUND, generator=generator))
        """Rows w_F and w_I."""
        self.bias = nn.Parameter(torch.empty(2).uniform_(4.0, 5.0, generator=generator) * torch.tensor([1.0, -1.0]))
        """b_F and b_I."""

    def init(self, params: Params) -> tuple[State, Float[Tensor, "#n 2"]]:
        """Returns the state before the first step, which is the same for all coordinates and kept once."""
        zeros = self.bias.new_zeros(1, self.hidden)
        return (zeros, zeros), self.bias.new_zeros(1, 2)

    def update(
        self,
        grads: Params,
        state: tuple[State, Float[Tensor, "#n 2"]],
        params: Params,
        loss: Float[Tensor, "*b"],
    ) -> tuple[Params, tuple[State, Float[Tensor, "#n 2"]]]:
        """Returns what to add to the parameters, and the next state; see ``Rule``.

        Raises:
            SettingError: If a gradient is missing.
            ShapeError: If there are losses ``(b,)``, but not as many rows in each parameter, or the state is that of
                another number of parameters.
        """
        dtype = self.bias.dtype
        theta, gradient = (flatten(tensors, loss, like=params).to(dtype) for tensors in (params, grads))
        of_loss = log_and_sign(loss.to(dtype), self.p).unsqueeze(-2).expand(*theta.shape, 2)
        inputs = torch.cat([of_loss, log_and_sign(gradient, self.p)], -1)
        lstm = self.lstm(inputs.reshape(-1, 4), state[0])
        seen = torch.cat([lstm[0], theta.reshape(-1, 1)], 1)
        gates = torch.addmm(self.bias, seen, self.weight[:, :-1].mT) + self.weight[:, -1] * state[1]
        forget, enter = torch.sigmoid(gates).reshape(*theta.shape, 2).unbind(-1)
        return unflatten((forget - 1) * theta - enter * gradient, params), (lstm, gates)
