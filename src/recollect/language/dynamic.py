"""Dynamic evaluation: all of a language model's weights follow the text while it is read.

Source: Krause et al. 2017, with the RMS statistics of the training text. After each segment has been scored,

    W <- W + decay * D * (W0 - W) - rate * g / (RMS + epsilon),      D = min(RMS / mean(RMS), 1 / decay)

with g the gradient of the segment's mean loss. The division by mean(RMS) makes ``decay`` a number that suits any
model; as in Krause's code it is the mean over the weight tensors of their means, and not over all weights.
"""

from collections.abc import Iterable
from itertools import islice
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recollect.errors import SettingError, ShapeError, require_number, require_whole
from recollect.language.evaluate import check_words
from recollect.language.loss import linear_cross_entropy
from recollect.language.model import LanguageModel
from recollect.language.train import segments, stripe

_CHUNK = 2**17  # weights that are changed at once: what belongs to them stays in the cache


def gradient_statistics(
    lm: LanguageModel,
    tokens: Int[Tensor, " n"],
    *,
    batch: int = 100,
    segment: int = 5,
    batches: int | None = None,
) -> dict[str, Tensor]:
    """Returns the root mean square of each weight's gradient over the training text, by the weight's name.

    Source: Krause et al.'s code: batches of 100 stripes and 5 words, the gradient of their mean loss, no dropout.

    Args:
        lm: The trained model; it is left as it is. Of frozen weights there are no statistics.
        tokens: Its training text.
        batch: Stripes that are read side by side.
        segment: Words of each stripe in one batch.
        batches: How many batches, from the beginning of the stripes; all when None.

    Raises:
        ShapeError: If the text is too short.
        SettingError: If a number is no positive whole one, or all weights are frozen.
        LabelError: If a word is not in the model's vocabulary.

    Example:
        >>> from recollect.language import LSTMModel, gradient_statistics
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> statistics = gradient_statistics(lm, torch.tensor([1, 2, 3] * 20), batch=2)
        >>> statistics["decoder.1.weight"].shape
        torch.Size([10, 4])
    """
    for name, value in (("batch", batch), ("segment", segment), ("batches", 1 if batches is None else batches)):
        require_whole(name, value)
    parameters = _movable(lm)
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    state: Any = None
    count = 0
    for words, targets in islice(segments(stripe(tokens, batch), segment), batches):
        with torch.enable_grad():
            hidden, state = lm.hidden(words, state)
            loss = _mean_loss(lm, hidden.flatten(0, 1), targets.flatten())
        for square, gradient in zip(squares.values(), _gradients(loss, parameters.values()), strict=True):
            square.addcmul_(gradient, gradient)
        count += 1
    return {name: square.div_(count).sqrt_() for name, square in squares.items()}


class DynamicEvaluation:
    """Lets a language model's weights follow the text that it reads, and puts them back at the end.

    ``hidden`` takes the place of the model's own, and ``learn`` is told each segment once it has been scored::

        with DynamicEvaluation(lm, statistics, rate=5e-5, decay=2e-3) as dynamic:
            result = evaluate(dynamic.hidden, Parametric(lm.decoder), None, tokens, block=5, after=dynamic.learn)

    Frozen weights stay as they are, and one that is tied moves once. The number of words that are learned at once is
    the caller's, ``block=`` of ``evaluate``; rate and decay below are for 5 of them, for others Krause's code has both
    times length / 5.

    Args:
        lm: The model. While the ``with`` block lasts its weights change in place.
        statistics: From ``gradient_statistics``, once for each model.
        rate: Step size for one segment. (Krause's code: 5e-5.)
        decay: How strongly the weights are pulled back to where they were, lambda. (Krause's code: 2e-3.)
        epsilon: Added to the RMS. (Krause's code: 2e-5.)

    Raises:
        SettingError: If a number is negative or ``epsilon`` not above 0, or the statistics are of another model, hold
            what is no finite number, or only zeros.

    Example:
        >>> from recollect import Parametric
        >>> from recollect.language import DynamicEvaluation, LSTMModel, evaluate, gradient_statistics
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> text = torch.tensor([1, 2, 3] * 20)
        >>> statistics = gradient_statistics(lm, text, batch=2)
        >>> alone = evaluate(lm.hidden, Parametric(lm.decoder), None, text)
        >>> with DynamicEvaluation(lm, statistics, rate=1e-2) as dynamic:
        ...     result = evaluate(dynamic.hidden, Parametric(lm.decoder), None, text, block=5, after=dynamic.learn)
        >>> result.perplexity < alone.perplexity
        True
    """

    def __init__(
        self,
        lm: LanguageModel,
        statistics: dict[str, Tensor],
        *,
        rate: float = 5e-5,
        decay: float = 2e-3,
        epsilon: float = 2e-5,
    ) -> None:
        require_number("rate", rate, low=0.0)
        require_number("decay", decay, low=0.0)
        require_number("epsilon", epsilon, above=0.0)
        parameters = _movable(lm)
        _check_statistics(parameters, statistics)
        self._lm = lm
        self._parameters = list(parameters.values())
        rms = {name: statistics[name].to(p) for name, p in parameters.items()}
        mean = torch.stack([part.mean() for part in rms.values()]).mean()
        if not bool(mean > 0):
            raise SettingError("these statistics are all zero. Make them of a text: gradient_statistics(lm, tokens).")
        self._moves = [
            _Move(p, rms[name], mean, rate=rate, decay=decay, epsilon=epsilon) for name, p in parameters.items()
        ]
        self._outputs: Tensor | None = None

    def __enter__(self) -> "DynamicEvaluation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reset()

    def reset(self) -> None:
        """Puts the weights back to where they were in the beginning."""
        self._outputs = None
        for move in self._moves:
            move.back()

    def hidden(self, tokens: Int[Tensor, "1 t"], state: Any = None) -> tuple[Float[Tensor, "1 t d"], Any]:
        """Returns what ``lm.hidden`` returns, and remembers the way there until ``learn``."""
        with torch.enable_grad():
            self._outputs, state = self._lm.hidden(tokens, state)
        return self._outputs.detach(), state

    def learn(self, targets: Int[Tensor, " t"]) -> None:
        """Moves the weights by the words that have come after those of the last call of ``hidden``.

        Raises:
            ShapeError: If ``hidden`` was not called with as many words just before.
            LabelError: If a word is not in the model's vocabulary.
        """
        outputs, self._outputs = self._outputs, None
        if outputs is None or outputs.shape[:2] != (1, len(targets)):
            before = "no words" if outputs is None else f"words of shape {tuple(outputs.shape[:2])}"
            raise ShapeError(
                f"learn needs the words that come after those of the last call of hidden, once: got {len(targets)} "
                f"after {before}. Is it told each segment, as evaluate(..., after=dynamic.learn) does?"
            )
        with torch.enable_grad():
            loss = _mean_loss(self._lm, outputs[0], targets)
        for move, gradient in zip(self._moves, _gradients(loss, self._parameters), strict=True):
            move.step(gradient)


class _Move:
    """One weight tensor, and how it moves."""

    def __init__(
        self, weight: nn.Parameter, rms: Tensor, mean: Tensor, *, rate: float, decay: float, epsilon: float
    ) -> None:
        self._weight = weight.data.view(-1)
        self._start = self._weight.clone()
        self._pull = (rms / mean * decay).clamp_(max=1.0).view(-1)
        self._scale = (rate / (rms + epsilon)).view(-1)

    def step(self, gradient: Tensor) -> None:
        parts = (
            part.split(_CHUNK) for part in (self._weight, self._start, self._pull, gradient.reshape(-1), self._scale)
        )
        for weight, start, pull, some, scale in zip(*parts, strict=True):
            weight.lerp_(start, pull).addcmul_(some, scale, value=-1)

    def back(self) -> None:
        self._weight.copy_(self._start)


def _movable(lm: LanguageModel) -> dict[str, nn.Parameter]:
    """Returns the weights that are not frozen."""
    found = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    if not found:
        raise SettingError("all weights of this model are frozen. Call requires_grad_() on those that are to move.")
    return found


def _gradients(loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Returns a gradient for each weight: zero for what the text does not pass, such as an idle expert."""
    weights = list(parameters)
    if not loss.requires_grad:
        raise SettingError(
            "the text passes none of the weights that may move. Call requires_grad_() on some that it does."
        )
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(weights, found, strict=True)]


def _check_statistics(parameters: dict[str, nn.Parameter], statistics: dict[str, Tensor]) -> None:
    if {k: p.shape for k, p in parameters.items()} != {k: s.shape for k, s in statistics.items()}:
        raise SettingError("these statistics are of another model. Make them anew: gradient_statistics(lm, tokens).")
    for name, part in statistics.items():
        if not bool((part.isfinite() & (part >= 0)).all()):
            raise SettingError(
                f"the statistics of {name} hold what is no root mean square: numbers that are negative, NaN or "
                "infinite. Does the model predict the training text without NaN?"
            )


def _mean_loss(lm: LanguageModel, hidden: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    layer = lm.output
    check_words(targets, layer.out_features)
    bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)
    return linear_cross_entropy(lm.inputs(hidden), layer.weight, bias, targets)
