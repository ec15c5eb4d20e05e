"""Learning to optimize: a policy that reads the recent gradients and values of an objective and answers with a step."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from recollect.adaptation.rules import Params
from recollect.errors import ShapeError, require, require_whole
from recollect.meta.coordinates import flatten, unflatten
from recollect.meta.initial import drawn

History = tuple[Float[Tensor, "... _"], Float[Tensor, "... _ _"]]


class Policy(nn.Module):
    """A learned rule for a fixed number of parameters: a small network that computes the whole step from a history.

    Paper: Li and Malik (2017), "Learning to optimize". With locations counted back from the current one, the first,
    the input is ``f(x_1) - f(x_i)`` and the gradient at ``x_i``, for i = 2 to H + 1; of locations before the start
    both are zero. One hidden layer of softplus units; the output is the step. The location itself is no input, so the
    policy works the same everywhere. It is a module, which ``training.Backpropagation``,
    ``training.EvolutionStrategy`` and, as in the paper, ``guided.GuidedPolicySearch`` train, and a rule for
    ``LocalAdaptation`` and ``RuleOptimizer(..., joint=True)``.

    *Differs from the paper:* there the output is the mean of a random step; here it is the step. The output layer
    starts at zero, so an untrained policy stands still.

    Args:
        parameters: How many numbers it moves: all parameters together.
        history: H (25 in the paper).
        hidden: Units of the hidden layer (50 in the paper).
        current: Whether the gradients are those for i = 1 to H instead, so that the policy sees the one at the current
            location. (The paper, read to the letter, does not let it; its later code does.)
        generator: Draws the weights of the hidden layer, uniform in ``+-1 / sqrt(inputs)`` as those of ``nn.Linear``;
            torch's global random state does when None.

    Raises:
        SettingError: If a size is no whole number above 0, or ``current`` not True or False.

    Example:
        >>> policy = Policy(4)
        >>> sum(p.numel() for p in policy.parameters())
        6504
        >>> params = {"weight": torch.zeros(3), "bias": torch.zeros(())}
        >>> step, state = policy.update(params, policy.init(params), params, torch.tensor(1.0))
        >>> step["weight"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        parameters: int,
        *,
        history: int = 25,
        hidden: int = 50,
        current: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"parameters": parameters, "history": history, "hidden": hidden}.items():
            require_whole(name, size)
        require("current", current, bool, "True or False")
        self.history = history
        self.current = current
        inputs = history * (1 + parameters)
        self.hidden = drawn(nn.Linear(inputs, hidden, device="meta"), inputs, generator)
        self.output = nn.Linear(hidden, parameters, device="meta").to_empty(device="cpu")
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def init(self, params: Params) -> History:
        """Returns an empty history, which serves any number of rows."""
        weight = self.output.weight
        return weight.new_zeros(0), weight.new_zeros(0, len(weight))

    def update(
        self, grads: Params, state: History, params: Params, loss: Float[Tensor, "*b"]
    ) -> tuple[Params, History]:
        """Returns what to add to the parameters, and the next state; see ``Rule``.

        Raises:
            SettingError: If a gradient is missing.
            ShapeError: If the parameters are not as many numbers as the policy moves, or there are losses ``(b,)``, but
                not as many rows in each parameter, or the state is that of another batch.
        """
        weight = self.output.weight
        gradient, value = flatten(grads, loss, like=params).to(weight.dtype), loss.to(weight.dtype)
        if gradient.shape[-1] != len(weight):
            raise ShapeError(
                f"this policy moves {len(weight)} numbers, but the parameters {list(grads)} are {gradient.shape[-1]}. "
                "Make a Policy for these, or pass RuleOptimizer(..., joint=True) if it saw only some of them."
            )
        rows, length = loss.shape, state[0].shape[-1]
        if state[0].shape[:-1] not in (rows, torch.Size([])):
            raise ShapeError(
                f"the history must be that of losses of shape {tuple(rows)}, got that of {tuple(state[0].shape[:-1])}. "
                "Is it that of another batch? Begin with policy.init(params)."
            )
        values, gradients = state[0].expand(*rows, length), state[1].expand(*rows, length, len(weight))
        now, recent = value.unsqueeze(-1), torch.cat([gradient.unsqueeze(-2), gradients], -2)
        seen = recent[..., : self.history, :] if self.current else gradients
        changes = pad(now - values, (0, self.history - length))
        slopes = pad(seen, (0, 0, 0, self.history - seen.shape[-2]))
        step = self.output(softplus(self.hidden(torch.cat([changes, slopes.flatten(-2)], -1))))
        values = torch.cat([now, values], -1)[..., : self.history]
        return unflatten(step, params), (values, recent[..., : self.history, :])
