"""The LSTM optimizer: a rule that is learned whole, coordinate by coordinate."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect.adaptation.rules import Params
from recollect.errors import SettingError, require_number, require_whole
from recollect.meta.coordinates import LSTMStep, State, flatten, log_and_sign, require_p, unflatten
from recollect.meta.initial import drawn


class LSTMOptimizer(nn.Module):
    """A learned rule: ``delta = scale * linear(LSTM(preprocessed gradient))``, an LSTM that all coordinates share.

    Paper: Andrychowicz et al. (2016), "Learning to learn by gradient descent by gradient descent". Each coordinate
    has its own state, so that one optimizer serves any number of parameters. It does not read the loss. It is a
    module, which ``training.Backpropagation`` trains, and a rule for ``LocalAdaptation`` and ``RuleOptimizer``.

    *Differs from the paper:* the layers have one bias, not two.

    Args:
        sizes: Units of the LSTM's layers (two layers of 20 in the paper).
        p: Of the preprocessing, see ``log_and_sign`` (10 in the paper, 5 in the authors' code); None feeds raw
            gradients, as the authors do for quadratic functions.
        scale: Of the output (0.1 in the paper, 0.01 in the authors' code for networks, 1 there for quadratic
            functions).
        generator: Draws the initial weights, uniform in ``+-1 / sqrt(units)`` as those of ``nn.LSTM`` and
            ``nn.Linear``; torch's global random state does when None.

    Raises:
        SettingError: If there are no sizes, or a size is no whole number above 0, or ``p`` or ``scale`` not above 0,
            or ``p`` beyond 88 (see ``log_and_sign``).

    Example:
        >>> rule = LSTMOptimizer(generator=torch.Generator().manual_seed(0))
        >>> params, grads = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 0.0, 1.0])}
        >>> delta, state = rule.update(grads, rule.init(params), params, torch.tensor(0.5))
        >>> [bool(delta["w"][0] == delta["w"][i]) for i in (1, 2)]
        [False, True]
    """

    def __init__(
        self,
        *,
        sizes: tuple[int, ...] = (20, 20),
        p: float | None = 10.0,
        scale: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sizes, tuple) or not sizes:
            raise SettingError(f"sizes must be the units of at least one layer, such as (20, 20), got {sizes!r}.")
        for size in sizes:
            require_whole("each of sizes", size)
        if p is not None:
            require_p(p, torch.get_default_dtype())
        require_number("scale", scale, above=0.0)
        self.sizes = sizes
        self.p = p
        self.scale = scale
        widths = (1 if p is None else 2, *sizes)
        self.layers = nn.ModuleList(
            LSTMStep(inputs, units, bound=units**-0.5, generator=generator) for inputs, units in pairwise(widths)
        )
        self.output = drawn(nn.Linear(sizes[-1], 1, device="meta"), sizes[-1], generator)

    def init(self, params: Params) -> tuple[State, ...]:
        """Returns the state before the first step, which is the same for all coordinates and kept once."""
        zeros = [self.output.weight.new_zeros(1, units) for units in self.sizes]
        return tuple((start, start) for start in zeros)

    def update(
        self, grads: Params, state: tuple[State, ...], params: Params, loss: Float[Tensor, "*b"]
    ) -> tuple[Params, tuple[State, ...]]:
        """Returns what to add to the parameters, and the next state; see ``Rule``.

        Raises:
            SettingError: If a gradient is missing.
            ShapeError: If there are losses ``(b,)``, but not as many rows in each parameter, or the state is that of
                another number of parameters.
        """
        flat = flatten(grads, loss, like=params).to(self.output.weight.dtype)
        values = flat.reshape(-1, 1) if self.p is None else log_and_sign(flat.reshape(-1), self.p)
        after = list[State]()
        for layer, before in zip(self.layers, state, strict=True):
            after.append(layer(values, before))
            values = after[-1][0]
        delta = self.scale * self.output(values).reshape(flat.shape)
        return unflatten(delta, params), tuple(after)
