"""``recollect lm train`` and ``recollect lm evaluate``: a language model of a user's own text files.

Training ends with a choice: what settings of cache and MbPA suit the validation text best goes into the model's file,
and evaluation reads any text with them.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from recollect import Parametric, checkpoint
from recollect.errors import (
    FormatError,
    MissingDataError,
    NonFiniteError,
    SettingError,
    require_device,
    require_whole,
)
from recollect.experiments.language_models import Size, Text, trained
from recollect.experiments.runner import Progress, Run
from recollect.language import (
    CacheGrid,
    Evaluation,
    Interval,
    LSTMModel,
    MbPAGrid,
    Schedule,
    Vocabulary,
    blocks,
    evaluate,
    gain_by_frequency,
    interval,
    read,
    score,
)
from recollect.language.choose import Choice, choose, keys_of, predictor
from recollect.language.settings import CacheSetting, MbPASetting
from recollect.language.vocabulary import UNKNOWN

_FORMAT = {"format": "recollect language model 1"}
_KEY = "input"  # what neighbors are searched by: smaller than the hidden state, and as good or better
_CACHE = CacheGrid(sizes=(100, 500, 1000, 5000), flatness=(0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0))
_MBPA = (
    MbPAGrid(sizes=(1000, 5000), neighbors=(8, 32, 128), rates=(0.5, 2.0, 8.0)),
    MbPAGrid(sizes=(1000,), neighbors=(8,), rates=(0.2, 0.4), steps=(5, 10)),
)
_ELSEWHERE = {"text", "valid", "out", "device", "tune", "encoding"}
_LONG = 10_000  # words: ten blocks, which are long enough to be nearly independent
_BUCKETS = 5  # of words by their training frequency, as in Figure 8


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
    """Reads a text file with a model that learns from it word by word, and says what cache and MbPA are worth."""

    text: Path
    """The text, or what can be read like a file (``/dev/stdin``)."""
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
        SettingError, DeviceError: If a setting is out of range, or there is no such device.
        NonFiniteError: If training diverges.
    """
    return _train(config) if isinstance(config, Train) else _evaluate(config)


def _train(config: Train) -> str:
    require_device(config.device)
    for name in ("hidden_size", "embedding_size", "min_count", "batch", "tune"):
        require_whole(f"--{name.replace('_', '-')}", getattr(config, name))
    require_whole("--max-vocabulary", config.max_vocabulary, low=2)
    if config.text.exists() and not config.text.is_file():
        raise SettingError(
            f"--text must be a file, got {config.text}: the training text is read twice, to count its words and to "
            "number them. Write it to a file first."
        )
    limits = {"min_count": config.min_count, "max_size": config.max_vocabulary}
    # Where no word is rare, one has to be there for the new words of other texts all the same.
    vocabulary = Vocabulary.build(config.text, **limits, unknown=True, encoding=config.encoding)
    train, valid = (_encode(vocabulary, file, config.encoding) for file in (config.text, config.valid))
    size = Size(config.hidden_size, config.embedding_size, config.dropout, config.dropout / 2, config.dropout)
    batch = max(1, min(config.batch, len(train) // 100))
    turn = max(1, min(200, len(train) // (batch * 35)))
    schedule = Schedule(
        epochs=config.epochs, batch=batch, rate=config.rate, turn=turn, patience=4, decay=0.3, anneal=0.3
    )
    # What determines the training: the texts' words, which its checkpoint knows, and not where they lie.
    settings = {name: value for name, value in asdict(config).items() if name not in _ELSEWHERE}
    if torch.equal(train, valid):
        raise SettingError(
            f"--valid {config.valid} has the words of the training text: everything would be chosen by what the model "
            "knows by heart. Keep some of the text back, and pass it as --valid."
        )
    checkpoint.read(config.out / "model", run=_FORMAT)  # what is not ours is not written over
    record = Run(config.out, {**settings, "training text": _digest(train), "validation text": _digest(valid)})
    text = Text(vocabulary, train, valid, valid)
    lm = trained(record, text, size, schedule, seed=config.seed, device=config.device)
    tokens = valid[: config.tune].to(config.device)
    with Progress(len(tokens), "choosing cache and MbPA") as progress:
        readings = read(lm, tokens, first=vocabulary.end, key=_KEY)
        scores = score(readings, _CACHE, _MBPA, watch=progress.advance)
    if not bool((scores.model > 0).all()):
        raise NonFiniteError(
            f"the trained model's loss on {config.valid} is infinite: it gives a word no chance at all. Start anew "
            f"with a lower --rate (it was {config.rate:g}) and another --out."
        )
    choice = choose(scores, _CACHE.points(), [point for grid in _MBPA for point in grid.points()])
    state = {"model": lm.state_dict(), "vocabulary": vocabulary.to_state(), "size": asdict(size)}
    checkpoint.write(config.out / "model", {**state, "choice": _as_lists(choice)}, run=_FORMAT)
    base = float(-scores.model.log().double().mean())
    lines = [
        f"{len(train):,} training words, {len(vocabulary):,} different ones; validation text, "
        f"{_unknown(vocabulary, tokens)}:",
        "",
        "| | perplexity | nats per word | change in nats |",
        "|---|---|---|---|",
        f"| model | {math.exp(base):.1f} | {base:.3f} | |",
    ]
    losses = {"+ cache": choice.cache_loss, "+ MbPA": choice.mbpa_loss, "+ cache + MbPA": choice.loss}
    lines += (f"| {name} | {math.exp(loss):.1f} | {loss:.3f} | {loss - base:+.3f} |" for name, loss in losses.items())
    table = "\n".join(lines) + "\n"
    record.write_table(table)
    return table


def _encode(vocabulary: Vocabulary, file: Path, encoding: str) -> Int[Tensor, " n"]:
    """Returns a text by word numbers, or says that it holds no words."""
    tokens = vocabulary.encode(file, encoding=encoding)
    if bool((tokens == vocabulary.end).all()):
        raise FormatError(f"{file} holds blank lines only. It must have words, with white space between them.")
    return tokens


def _digest(tokens: Int[Tensor, " n"]) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def _unknown(vocabulary: Vocabulary, tokens: Int[Tensor, " n"]) -> str:
    """Says how much of a text the model does not know: that is easy to predict, and tells nothing."""
    share = float((tokens == vocabulary.number(UNKNOWN)).double().mean())
    return f"{100 * share:.1f} % of them {UNKNOWN}"


def _evaluate(config: Evaluate) -> str:
    device = require_device(config.device)
    lm, vocabulary, choice = _load(config.model, device)
    tokens = _encode(vocabulary, config.text, config.encoding)  # once: a pipe has nothing to read the second time
    mixture, memories = predictor(lm, choice, key=_KEY)
    found: dict[str, Evaluation] = {}
    for name, output, written in (("model", Parametric(lm.output), None), ("+ cache + MbPA", mixture, memories)):
        with Progress(len(tokens), name) as progress:
            hidden, first, words = keys_of(lm, _KEY), vocabulary.end, tokens.to(device)
            found[name] = evaluate(hidden, output, written, words, first=first, watch=progress.advance)
    before, after = (result.nats.cpu() for result in found.values())
    groups = blocks(len(tokens))
    sure = len(tokens) >= _LONG
    note = "" if sure else f"; too short for intervals, which take {_LONG:,}"
    lines = [
        f"{len(tokens):,} words of {config.text}, {_unknown(vocabulary, tokens)}{note}",
        "",
        "| | perplexity | nats per word | change in nats (95 %) | words/s |",
        "|---|---|---|---|---|",
    ]
    change = _change(interval(after - before, groups), sure)
    for (name, result), text in zip(found.items(), ("", change), strict=True):
        numbers = f"{result.perplexity:.1f} | {result.loss:.3f} | {text} | {result.tokens_per_second:.0f}"
        lines.append(f"| {name} | {numbers} |")
    most = min(_BUCKETS, len(tokens.unique()))
    buckets = gain_by_frequency(tokens, vocabulary.counts, before, after, groups, buckets=most)
    lines += [
        "",
        "What each occurrence of a word gains, from the most frequent words to the rarest: the fall of the perplexity "
        "in percent, and the same in nats (95 %):",
        "",
        "| bucket | different words | occurrences | rarest in training | percent | nats |",
        "|---|---|---|---|---|---|",
    ]
    lines += (
        f"| {number} | {bucket.words} | {bucket.occurrences} | {bucket.rarest} | {bucket.percent:.1f} "
        f"| {_change(bucket.nats, sure)} |"
        for number, bucket in enumerate(buckets, 1)
    )
    return "\n".join(lines) + "\n"


def _change(found: Interval, sure: bool) -> str:
    known = sure and math.isfinite(found.half_width)
    return f"{found.mean:+.3f}" + (f" +- {found.half_width:.3f}" if known else "")


def _load(folder: Path, device: torch.device) -> tuple[LSTMModel, Vocabulary, Choice]:
    state = checkpoint.read(folder / "model", run=_FORMAT)
    if state is None:
        raise MissingDataError(f"{folder} holds no language model. Make one: recollect lm train --out {folder} ...")
    vocabulary = Vocabulary.from_state(state["vocabulary"])
    lm = LSTMModel(len(vocabulary), **state["size"])
    lm.load_state_dict(state["model"])
    cache, cache_loss, mbpa, mbpa_loss, both, weights, loss = state["choice"]
    settings = CacheSetting(*both[0]), MbPASetting(*both[1])
    choice = Choice(CacheSetting(*cache), cache_loss, MbPASetting(*mbpa), mbpa_loss, settings, tuple(weights), loss)
    return lm.to(device).eval(), vocabulary, choice


def _as_lists(value: Any) -> Any:
    return [_as_lists(part) for part in value] if isinstance(value, tuple) else value
