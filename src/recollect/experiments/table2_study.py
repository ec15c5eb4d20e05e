"""What is done with a trained language model: settings are chosen on the validation text, then the test text is read.

Each reading of a text leaves what every part of a mixture gave to every word in a file beside the results, so that a
run that was stopped goes on behind it.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from recollect import checkpoint
from recollect.errors import NonFiniteError
from recollect.experiments.language_models import Text
from recollect.experiments.runner import Progress, Run
from recollect.language import (
    CacheGrid,
    DynamicEvaluation,
    LSTMModel,
    MbPAGrid,
    Reading,
    gradient_statistics,
    read,
    read_dynamically,
    score,
)
from recollect.language.choose import choose
from recollect.language.report import fit_weights, gain_by_frequency, interval, mix
from recollect.language.settings import CacheSetting, MbPASetting

MIXTURES = {
    "model": ("model",),
    "cache": ("model", "cache"),
    "mbpa": ("model", "mbpa"),
    "both": ("model", "cache in both", "mbpa in both"),
}
_PARTS = ("model", "cache", "cache in both", "mbpa", "mbpa in both")


_CACHE = CacheGrid(sizes=(100, 200, 500, 1000, 2000, 5000), flatness=(0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5))
_MBPA = MbPAGrid(sizes=(500, 1000, 5000), neighbors=(8, 32, 128, 256), rates=(0.15, 0.5, 2.0, 8.0))
_MORE_STEPS = MbPAGrid(sizes=(1000,), neighbors=(16, 32), rates=(0.4,), steps=(5, 10, 20))
# Of a vocabulary three times as large, on a text four times as long.
_LARGE_MBPA = MbPAGrid(sizes=(1000, 5000), neighbors=(8, 32, 128, 256), rates=(0.15, 0.5, 1.0, 2.0, 4.0))
_LARGE_MORE_STEPS = MbPAGrid(sizes=(1000, 2000, 5000), neighbors=(8,), rates=(0.4,), steps=(2, 5, 10))


@dataclass(frozen=True)
class StudySettings:
    """What is tried and on how many words; the grids reach beyond the paper's, whose best settings lie at its edges."""

    cache: CacheGrid = _CACHE
    mbpa: tuple[MbPAGrid, ...] = (_MBPA, _MORE_STEPS)
    keys: tuple[str, ...] = ("input",)
    """What neighbors are searched by; the better one is kept."""
    valid: int | None = 40_000
    """How many words of the validation text the weights of the mixtures are fitted to; all when None."""
    tune: int = 40_000
    """How many words of the validation text the grids of cache and MbPA are scored on."""
    dynamic_tune: int = 10_000
    """... and dynamic evaluation's."""
    statistics: int = 500
    """How many batches of the training text dynamic evaluation's statistics are made of."""
    segment: int = 5
    """Words between two steps of dynamic evaluation."""
    rates: tuple[float, ...] = (1e-5, 2e-5, 4e-5)
    """Step sizes of dynamic evaluation."""
    decays: tuple[float, ...] = (2e-3, 5e-4, 8e-3)
    """Its pulls back to the trained weights; step sizes are tried with the first of them."""


LARGE = StudySettings(
    cache=CacheGrid(sizes=(500, 1000, 2000, 5000, 10_000), flatness=(0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)),
    mbpa=(_LARGE_MBPA, _LARGE_MORE_STEPS),
    **{"keys": ("input",), "valid": 20_000, "tune": 12_000, "dynamic_tune": 10_000, "statistics": 200},
    **{"segment": 40, "rates": (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3e-4)},
    decays=(1e-2, 2e-3),
)
"""For WikiText-2."""


class _Chosen(NamedTuple):
    """The settings with which all texts are read."""

    key: str
    cache: CacheSetting
    mbpa: MbPASetting
    both: tuple[CacheSetting, MbPASetting]
    loss: float


class Study:
    """The readings of one corpus by one model."""

    def __init__(self, record: Run, text: Text, lm: LSTMModel, settings: StudySettings) -> None:
        self._record = record
        self._text = text
        self._lm = lm
        self._settings = settings
        self._device = lm.output.weight.device

    def run(self) -> None:
        """Does what has not been done, and adds the rows."""
        choice = self._choice()
        words: dict[tuple[str, str], dict[str, Tensor]] = {}
        for reader in ("static", "dynamic"):
            rate, decay = self._dynamic_choice() if reader == "dynamic" else (0.0, 0.0)
            for text in ("valid", "test"):
                words[reader, text] = self._words(reader, text, choice, rate, decay)
            self._results(reader, words)
            if reader == "static":
                self._buckets(words)

    # Choosing

    def _choice(self) -> _Chosen:
        """Returns the settings that are best on the validation text."""
        found = [self._choice_with(key) for key in self._settings.keys]
        return min(found, key=lambda choice: choice.loss)

    def _choice_with(self, key: str) -> _Chosen:
        row = self._record.find(part="choice", key=key) or self._tune(key)
        both = CacheSetting(*row["both"][0]), MbPASetting(*row["both"][1])
        return _Chosen(key, CacheSetting(*row["cache"]), MbPASetting(*row["mbpa"]), both, row["loss"])

    def _tune(self, key: str) -> dict[str, Any]:
        settings = self._settings
        tokens = self._text.valid[: settings.tune]
        with Progress(len(tokens), f"cache and MbPA on validation words, key: {key}") as progress:
            readings = read(self._lm, tokens.to(self._device), first=self._text.vocabulary.end, key=key)
            scores = score(readings, settings.cache, settings.mbpa, watch=progress.advance)
        caches, mbpas = settings.cache.points(), [point for grid in settings.mbpa for point in grid.points()]
        for what, points, parts in (("cache", caches, scores.cache), ("mbpa", mbpas, scores.mbpa)):
            fit = fit_weights(scores.model, parts)
            for point, weight, loss in zip(points, fit.weights[1].tolist(), fit.loss.tolist(), strict=True):
                self._add(
                    {"part": "grid", "key": key, "what": what, "setting": list(point)},
                    {"weight": round(weight, 4), "loss": round(loss, 5)},
                )
        best = choose(scores, caches, mbpas)
        row = {"part": "choice", "key": key, "model": float(-scores.model.log().double().mean()), **best._asdict()}
        row = json.loads(json.dumps(row))
        self._record.add(**row)
        return row

    def _dynamic_choice(self) -> tuple[float, float]:
        """Returns the best rate at the first decay, and the best decay at that rate."""
        settings = self._settings
        rate = min(settings.rates, key=lambda rate: self._dynamic_loss(rate, settings.decays[0]))
        if math.isinf(self._dynamic_loss(rate, settings.decays[0])):
            raise NonFiniteError(f"dynamic evaluation diverges with all rates of {settings.rates}. Try smaller ones.")
        return rate, min(settings.decays, key=lambda decay: self._dynamic_loss(rate, decay))

    def _dynamic_loss(self, rate: float, decay: float) -> float:
        row = self._record.find(part="dynamic", rate=rate, decay=decay)
        if row is None:
            tokens = self._text.valid[: self._settings.dynamic_tune]
            with Progress(len(tokens), f"dynamic evaluation, rate {rate:g}, decay {decay:g}") as progress:
                total = 0.0
                for reading in self._readings("dynamic", tokens, "hidden", rate, decay):
                    chances = reading.logits.log_softmax(1).gather(1, reading.targets.unsqueeze(1))
                    total -= float(chances.double().sum())
                    progress.advance(len(chances))
            loss = total / len(tokens) if math.isfinite(total) else None
            row = {"part": "dynamic", "rate": rate, "decay": decay, "loss": loss}
            self._record.add(**row)
        return math.inf if row["loss"] is None else row["loss"]

    # Reading

    def _readings(self, reader: str, tokens: Tensor, key: str, rate: float, decay: float) -> Iterable[Reading]:
        first, tokens = self._text.vocabulary.end, tokens.to(self._device)
        if reader == "static":
            yield from read(self._lm, tokens, first=first, key=key)
            return
        with DynamicEvaluation(self._lm, self._statistics(), rate=rate, decay=decay) as dynamic:
            segment = self._settings.segment
            yield from read_dynamically(self._lm, dynamic, tokens, first=first, key=key, segment=segment)

    def _statistics(self) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            return gradient_statistics(self._lm, self._text.train.to(self._device), batches=self._settings.statistics)

        found = self._kept("statistics", compute)
        return {name: part.to(self._device) for name, part in found.items()}

    def _words(self, reader: str, part: str, choice: _Chosen, rate: float, decay: float) -> dict[str, Tensor]:
        """Returns what each part of the mixtures gave to each word of a text, and the seconds it took."""

        def compute() -> dict[str, Tensor]:
            tokens = self._tokens(part)
            started = time.perf_counter()
            with Progress(len(tokens), f"{reader} model on the {part} text") as progress:
                readings = self._readings(reader, tokens, choice.key, rate, decay)
                caches = sorted({choice.cache, choice.both[0]})
                mbpas = sorted({choice.mbpa, choice.both[1]})
                scores = score(
                    readings,
                    [CacheGrid((size,), (flatness,)) for size, flatness in caches],
                    [MbPAGrid((size,), (k,), (rate,), (steps,)) for size, k, rate, steps in mbpas],
                    watch=progress.advance,
                )
            cache, mbpa = dict(zip(caches, scores.cache, strict=True)), dict(zip(mbpas, scores.mbpa, strict=True))
            parts = scores.model, cache[choice.cache], cache[choice.both[0]], mbpa[choice.mbpa], mbpa[choice.both[1]]
            seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            return {**{name: one.clone() for name, one in zip(_PARTS, parts, strict=True)}, "seconds": seconds}

        return self._kept(f"{reader}-{part}", compute)

    def _tokens(self, part: str) -> Tensor:
        return self._text.test if part == "test" else self._text.valid[: self._settings.valid]

    def _kept(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns tensors from a file beside the results, computing them where there is none."""
        file = self._record.folder / f"{name}.checkpoint"
        run = {"steps": max(row["step"] for row in self._record.rows if row["part"] == "train"), "name": name}
        found = checkpoint.read(file, run=run)
        if found is None:
            found = {key: value.cpu() for key, value in compute().items()}
            checkpoint.write(file, found, run=run)
        return found

    # Results

    def _results(self, reader: str, words: dict[tuple[str, str], dict[str, Tensor]]) -> None:
        for name in MIXTURES:
            for text in ("valid", "test"):
                weights, nats = _mixed(name, words[reader, "valid"], words[reader, text])
                _, before = _mixed("model", words["static", "valid"], words["static", text])
                groups = self._text.groups(self._tokens(text))
                loss, gain = interval(nats, groups), interval(before - nats, groups)
                self._add(
                    {"part": "result", "reader": reader, "mixture": name, "text": text},
                    {
                        **{"weights": [round(weight, 4) for weight in weights], "words": len(nats)},
                        **{"loss": loss.mean, "half_width": loss.half_width},
                        **{"gain": gain.mean, "gain_half_width": gain.half_width},
                        "words_per_second": round(len(nats) / float(words[reader, text]["seconds"]), 1),
                    },
                )

    def _buckets(self, words: dict[tuple[str, str], dict[str, Tensor]]) -> None:
        """Adds Figure 8: what MbPA adds to the model with the cache, and to the model, by training frequency."""
        tokens, counts = self._text.test, self._text.vocabulary.counts
        nats = {name: _mixed(name, words["static", "valid"], words["static", "test"])[1] for name in MIXTURES}
        for before, after in (("cache", "both"), ("model", "mbpa"), ("model", "cache")):
            found = gain_by_frequency(tokens, counts, nats[before], nats[after], self._text.groups(tokens))
            for number, bucket in enumerate(found, 1):
                self._add(
                    {"part": "bucket", "before": before, "after": after, "number": number},
                    {**bucket._asdict(), "nats": bucket.nats.mean, "half_width": bucket.nats.half_width},
                )

    def _add(self, key: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Adds a row unless it is there."""
        if self._record.find(**key) is None:
            self._record.add(**key, **numbers)


def _mixed(name: str, valid: dict[str, Tensor], words: dict[str, Tensor]) -> tuple[list[float], Float[Tensor, " n"]]:
    """Returns the weights of a mixture, fitted to the validation text, and what each word of a text cost it."""
    weights = fit_weights(*(valid[part] for part in MIXTURES[name])).weights
    nats = -mix(tuple(words[part] for part in MIXTURES[name]), list(weights)).log()
    return weights.tolist(), nats
