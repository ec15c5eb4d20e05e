"""``recollect lm train`` and ``recollect lm evaluate``: a language model of a user's own text files.

Training ends with a choice: what settings of cache and MbPA suit the validation text best goes into the model's file,
and evaluation reads any text with them.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recollect import Parametric, checkpoint
from recollect.errors import MissingDataError
from recollect.experiments.language_models import Size, Text, trained
from recollect.experiments.runner import Progress, Run
from recollect.language import (
    CacheGrid,
    Evaluation,
    LSTMModel,
    MbPAGrid,
    Schedule,
    Vocabulary,
    blocks,
    evaluate,
    interval,
    read,
    score,
)
from recollect.language.choose import Choice, choose, keys_of, predictor
from recollect.language.settings import CacheSetting, MbPASetting

_FORMAT = {"format": "recollect language model 1"}
_KEY = "input"  # what neighbors are searched by: smaller than the hidden state, and as good or better
_CACHE = CacheGrid(sizes=(100, 500, 1000, 5000), flatness=(0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0))
_MBPA = (
    MbPAGrid(sizes=(1000, 5000), neighbors=(8, 32, 128), rates=(0.5, 2.0, 8.0)),
    MbPAGrid(sizes=(1000,), neighbors=(8,), rates=(0.2, 0.4), steps=(5, 10)),
)
_BYTES = 5.5  # of a word and the space behind it, about: for the time left
_PIECE = 2**18  # words of a text that are held at a time


@dataclass(frozen=True)
class Train:
    """Trains a language model on a text file, one sentence or paragraph on each line."""

    text: Path
    """The training text: words with white space between them, UTF-8 unless --encoding says otherwise."""
    valid: Path
    """The validation text, which is no part of the training text."""
    out: Path = Path("runs/lm")
    """The folder for the model; a training that was stopped goes on there."""
    epochs: float = 10.0
    """Passes over the training text."""
    hidden_size: int = 650
    """Units of the LSTM."""
    embedding_size: int = 256
    """Units of the embedding."""
    dropout: float = 0.4
    """On the embeddings and the outputs; half of it on the state."""
    max_vocabulary: int = 50_000
    """The rarest words beyond this number become <unk>."""
    min_count: int = 2
    """Words that occur less often become <unk>."""
    batch: int = 64
    """Stripes of the text that are read side by side; fewer for a short text."""
    rate: float = 0.003
    """Adam's step size."""
    tune: int = 20_000
    """Words of the validation text by which cache and MbPA are chosen."""
    seed: int = 0
    """Determines the initial weights and the dropout."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    encoding: str = "utf-8"
    """Of both files."""


@dataclass(frozen=True)
class Evaluate:
    """Reads a text file with a model that learns from it word by word, and says what each way of learning is worth."""

    text: Path
    """The text."""
    model: Path = Path("runs/lm")
    """The folder of ``recollect lm train``."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    encoding: str = "utf-8"
    """Of the text."""


def run(config: Train | Evaluate) -> str:
    """Trains or evaluates, and returns a table.

    Raises:
        MissingDataError, FormatError: If a file is not there, empty, damaged or in another encoding.
        SettingError: If a setting is out of range.
    """
    return _train(config) if isinstance(config, Train) else _evaluate(config)


def _train(config: Train) -> str:
    vocabulary = Vocabulary.build(
        config.text, min_count=config.min_count, max_size=config.max_vocabulary, encoding=config.encoding
    )
    train, valid = (vocabulary.encode(file, encoding=config.encoding) for file in (config.text, config.valid))
    size = Size(config.hidden_size, config.embedding_size, config.dropout, config.dropout / 2, config.dropout)
    batch = max(1, min(config.batch, len(train) // 100))
    turn = max(1, min(200, len(train) // (batch * 35)))
    schedule = Schedule(
        epochs=config.epochs, batch=batch, rate=config.rate, turn=turn, patience=4, decay=0.3, anneal=0.3
    )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    record = Run(config.out, {**settings, "words": len(train)})
    text = Text(vocabulary, train, valid, valid)
    lm = trained(record, text, size, schedule, seed=config.seed, device=config.device)
    tokens = valid[: config.tune].to(config.device)
    with Progress(len(tokens), "choosing cache and MbPA") as progress:
        readings = read(lm, tokens, first=vocabulary.end, key=_KEY)
        scores = score(readings, _CACHE, _MBPA, watch=progress.advance)
    choice = choose(scores, _CACHE.points(), [point for grid in _MBPA for point in grid.points()])
    state = {"model": lm.state_dict(), "vocabulary": vocabulary.to_state(), "size": asdict(size)}
    checkpoint.write(config.out / "model", {**state, "choice": _as_lists(choice)}, run=_FORMAT)
    base = float(-scores.model.log().double().mean())
    lines = [
        f"{len(train):,} training words, {len(vocabulary):,} different ones; validation text:",
        "",
        *_head(),
        f"| model | {math.exp(base):.1f} | |",
        f"| + cache | {math.exp(choice.cache_loss):.1f} | {choice.cache_loss - base:+.3f} |",
        f"| + MbPA | {math.exp(choice.mbpa_loss):.1f} | {choice.mbpa_loss - base:+.3f} |",
        f"| + cache + MbPA | {math.exp(choice.loss):.1f} | {choice.loss - base:+.3f} |",
    ]
    table = "\n".join(lines) + "\n"
    record.write_table(table)
    return table


def _head() -> list[str]:
    return ["| | perplexity | nats per word |", "|---|---|---|"]


def _evaluate(config: Evaluate) -> str:
    lm, vocabulary, choice = _load(config.model, config.device)
    mixture, memories = predictor(lm, choice, key=_KEY)
    found: dict[str, Evaluation] = {}
    for name, output, written in (("model", Parametric(lm.output), None), ("+ cache + MbPA", mixture, memories)):
        pieces = vocabulary.encode_blocks(config.text, _PIECE, encoding=config.encoding)
        size = config.text.stat().st_size if config.text.is_file() else 0  # what is no file, the vocabulary refuses
        with Progress(max(1.0, size / _BYTES), name) as progress:
            on_device = (piece.to(config.device) for piece in pieces)
            hidden, first = keys_of(lm, _KEY), vocabulary.end
            found[name] = evaluate(hidden, output, written, on_device, first=first, watch=progress.advance)
    base = found["model"].nats
    lines = [
        f"{len(base):,} words of {config.text}",
        "",
        "| | perplexity | nats (95 %) | words/s |",
        "|---|---|---|---|",
    ]
    for name, result in found.items():
        gain = interval(result.nats - base, blocks(len(base)))
        change = "" if name == "model" else f"{gain.mean:+.3f} +- {gain.half_width:.3f}"
        lines.append(f"| {name} | {result.perplexity:.1f} | {change} | {result.tokens_per_second:.0f} |")
    return "\n".join(lines) + "\n"


def _load(folder: Path, device: str) -> tuple[LSTMModel, Vocabulary, Choice]:
    state = checkpoint.read(folder / "model", run=_FORMAT)
    if state is None:
        raise MissingDataError(f"{folder} holds no language model. Make one: recollect lm train --out {folder} ...")
    vocabulary = Vocabulary.from_state(state["vocabulary"])
    lm = LSTMModel(len(vocabulary), **state["size"])
    lm.load_state_dict(state["model"])
    cache, cache_loss, mbpa, mbpa_loss, both, weights, loss = state["choice"]
    settings = CacheSetting(*both[0]), MbPASetting(*both[1])
    choice = Choice(CacheSetting(*cache), cache_loss, MbPASetting(*mbpa), mbpa_loss, settings, tuple(weights), loss)
    return lm.to(torch.device(device)).eval(), vocabulary, choice


def _as_lists(value: Any) -> Any:
    return [_as_lists(part) for part in value] if isinstance(value, tuple) else value
