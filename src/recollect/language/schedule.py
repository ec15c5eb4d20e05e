"""``Schedule``: how a language model is trained."""

from dataclasses import dataclass

from recollect.errors import SettingError, require_choice, require_number, require_whole


@dataclass(frozen=True)
class Schedule:
    """How a language model is trained.

    Source of the defaults: Melis et al. 2017 as published for the paper's size (one layer, 10M weights, PTB), where
    the loss is a sum over 35 words; ``l2`` and ``clip`` are those for a mean per word.

    Raises:
        SettingError: If a setting is outside its range.

    Example:
        >>> schedule = Schedule(epochs=12.0, rate=0.003, anneal=0.3)
        >>> schedule.batch * schedule.segment  # words in a step
        2240
    """

    epochs: float = 241.0
    """The longest training, in passes over the text."""
    batch: int = 64
    """How many stripes of the text are read side by side."""
    segment: int = 35
    """Through how many words gradients go back."""
    rate: float = 0.004179
    """Adam's step size."""
    beta1: float = 0.0
    """Adam's first decay rate: 0 leaves the gradient as it is, which is RMSprop with Adam's correction."""
    beta2: float = 0.999
    """Adam's second decay rate."""
    l2: float = 3.55e-6
    """Times half the sum of all squared weights, added to the loss; its gradient is not clipped. (Melis et al. clip
    the sum of both.)"""
    clip: float = 0.286
    """The largest norm of the loss's gradient, all weights together."""
    turn: int = 100
    """Steps between two looks at the validation text."""
    patience: int = 26
    """After so many turns without a better validation loss the rate is multiplied by ``decay``."""
    decay: float = 0.1
    """See ``patience``."""
    anneal: float = 0.0
    """In this last part of all steps, from 0 to 1, the rate goes to zero in a straight line."""
    stop: int = 30
    """After so many turns without a better validation loss training ends."""
    reset: float = 0.01
    """With this probability a stripe's state is set to zero before a segment, so that zero is a state to start from."""
    precision: str = "auto"
    """In which products are computed: "bfloat16", "float32", or "auto": bfloat16 where the device gains from it."""

    def __post_init__(self) -> None:
        for name in ("batch", "segment", "turn", "patience", "stop"):
            require_whole(name, getattr(self, name))
        for name in ("epochs", "rate", "clip"):
            require_number(name, getattr(self, name), above=0.0)
        for name in ("beta1", "beta2", "l2", "decay", "anneal", "reset"):
            require_number(name, getattr(self, name), low=0.0)
        if max(self.beta1, self.beta2) >= 1 or max(self.decay, self.anneal, self.reset) > 1:
            raise SettingError("beta1 and beta2 must be below 1, and decay, anneal and reset at most 1.")
        require_choice("precision", self.precision, ("auto", "bfloat16", "float32"))
