"""Digits, one of which the network has never seen: what ``recollect serve --demo`` serves."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recollect.adaptation import LocalAdaptation, rules
from recollect.data import Dataset, data_folder, digits, mnist
from recollect.heads import grow
from recollect.mbpa import MbPA
from recollect.memory import EpisodicMemory

UNSEEN = 9
_KEY = 128
_ROOM = 2  # outputs for classes of the user's own
_EACH = 5  # images of each known digit that the memory begins with


class Teachable(NamedTuple):
    """A trained network with an empty memory, and pictures to begin with."""

    encode: nn.Module
    layer: MbPA
    side: int
    """Pictures are ``side x side`` pixels."""
    known: Dataset
    """Some images of each digit that the network knows, for the memory."""
    samples: Dataset
    """One image of each digit, none of which it was trained on."""


def teachable(seed: int = 0) -> Teachable:
    """Trains a small network on all digits but the nine: MNIST where its files are at hand, else scikit-learn's digits.

    Neighbors, rate and steps are those that predict both the old digits and, from one to five images, the new one best
    on images that were not trained on.

    Raises:
        MissingExtraError: If there is neither MNIST nor scikit-learn.
        MissingDataError, FormatError: See ``mnist``.
    """
    generator = torch.Generator().manual_seed(seed)
    data = _data()
    rows = torch.randperm(len(data.labels), generator=generator)
    rest, train = data.take(rows[:200]), data.take(rows[200:12_200])
    side = round(train.inputs.shape[1] ** 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encode, head = _network(side), nn.Linear(_KEY, UNSEEN)
    _fit(encode, head, train.take((train.labels != UNSEEN).nonzero()[:, 0]), side, generator)
    memory = EpisodicMemory(capacity=1_000, key_size=_KEY)
    adaptation = LocalAdaptation(rules.sgd(0.1), steps=10)
    layer = MbPA(grow(head, UNSEEN + 1 + _ROOM), memory, neighbors=5, adaptation=adaptation)
    some = torch.cat([(train.labels == digit).nonzero()[:_EACH, 0] for digit in range(UNSEEN)])
    one = torch.cat([(rest.labels == digit).nonzero()[:1, 0] for digit in range(10)])
    return Teachable(encode, layer, side, train.take(some), rest.take(one))


def _data() -> Dataset:
    """Returns MNIST if its files are in the data folder, else the digits of scikit-learn; downloads nothing."""
    folder = data_folder()
    return mnist("train") if folder is not None and (folder / "mnist").is_dir() else digits()


def _network(side: int) -> nn.Module:
    """Returns pictures ``(b, side, side)`` -> keys ``(b, 128)``."""
    strides = (2, 2) if side > 16 else (1, 2)
    small = side // (strides[0] * strides[1])
    return nn.Sequential(
        nn.Unflatten(1, (1, side)),
        nn.Conv2d(1, 16, 5, stride=strides[0], padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=strides[1], padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * small * small, _KEY),
        nn.ReLU(),
        nn.LayerNorm(_KEY),
    )


def _fit(encode: nn.Module, head: nn.Module, train: Dataset, side: int, generator: torch.Generator) -> None:
    """Trains in place, on pictures that are moved about a little: nobody draws in the middle of the paper."""
    optimizer = torch.optim.Adam([*encode.parameters(), *head.parameters()], lr=2e-3)
    epochs = max(2, 12_000 // len(train.labels))
    most = side // 14
    for _ in range(epochs):
        for inputs, labels in train.batches(64, generator=generator):
            down, right = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
            moved = _moved(inputs.view(-1, side, side), down, right)
            optimizer.zero_grad()
            cross_entropy(head(encode(moved)), labels).backward()
            optimizer.step()
    encode.eval().requires_grad_(False)


def _moved(pictures: Float[Tensor, "b h w"], down: int, right: int) -> Float[Tensor, "b h w"]:
    return pictures.roll((down, right), (1, 2))  # the border of these pictures is empty
