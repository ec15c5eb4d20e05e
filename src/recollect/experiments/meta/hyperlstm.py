"""Characters of Penn Treebank, Ha et al. (2017), Section 4.3: HyperLSTM beside LSTMs without a small LSTM."""

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from recollect.data import Corpus, penn_treebank
from recollect.experiments import plots
from recollect.experiments.meta.character_models import Carried, CharacterModel, bits_per_character, rows
from recollect.experiments.meta.training import train
from recollect.experiments.runner import Run, begin

# Ha et al. (2017), Table 3: bits per character of the test text, by 1000 units.
PAPER = {"lstm": 1.312, "ln-lstm": 1.267, "hyperlstm": 1.265, "ln-hyperlstm": 1.250}
TITLES = {
    "lstm": "LSTM",
    "ln-lstm": "layer-norm LSTM",
    "hyperlstm": "HyperLSTM",
    "ln-hyperlstm": "layer-norm HyperLSTM",
}
_COLORS = {"lstm": plots.GREEN, "ln-lstm": plots.ORANGE, "hyperlstm": plots.BLUE, "ln-hyperlstm": plots.NAVY}
_TIMED = 5  # batches
_BITS = "bits per character, part of validation"


@dataclass(frozen=True)
class Line:
    """A network, and how long it learns."""

    kind: str
    units: int
    batches: int
    """(Ours; at ``paper`` a hundred readings of the text.)"""


@dataclass(frozen=True)
class Scale:
    """How much is run. The numbers are the paper's where nothing is said."""

    lines: tuple[Line, ...]
    hyper: int = 128
    """Units of the small LSTM."""
    embedding: int = 4
    """N_z."""
    batch: int = 128
    """Places of the text that are read side by side."""
    length: int = 100
    """Characters of each in a batch; gradients go no further back."""
    rate: float = 1e-3
    """Of Adam."""
    last_rate: float = 1e-3
    """What that rate falls to in the course of the training, along a cosine. (Paper: it does not fall.)"""
    clip: float = 1.0
    """The largest norm of a gradient."""
    dropout: float = 0.1
    """Of what enters the cell."""
    every: int = 500
    """Batches between two looks at the validation text."""
    look: int = 50_000
    """Characters of the validation text that are looked at then. (Ours.)"""
    characters: int | None = None
    """Of each text; all when None."""
    rows: int = 64
    """Parts of a text that are judged side by side. (Ours.)"""
    seed: int = 0


_NETWORKS = ("ln-hyperlstm", "ln-lstm", "lstm")
_SMALL = (  # as many parameters for all, as much time for the first three, as many batches for the others
    Line("ln-hyperlstm", 256, 1500),
    Line("lstm", 300, 6000),
    Line("ln-lstm", 300, 2400),
    Line("lstm", 300, 1500),
    Line("ln-lstm", 300, 1500),
)
SCALES = {
    "smoke": Scale(
        tuple(Line(kind, 16, 3) for kind in _NETWORKS),
        hyper=8,
        batch=4,
        length=20,
        every=2,
        look=500,
        characters=2000,
        rows=8,
    ),
    "small": Scale(
        _SMALL,
        hyper=64,
        batch=32,
        rate=3e-3,
        last_rate=0.0,
        dropout=0.0,
        every=100,
    ),
    "paper": Scale(tuple(Line(kind, 1000, 40_000) for kind in TITLES)),
}


@dataclass(frozen=True)
class HyperLstmRun:
    """The next character of Penn Treebank: HyperLSTM, layer-norm LSTM and LSTM."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds), ``small`` (half an hour on one core) or ``paper`` (weeks)."""
    out: Path = Path("runs/hyperlstm")
    """The folder for results; a run that was stopped goes on there."""


def run(config: HyperLstmRun) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError: See ``recollect.data.penn_treebank``.
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
    """
    record, scale = begin(config, SCALES)
    study = _Study(record, scale)
    for line in scale.lines:
        if record.find(part="test", line=asdict(line)) is None:
            study.measure(line)
    return _report(record, scale)


class Texts(NamedTuple):
    """Characters by number."""

    train: Int[Tensor, " n"]
    valid: Int[Tensor, " m"]
    test: Int[Tensor, " k"]
    symbols: int
    """How many kinds there are."""


def characters(corpus: Corpus, most: int | None = None) -> Texts:
    """Returns texts as characters by number, in the order of their code points.

    Lines have no white space at their ends, and end with one character: of Penn Treebank 5,017,482, 393,042 and 442,423
    are left, of 50 kinds, as in the paper.

    Args:
        corpus: The files. The training text has all kinds of characters.
        most: How many characters of each text are kept; all when None.
    """
    texts = ["".join(f"{line.strip()}\n" for line in path.read_text("utf-8").splitlines()) for path in corpus]
    numbers = {symbol: number for number, symbol in enumerate(sorted(set(texts[0])))}
    encoded = (torch.tensor([numbers[symbol] for symbol in text[:most]]) for text in texts)
    return Texts(*encoded, symbols=len(numbers))


class _State:
    """What a network carries from batch to batch, as a part of a training that may be stopped."""

    def __init__(self, start: Carried) -> None:
        self.now = start

    def state_dict(self) -> dict[str, Any]:
        return self.now._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.now = type(self.now)(**state_dict)


class _Study:
    def __init__(self, record: Run, scale: Scale) -> None:
        self._record = record
        self._scale = scale

    @cached_property
    def _texts(self) -> Texts:
        return characters(penn_treebank(), self._scale.characters)

    def measure(self, line: Line) -> None:
        """Trains a network, and adds the rows of its cost and of its test."""
        scale = self._scale
        texts = self._texts
        g = torch.Generator().manual_seed(scale.seed)
        model = self._model(line, g)
        optimizer = torch.optim.Adam(model.parameters(), lr=scale.rate)
        schedule = CosineAnnealingLR(optimizer, line.batches, eta_min=scale.last_rate)
        state = _State(model.initial(scale.batch))
        side_by_side = rows(texts.train, scale.batch)
        batches = side_by_side.targets.shape[1] // scale.length  # in one reading of the text

        def step(number: int) -> float:
            start = (number - 1) % batches * scale.length
            if start == 0:
                state.now = model.initial(scale.batch)
            seen, targets = (part[:, start : start + scale.length] for part in side_by_side[:2])
            logits, state.now = model(seen, state.now, generator=g)
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), scale.clip)
            optimizer.step()
            schedule.step()
            key = {"part": "learning", "line": asdict(line), "batches": number}
            if number % scale.every == 0 and self._record.find(**key) is None:
                self._record.add(**key, bits=self._bits(model, texts.valid[: scale.look]))
            return loss.item()

        parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "state": state}
        run_of = {"line": asdict(line), **asdict(scale)}
        title = f"{TITLES[line.kind]}, {line.batches} batches"
        train(self._record.folder, title, parts, run=run_of, generator=g, steps=line.batches, step=step)
        row = {
            "valid": self._bits(model, texts.valid),
            "test": self._bits(model, texts.test),
            "seconds": self._seconds(model),
        }
        size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self._record.add(part="test", line=asdict(line), parameters=size, **row)

    def _model(self, line: Line, generator: torch.Generator) -> CharacterModel:
        scale = self._scale
        return CharacterModel(
            line.kind,
            self._texts.symbols,
            line.units,
            hyper=scale.hyper,
            embedding=scale.embedding,
            dropout=scale.dropout,
            generator=generator,
        )

    def _bits(self, model: CharacterModel, text: Int[Tensor, " n"]) -> float:
        return round(bits_per_character(model, text, count=self._scale.rows), 4)

    def _seconds(self, model: CharacterModel) -> float:
        """Returns the least processor time of a batch, forward and back."""
        seen = self._texts.train[: self._scale.length].expand(self._scale.batch, -1)
        times = []
        for _ in range(_TIMED):
            start = time.process_time()
            model(seen, model.initial(len(seen)))[0].square().mean().backward()
            times.append(time.process_time() - start)
        return round(min(times), 4)


def _report(record: Run, scale: Scale) -> str:
    head = ["network", "units", "parameters", "batches", "minutes", "validation", "test", "paper, 1000 units"]
    lines = [head, ["---"] * len(head)]
    by_batches: list[plots.Curve] = []
    by_minutes: list[plots.Curve] = []
    for line in scale.lines:
        row = record.find(part="test", line=asdict(line))
        if row is not None:
            minutes = row["seconds"] / 60  # of a batch
            cells = [TITLES[line.kind], str(line.units), f"{row['parameters']:,}", f"{line.batches:,}"]
            bits = [f"{row['valid']:.3f}", f"{row['test']:.3f}", f"{PAPER[line.kind]:.3f}"]
            lines.append([*cells, f"{line.batches * minutes:.1f}", *bits])
            shorter = any(other.kind == line.kind and other.batches > line.batches for other in scale.lines)
            by_batches.append(_curve(record, line, 1.0, shorter=shorter))
            by_minutes.append(_curve(record, line, minutes, shorter=shorter))
    intro = (
        "Bits per character of Penn Treebank. Minutes are those of one core: batches times the processor time of one, "
        "forward and back."
    )
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    table = f"## hyperlstm\n\n{intro}\n\n{body}\n"
    record.write_table(table)
    picture, panels = plots.grid(2, columns=2, width=5.6, height=4.4)
    for panel, curves, unit in zip(panels, (by_batches, by_minutes), ("batches", "minutes on one core"), strict=True):
        title = f"While learning, by {unit}"
        plots.draw(panel, curves, title=title, xlabel=unit, ylabel=_BITS, digits=3, beside=False)
    plots.save(picture, record.folder / "figure.png")
    return table


def _curve(record: Run, line: Line, unit: float, *, shorter: bool) -> plots.Curve:
    """Returns a line of the figure, at so many units of time for each batch; the shorter one of a kind is dashed."""
    found = [row for row in record.rows if row["part"] == "learning" and row["line"] == asdict(line)]
    x, y = [row["batches"] * unit for row in found], [row["bits"] for row in found]
    label = f"{TITLES[line.kind]}, {line.batches:,} batches"
    style = "--" if shorter else "-"
    return plots.Curve(label, x, y, [0.0] * len(y), _COLORS[line.kind], style=style)
