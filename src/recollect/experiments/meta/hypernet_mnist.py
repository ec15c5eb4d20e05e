"""MNIST of Ha et al. (2017), Section 4.1: a small network whose second kernel is generated, beside the ordinary one."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import CosineAnnealingLR

from recollect.data import Dataset, mnist
from recollect.experiments import plots
from recollect.experiments.meta.training import train
from recollect.experiments.runner import Run, begin
from recollect.meta import Hypernetwork

# Ha et al. (2017), Table 1: percent right, and the parameters of the second kernel.
PAPER = {"generated": (99.24, 4_244), "ordinary": (99.28, 12_544)}
TITLES = {"generated": "generated second kernel", "ordinary": "ordinary second kernel"}
_COLORS = {"generated": plots.NAVY, "ordinary": plots.GREEN}
_SIDE = 28
_SECOND = "3"  # the name of the second convolution
_PART = 250  # images that go through the network at once; larger parts do not stay in a processor's cache


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    epochs: int = 50
    """(Official notebook.)"""
    train: int = 55_000
    """Images to learn from."""
    valid: int = 5_000
    """Images held out of the training set."""
    test: int = 10_000
    batch: int = 1000
    """(Paper.)"""
    rate: float = 5e-3
    """Of Adam; it falls to 0 along a cosine. (Paper: 1e-3; official notebook: 5e-3, times 0.999 with each batch.)"""
    embedding: int = 4
    """N_z. (Paper.)"""
    seed: int = 0


SCALES = {"smoke": Scale(1, train=600, valid=300, test=300, batch=100), "small": Scale(), "paper": Scale()}


@dataclass(frozen=True)
class HypernetMnist:
    """MNIST: two convolutions, the second kernel learned or generated from four numbers."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds) or ``small`` (twenty minutes on one core), which is the paper's."""
    out: Path = Path("runs/hypernet-mnist")
    """The folder for results; a run that was stopped goes on there."""


class Split(NamedTuple):
    """Which images are for what."""

    train: Dataset
    valid: Dataset
    test: Dataset


def run(config: HypernetMnist) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError: See ``recollect.data.mnist``.
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
    """
    record, scale = begin(config, SCALES)
    study = _Study(record, scale)
    for kind in TITLES:
        if record.find(part="test", kind=kind) is None:
            study.measure(kind)
    return _report(record)


def network(kind: str, *, embedding: int = 4, generator: torch.Generator) -> nn.Module:
    """Returns the paper's network: 21,210 parameters, or 12,910 with a generated kernel.

    Source of the initial values: hardmaru/supercell, the MNIST notebook: kernels truncated normal with deviation 0.01,
    biases zero, the last layer orthogonal.
    """
    kernels = [nn.Conv2d(channels, 16, 7, padding="same", device="meta") for channels in (1, 16)]
    last = nn.Linear(16 * (_SIDE // 4) ** 2, 10, device="meta")
    layers: list[nn.Module] = []
    for kernel in kernels:
        layers += (kernel.to_empty(device="cpu"), nn.ReLU(), nn.MaxPool2d(2))
        nn.init.trunc_normal_(kernel.weight, std=0.01, a=-0.02, b=0.02, generator=generator)
    net = nn.Sequential(*layers, nn.Flatten(), last.to_empty(device="cpu"))
    nn.init.orthogonal_(last.weight, generator=generator)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    if kind == "ordinary":
        return net
    return Hypernetwork(net, layers=(_SECOND,), embedding=embedding, generator=generator)


def second_kernel(net: nn.Module) -> tuple[Float[Tensor, "16 16 7 7"], int]:
    """Returns the second kernel of a network, and of how many parameters it is made."""
    if isinstance(net, Hypernetwork):
        made_by = (net.embeddings, *net.inner.parameters(), *net.outer.parameters())
        return net.kernels()[_SECOND].detach(), _count(made_by)
    weight = net.get_parameter(f"{_SECOND}.weight")
    return weight.detach(), weight.numel()


def cropped(images: Float[Tensor, "n 1 h w"], *, generator: torch.Generator) -> Float[Tensor, "n 1 h w"]:
    """Returns each image with a border of one pixel, cut to its old size at random: moved by a pixel or not."""
    rows, columns = images.shape[2:]
    windows = pad(images, (1, 1, 1, 1)).unfold(2, rows, 1).unfold(3, columns, 1)
    down, right = torch.randint(3, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, down, right]


class _Study:
    def __init__(self, record: Run, scale: Scale) -> None:
        self._record = record
        self._scale = scale

    @cached_property
    def _data(self) -> Split:
        scale, known = self._scale, mnist("train")
        g = torch.Generator().manual_seed(scale.seed)
        rows = torch.randperm(len(known.labels), generator=g)[: scale.train + scale.valid]
        learned, held = rows.split((scale.train, scale.valid))
        return Split(known.take(learned), known.take(held), mnist("test").take(slice(scale.test)))

    def measure(self, kind: str) -> None:
        """Trains a network, and adds the row of its test."""
        scale, data = self._scale, self._data
        g = torch.Generator().manual_seed(scale.seed)
        net = network(kind, embedding=scale.embedding, generator=g)
        optimizer = torch.optim.Adam(net.parameters(), lr=scale.rate)
        batches = scale.epochs * math.ceil(scale.train / scale.batch)
        schedule = CosineAnnealingLR(optimizer, batches)

        def epoch(number: int) -> float:
            total = 0.0
            for batch in data.train.batches(scale.batch, generator=g):
                optimizer.zero_grad()
                for images, labels in _parts(batch):
                    outputs = net(cropped(images, generator=g))
                    loss = cross_entropy(outputs, labels, reduction="sum") / len(batch.labels)
                    loss.backward()
                    total += loss.item() * len(batch.labels) / scale.train
                optimizer.step()
                schedule.step()
            key = {"part": "learning", "kind": kind, "epochs": number}
            if self._record.find(**key) is None:
                wrong = 100 - _accuracy(net, data.valid)
                self._record.add(**key, loss=round(total, 5), error=round(wrong, 2))
            return total

        parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
        run_of = {"kind": kind, **asdict(scale)}
        train(self._record.folder, TITLES[kind], parts, run=run_of, generator=g, steps=scale.epochs, step=epoch)
        kernel, size = second_kernel(net)
        accuracy = round(_accuracy(net, data.test), 2)
        row = {"parameters": _count(net.parameters()), "second": size, "kernel": (1000 * kernel).round().int().tolist()}
        self._record.add(part="test", kind=kind, accuracy=accuracy, images=scale.test, **row)


def _parts(some: Dataset) -> Iterator[tuple[Float[Tensor, "n 1 h w"], Int[Tensor, " n"]]]:
    for part in some.batches(_PART):
        yield part.inputs.view(-1, 1, _SIDE, _SIDE), part.labels


@torch.inference_mode()
def _accuracy(net: nn.Module, some: Dataset) -> float:
    """Returns how many images are named rightly, in percent."""
    right = [(net(images).argmax(1) == labels).sum().item() for images, labels in _parts(some)]
    return 100 * sum(right) / len(some.labels)


def _count(parameters: Iterator[nn.Parameter] | tuple[nn.Parameter, ...]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _report(record: Run) -> str:
    head = ["network", "", "parameters of the second kernel", "parameters in all", "right (%)"]
    lines = [head, ["---"] * len(head)]
    tests = [row for row in record.rows if row["part"] == "test"]
    for row in tests:
        share = row["accuracy"] / 100
        margin = 196 * math.sqrt(share * (1 - share) / row["images"])
        right, size = PAPER[row["kind"]]
        cells = [f"{row['second']:,}", f"{row['parameters']:,}", f"{row['accuracy']:.2f} +- {margin:.2f}"]
        lines += [[TITLES[row["kind"]], "ours", *cells], ["", "paper", f"{size:,}", "", f"{right:.2f}"]]
    intro = "Test images named rightly, after the last epoch; 95 % intervals over images."
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    table = f"## hypernet-mnist\n\n{intro}\n\n{body}\n"
    record.write_table(table)
    _picture(record, {row["kind"]: torch.tensor(row["kernel"]) / 1000 for row in tests})
    return table


def _picture(record: Run, kernels: dict[str, Float[Tensor, "o i f f"]]) -> None:
    picture, panels = plots.grid(1 + len(kernels), columns=3, width=4.8, height=4.8)
    curves = []
    for kind, panel in zip(kernels, panels, strict=False):
        plots.mosaic(panel, kernels[kind], title=TITLES[kind])
        rows = [row for row in record.rows if row["part"] == "learning" and row["kind"] == kind]
        x, y = ([row[name] for row in rows] for name in ("epochs", "error"))
        curves.append(plots.Curve(TITLES[kind], x, y, [0.0] * len(y), _COLORS[kind]))
    plots.draw(
        panels[-1],
        curves,
        title="While learning",
        xlabel="epochs",
        ylabel="validation error (%)",
        digits=2,
        beside=False,
    )
    plots.save(picture, record.folder / "figure.png")
