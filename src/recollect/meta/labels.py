"""Labels that are shown one step late: their codes, their likelihood, and how good the k-th guess at a class is."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from recollect.errors import DtypeError, LabelError, SettingError, ShapeError, require_tensor, require_whole

_FEW = 4096  # up to so many labels are drawn by a number for each, of which the largest are taken
_MOST = 2**63 - 1  # the largest label of int64


@dataclass(frozen=True)
class Labels:
    """Labels as strings of letters, each letter a one-hot code; with one letter, the usual one-hot labels.

    A label is a whole number from 0: its letters are its digits in base ``alphabet``. The network predicts each letter
    by a softmax of its own.

    Paper: Santoro et al. (2016): ``Labels(5)`` are the one-hot labels of Table 1, ``Labels(5, letters=5)`` the strings
    of Table 2: five letters from a to e, 25 numbers, 3125 labels.

    Args:
        alphabet: The number of different letters.
        letters: The letters of a label.

    Raises:
        SettingError: If a number is not a positive whole number, or a label could be beyond int64.

    Example:
        >>> labels = Labels(5, letters=2)
        >>> labels.encode(torch.tensor(7))  # "bc": 7 = 1 * 5 + 2
        tensor([0., 1., 0., 0., 0., 0., 0., 1., 0., 0.])
        >>> labels.predict(labels.encode(torch.tensor(7)))
        tensor(7)
    """

    alphabet: int
    letters: int = 1

    def __post_init__(self) -> None:
        require_whole("alphabet", self.alphabet)
        require_whole("letters", self.letters)
        # The logarithm first: the power of a far too large number of letters takes long.
        if self.letters * math.log2(self.alphabet) > 64 or self.count > _MOST:
            raise SettingError(
                f"labels are int64, but {self.letters} letters of {self.alphabet} make 2**63 or more. Use fewer."
            )

    @property
    def count(self) -> int:
        """The number of different labels."""
        return self.alphabet**self.letters

    @property
    def size(self) -> int:
        """The length of a code, and of the network's output."""
        return self.alphabet * self.letters

    def draw(self, episodes: int, classes: int, *, generator: torch.Generator | None = None) -> Int[Tensor, "b c"]:
        """Returns a label for each class of each episode, on the CPU, drawn at random; within an episode all differ.

        Args:
            episodes: The number of episodes.
            classes: The number of classes in each.
            generator: Draws the labels; torch's global random state does when None.

        Raises:
            SettingError: If there are more classes than labels.
        """
        require_whole("episodes", episodes)
        require_whole("classes", classes)
        if classes > self.count:
            raise SettingError(
                f"{classes} classes need as many labels, but {self.letters} letters of {self.alphabet} make only "
                f"{self.count}. Use fewer classes or more letters."
            )
        if self.count <= max(_FEW, 2 * classes):
            return torch.rand(episodes, self.count, generator=generator).topk(classes).indices
        # Of so many labels few are drawn twice: draw those again. No label is preferred, so all draws are as likely.
        labels = torch.randint(self.count, (episodes, classes), generator=generator)
        while True:
            ordered, places = labels.sort(dim=1, stable=True)
            twice = torch.zeros_like(labels, dtype=torch.bool)
            twice.scatter_(1, places[:, 1:], ordered[:, 1:] == ordered[:, :-1])
            again = int(twice.sum())
            if again == 0:
                return labels
            labels[twice] = torch.randint(self.count, (again,), generator=generator)

    def encode(self, labels: Int[Tensor, "*n"]) -> Float[Tensor, "*n s"]:
        """Returns the codes of labels: a one-hot code for each letter, one after the other.

        Raises:
            LabelError, DtypeError: If a label is not a whole number from 0 to ``count - 1``.
        """
        return one_hot(self._letters(labels), self.alphabet).flatten(-2).to(torch.get_default_dtype())

    def log_prob(self, logits: Float[Tensor, "*n s"], labels: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Returns the log-probability of labels: the sum over their letters. Its mean, negated, is the loss.

        Args:
            logits: The network's outputs.
            labels: The labels.

        Raises:
            LabelError, DtypeError: If a label is not a whole number from 0 to ``count - 1``.
            ShapeError: If the last dimension of the logits is not ``size``, or there is not one label for each.
        """
        letters, logits = self._letters(labels), self._split(logits)
        if letters.shape != logits.shape[:-1]:
            raise ShapeError(
                f"each row of the logits needs a label: got logits for {(*logits.shape[:-2],)} and labels of shape "
                f"{(*labels.shape,)}."
            )
        return logits.log_softmax(-1).gather(-1, letters.unsqueeze(-1)).sum((-2, -1))

    def predict(self, logits: Float[Tensor, "*n s"]) -> Int[Tensor, "*n"]:
        """Returns the most probable labels: a guess is right (``== labels``) if all of its letters are.

        Raises:
            ShapeError: If the last dimension of the logits is not ``size``.
        """
        letters = self._split(logits).argmax(-1)
        return (letters * letters.new_tensor(self._places)).sum(-1)

    @property
    def _places(self) -> list[int]:
        return [self.alphabet**place for place in reversed(range(self.letters))]

    def _letters(self, labels: Tensor) -> Int[Tensor, "*n l"]:
        _check_labels("labels", labels)
        if labels.numel():
            low, high = (int(end) for end in labels.aminmax())
            if low < 0 or high >= self.count:
                raise LabelError(
                    f"labels are numbered from 0 to {self.count - 1} ({self.letters} letters of {self.alphabet}), got "
                    f"{low if low < 0 else high}."
                )
        labels = labels.long().unsqueeze(-1)
        return labels // labels.new_tensor(self._places) % self.alphabet

    def _split(self, logits: Tensor) -> Float[Tensor, "*n l a"]:
        require_tensor("logits", logits)
        if logits.dim() == 0 or logits.shape[-1] != self.size:
            raise ShapeError(
                f"logits must have {self.letters} * {self.alphabet} = {self.size} numbers in their last dimension, got "
                f"shape {(*logits.shape,)}. Make the network with outputs=labels.size."
            )
        return logits.unflatten(-1, (self.letters, self.alphabet))


def offset(inputs: Float[Tensor, "b t d"], codes: Float[Tensor, "b t s"]) -> Float[Tensor, "b t i"]:
    """Returns a task as the network sees it: ``(x_t, y_{t-1})``, the label of an input with the input after it.

    Paper: Santoro et al. (2016), Section 2: the network must hold ``x_t`` until its label comes, then bind the two.
    With the first input come zeros.

    Args:
        inputs: The inputs of ``b`` episodes, in order.
        codes: The codes of their labels; see ``Labels.encode``.

    Raises:
        ShapeError: If there is not one code for each input.

    Example:
        >>> offset(torch.tensor([[[5.0], [6.0]]]), Labels(2).encode(torch.tensor([[1, 0]])))
        tensor([[[5., 0., 0.],
                 [6., 0., 1.]]])
    """
    require_tensor("inputs", inputs)
    require_tensor("codes", codes)
    if inputs.dim() != 3 or codes.dim() != 3 or inputs.shape[:2] != codes.shape[:2] or inputs.shape[1] == 0:
        raise ShapeError(
            "inputs and codes must have shapes (episodes, steps, numbers), with one code for each input and at least "
            f"one step, got {(*inputs.shape,)} and {(*codes.shape,)}."
        )
    late = torch.cat([torch.zeros_like(codes[:, :1]), codes[:, :-1]], 1)
    return torch.cat([inputs, late.to(inputs)], 2)


def instances(labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Returns for each step which presentation of its class it is: 1 where the episode shows the class first.

    Raises:
        ShapeError, DtypeError: If ``labels`` are no whole numbers of shape ``(episodes, steps)``.

    Example:
        >>> instances(torch.tensor([[3, 1, 3, 3, 1]]))
        tensor([[1, 1, 2, 3, 2]])
    """
    _check_labels("labels", labels)
    if labels.dim() != 2:
        raise ShapeError(f"labels must have shape (episodes, steps), got {(*labels.shape,)}.")
    return (labels.unsqueeze(2) == labels.unsqueeze(1)).tril().sum(2)


def by_instance(predictions: Int[Tensor, "b t"], labels: Int[Tensor, "b t"]) -> Float[Tensor, "k"]:
    """Returns the accuracy at the 1st, 2nd, ... k-th presentation of a class, over all classes of all episodes.

    Paper: Santoro et al. (2016), Tables 1 and 2, "% correct by instance". A class that is shown less often than others
    counts as far as it goes; k is the most that a class of these episodes is shown.

    Args:
        predictions: The predicted labels; see ``Labels.predict``.
        labels: The true ones.

    Raises:
        ShapeError, DtypeError: If both are not whole numbers of the same shape ``(episodes, steps)``.

    Example:
        >>> labels = torch.tensor([[3, 1, 3, 3, 1]])
        >>> by_instance(torch.tensor([[0, 1, 3, 3, 0]]), labels)
        tensor([0.5000, 0.5000, 1.0000])
    """
    number = instances(labels)
    _check_labels("predictions", predictions)
    if predictions.shape != labels.shape:
        raise ShapeError(
            f"each label needs a prediction: got {(*labels.shape,)} labels and {(*predictions.shape,)} predictions. "
            "Use Labels.predict(logits)."
        )
    shown = number.flatten().bincount()[1:]
    right = number[predictions == labels].bincount(minlength=len(shown) + 1)[1:]
    return right / shown


def _check_labels(name: str, labels: Tensor) -> None:
    require_tensor(name, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DtypeError(f"{name} must be whole numbers, got {labels.dtype}. Use .long().")
