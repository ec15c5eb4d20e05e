"""``LocalAdaptation``: T steps of a rule on the weighted log-likelihood of the neighbors, Eq. (7).

Three engines compute the same thing. ``factored.py`` never builds a copy of the first adapting layer and serves linear
and MLP heads under gradient descent; ``dense.py`` steps through the weights of a linear head under rmsprop and adam;
``general.py`` serves every head and every rule. ``bind`` picks the first that is exact.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from recollect.adaptation.dense import Dense
from recollect.adaptation.factored import Factored
from recollect.adaptation.general import General
from recollect.adaptation.head import Head
from recollect.adaptation.rules import Rule
from recollect.errors import SettingError, require, require_number
from recollect.likelihoods import Likelihood
from recollect.memory import Context


@runtime_checkable
class Adapter(Protocol):
    """An adaptation bound to one head: fits it to each query's context and returns its outputs at the queries."""

    def __call__(self, queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]: ...


@runtime_checkable
class Adaptation(Protocol):
    """What ``MbPA`` needs of an adaptation: A(theta, C) of the design, for any way to get theta_x from a context."""

    def bind(self, head: Head, likelihood: Likelihood) -> Adapter: ...


@dataclass(frozen=True)
class LocalAdaptation:
    """Fits the head to a query's neighbors by ``steps`` steps of ``rule``, starting anew for each query.

    One step changes the parameters by

        delta = rule(-grad sum_k w_k log p(v_k | h_k, theta_x)) - prior * (theta_x - theta)

    Paper: Eq. (4) and (7), Algorithm 1, MbPA-Test lines 4 to 6. *Differs from the paper:* as printed, Eq. (4) adds
    ``-alpha grad sum_k w_k log p`` and ``-beta (theta - theta_x)``, which makes the neighbors *less* likely and
    pushes away from theta; we descend on Eq. (7). The prior acts beside the rule, not through it, so that
    its strength does not depend on momentum or on the scaling of rmsprop and adam.

    Args:
        rule: How a gradient becomes a step; see ``recollect.rules``.
        steps: The number of steps T; 0 leaves the head as it is. (Paper, Appendix B: 1, 5 or 10.)
        prior: The strength beta of the pull back to theta, from 0 to below 1. With one step it has no effect.
        parameters: Which of the head's parameters adapt: names of parameters or of submodules; all when None.
        chunk_size: How many queries adapt at the same time; chosen to fit the caches when None. Fewer need less
            memory; the result is the same. (One step of a linear head under ``rules.sgd`` needs little, and no chunks.)
        keep_base: Whether to keep, for each slot of the memory, what the given head says of the entry in it, and to
            compute it anew only when the entry or the head has changed. For ``rules.sgd`` and linear or MLP heads.
            The result is the same. It takes, for each slot up to the highest one seen and at most twice that, as many
            numbers as the head has outputs (of an MLP, the first adapting layer) and a copy of key and value (two, and
            the first adapting layer's input, where frozen layers come before it), which stays after ``forget`` until
            the slot is seen with another entry. It pays where a head has many outputs: a language model's, in one step.

    Raises:
        SettingError: If a setting is outside its range.

    Example:
        >>> from recollect import rules
        >>> LocalAdaptation(rules.sgd(0.1), steps=5)
        LocalAdaptation(rule=sgd(rate=0.1, momentum=0.0), steps=5, prior=0.0, parameters=None, chunk_size=None, \
keep_base=False)
    """

    rule: Rule
    steps: int
    prior: float = 0.0
    parameters: tuple[str, ...] | None = None
    chunk_size: int | None = None
    keep_base: bool = False

    def __post_init__(self) -> None:
        require("rule", self.rule, Rule, "a rule with init and update, such as rules.sgd(0.1)")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise SettingError(f"steps must be a whole number of at least 0, got {self.steps!r}.")
        require_number("prior", self.prior, low=0.0)
        if self.prior >= 1:
            raise SettingError(f"prior must be in [0, 1): at 1 every step forgets the one before. Got {self.prior}.")
        names = self.parameters
        if names is not None and not (isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
            example = f"({names!r},)" if isinstance(names, str) else "('fc', 'norm.bias')"
            raise SettingError(f"parameters must be a tuple of names, such as parameters={example}, got {names!r}.")
        if names == ():
            raise SettingError("parameters=() lets nothing adapt: use steps=0 for that, or None for all parameters.")
        size = self.chunk_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise SettingError(f"chunk_size must be a whole number above 0, or None, got {size!r}.")

    def bind(self, head: Head, likelihood: Likelihood) -> Adapter:
        """Returns the engine that adapts ``head``: the first of factored, dense and general that is exact.

        Raises:
            HeadError: If the head has no parameters, or not the ones to adapt.
        """
        names = head.select(self.parameters)
        settings = {"steps": self.steps, "prior": self.prior, "chunk_size": self.chunk_size}
        factored = Factored.build(head, likelihood, names, rule=self.rule, keep_base=self.keep_base, **settings)
        if self.keep_base and factored is None:
            raise SettingError(
                "keep_base=True needs rules.sgd, at least one step, and from the first adapting layer on nothing but "
                "nn.Linear (not shared or float16, without hooks or parametrizations) and functions without parameters "
                f"between them; here {type(self.rule).__name__}, steps={self.steps}, {head.module}. Leave it out: the "
                "result is the same."
            )
        dense = factored or Dense.build(head, likelihood, names, rule=self.rule, **settings)
        return dense or General(head, likelihood, names, rule=self.rule, **settings)
