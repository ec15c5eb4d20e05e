"""A network that knows half of the classes of Tiny-ImageNet, and what it says of all images: where Section 4.2 begins.

Weights and features lie in the cache folder under a name made of all settings, so that every table and figure uses the
same ones and none is made twice.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recollect import checkpoint
from recollect.data import ImageClasses, Images, cache_folder
from recollect.errors import NonFiniteError, SettingError, require_device
from recollect.experiments.runner import Progress
from recollect.memory.scan import multiplies_bfloat16
from recollect.models import ResNet

# Mean and standard deviation of Tiny-ImageNet's training pixels, red, green, blue.
_MEAN, _DEVIATION = (122.5, 114.3, 101.4), (70.5, 68.6, 71.8)
_VALID = 10  # every tenth training image, drawn once, is for the choice of settings


@dataclass(frozen=True)
class Recipe:
    """A network and its training."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    epochs: int = 16
    batch: int = 128
    rate: float = 0.2
    """The largest step size of gradient descent; it rises over a quarter of the steps, and falls to nothing."""
    momentum: float = 0.9
    decay: float = 5e-4
    """Weight decay, of weights but not of biases and normalization."""
    shift: int = 8
    """Pixels by which an image is moved at most, to any side; what is missing is reflected. Half are mirrored."""
    examples: int | None = None
    """Training images of each class, and half as many for the test; all when None."""


class Split(NamedTuple):
    """Which classes are new, and which training images are set aside for the choice of settings."""

    new: Bool[Tensor, " c"]
    train: Int[Tensor, " n"]
    """Rows of the training images."""
    valid: Int[Tensor, " m"]
    """The other rows of the training images, as many of every class."""


class Features(NamedTuple):
    """What the embedding network says of all images."""

    train: Float[Tensor, "n d"]
    test: Float[Tensor, "m d"]
    weight: Float[Tensor, "c d"]
    """The trained last layer."""
    bias: Float[Tensor, " c"]

    def head(self) -> nn.Linear:
        """Returns a new last layer, as training left it."""
        head = nn.Linear(self.weight.shape[1], self.weight.shape[0], device="meta").to_empty(device="cpu")
        head.load_state_dict({"weight": self.weight, "bias": self.bias})
        return head


def split(labels: Int[Tensor, " n"], classes: int, *, seed: int) -> Split:
    """Returns a random half of the classes as new, and a tenth of the training images of each class as validation.

    Args:
        labels: Of the training images.
        classes: How many there are.
        seed: Determines the classes; the validation images are the same for all seeds.
    """
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    new = torch.zeros(classes, dtype=torch.bool)
    new[order[classes // 2 :]] = True
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    place = torch.cat([torch.arange(count) for count in labels.bincount(minlength=classes).tolist()])
    return Split(new, by_class[place % _VALID != 0].sort().values, by_class[place % _VALID == 0].sort().values)


def reduced(data: ImageClasses, examples: int | None) -> ImageClasses:
    """Returns the first ``examples`` training images of each class and half as many test images; all for None."""
    if examples is None:
        return data
    parts = []
    for images, count in ((data.train, examples), (data.test, max(1, examples // 2))):
        size = len(images.labels) // len(data.names)
        rows = torch.arange(len(images.labels)).view(-1, size)[:, :count].flatten()
        parts.append(images.take(rows))
    return data._replace(train=parts[0], test=parts[1])


def prepared(pixels: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Returns images as the networks take them: centered, scaled, and with their channels last in memory."""
    mean, deviation = (torch.tensor(numbers, device=pixels.device) for numbers in (_MEAN, _DEVIATION))
    return ((pixels - mean) / deviation).permute(0, 3, 1, 2)


def moved(pixels: UInt8[Tensor, "b h w 3"], shift: int, generator: torch.Generator) -> UInt8[Tensor, "b h w 3"]:
    """Returns each image moved by up to ``shift`` pixels, what is missing reflected, and half of them mirrored."""
    places = []
    for side in pixels.shape[1:3]:
        offset = torch.randint(-shift, shift + 1, (len(pixels), 1), generator=generator)
        place = (torch.arange(side) + offset).abs()
        places.append(torch.where(place < side, place, 2 * (side - 1) - place))
    rows, columns = places
    mirrored = torch.rand(len(pixels), 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pixels[torch.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]


def settings(data: ImageClasses, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Returns what determines the features of a split."""
    some = torch.cat([images.pixels[::97].flatten() for images in (data.train, data.test)])
    return {"images": hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16], "split": seed, **asdict(recipe)}


def features(data: ImageClasses, recipe: Recipe, *, seed: int, device: str = "cpu") -> Features:
    """Returns the features of all images by a network trained on the old classes of a split, from the cache if there.

    Args:
        data: All images, as ``reduced`` by the recipe.
        recipe: The network and its training.
        seed: Of the split; also draws the initial weights and the order of the images.
        device: Where to train.

    Raises:
        DeviceError: If there is no such device.
        NonFiniteError: If the training diverges.
        SettingError: If there are fewer images of old classes than a batch has.
        FormatError: If a file in the cache is damaged.
    """
    place = require_device(device)
    run = settings(data, recipe, seed)
    file = _file("features", run)
    found = checkpoint.read(file, run=run)
    if found is None:
        net = trained(data, recipe, seed=seed, device=device)
        with Progress(1.0, f"split {seed}: features") as progress:
            parts = {}
            for name, images in (("train", data.train), ("test", data.test)):
                parts[name] = _embed(net, images, place, progress, len(data.train.labels) + len(data.test.labels))
        found = {**parts, "weight": net.fc.weight.detach().cpu(), "bias": net.fc.bias.detach().cpu()}
        checkpoint.write(file, found, run=run)
    return Features(**found)


def trained(data: ImageClasses, recipe: Recipe, *, seed: int, device: str = "cpu") -> ResNet:
    """Returns the network trained on the old classes of a split, from the cache if there.

    A training that was stopped goes on behind the last whole epoch.

    Raises:
        DeviceError, NonFiniteError, FormatError: See ``features``.
    """
    place = require_device(device)
    run = settings(data, recipe, seed)
    file = _file("network", run)
    net = ResNet(
        len(data.names), widths=recipe.widths, blocks=recipe.blocks, generator=torch.Generator().manual_seed(seed)
    ).to(place)
    parts = split(data.train.labels, len(data.names), seed=seed)
    old = data.train.take(parts.train[~parts.new[data.train.labels[parts.train]]])
    if len(old.labels) < recipe.batch or recipe.shift >= min(old.pixels.shape[1:3]):
        raise SettingError(
            f"{len(old.labels)} images of {tuple(old.pixels.shape[1:3])} pixels are too few or small for a batch of "
            f"{recipe.batch} and a shift of {recipe.shift}. Choose smaller ones."
        )
    steps = len(old.labels) // recipe.batch * recipe.epochs
    optimizer, schedule = _optimizer(net, recipe, steps)
    generator = torch.Generator().manual_seed(seed)
    done = 0
    saved = checkpoint.read(file, run=run)
    if saved is not None:
        net.load_state_dict(saved["network"])
        if saved["epochs"] < recipe.epochs:
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            generator.set_state(saved["generator"])
        done = saved["epochs"]
    with Progress(steps, f"split {seed}: training on {int((~parts.new).sum())} classes") as progress:
        progress.skip(done * (steps // recipe.epochs))
        for epoch in range(done, recipe.epochs):
            _epoch(net, old, recipe, optimizer, schedule, generator, progress)
            if not all(bool(tensor.isfinite().all()) for tensor in net.state_dict().values()):
                raise _diverged(recipe)
            state: dict[str, Any] = {"network": net.state_dict(), "epochs": epoch + 1}
            if epoch + 1 < recipe.epochs:
                state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                state["generator"] = generator.get_state()
            checkpoint.write(file, state, run=run)
    return net.eval()


def _file(kind: str, run: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "incremental" / f"{kind}-{name}.checkpoint"


def _diverged(recipe: Recipe) -> NonFiniteError:
    return NonFiniteError(f"the training diverged at a step size of {recipe.rate}. Try a smaller one.")


def _optimizer(
    net: nn.Module, recipe: Recipe, steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR]:
    weights = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": recipe.decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=recipe.rate, momentum=recipe.momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=steps, pct_start=0.25, div_factor=10.0, cycle_momentum=False
    )
    return optimizer, schedule


def _epoch(
    net: ResNet,
    images: Images,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    progress: Progress,
) -> None:
    place = net.fc.weight.device
    net.train()
    order = torch.randperm(len(images.labels), generator=generator)
    for rows in order[: len(order) // recipe.batch * recipe.batch].split(recipe.batch):
        batch = images.take(rows)
        pixels = moved(batch.pixels, recipe.shift, generator).to(place)
        with _fast(place):
            loss = cross_entropy(net(prepared(pixels)).float(), batch.labels.to(place))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        last = loss.item()
        if not math.isfinite(last):
            raise _diverged(recipe)
        progress.advance(1, f"{progress.title.partition(',')[0]}, loss {last:.2f}")


def _embed(net: ResNet, images: Images, place: torch.device, progress: Progress, total: int) -> Float[Tensor, "n d"]:
    parts = []
    with torch.inference_mode():
        for pixels in images.pixels.split(250):
            with _fast(place):
                parts.append(net.features(prepared(pixels.to(place))).float().cpu())
            progress.advance(len(pixels) / total)
    return torch.cat(parts)


def _fast(place: torch.device) -> torch.autocast:
    """Returns bfloat16 where the device multiplies it faster."""
    fast = multiplies_bfloat16(place) or (place.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(place.type, torch.bfloat16, enabled=fast)
