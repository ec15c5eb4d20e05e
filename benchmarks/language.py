"""Reading a text with a memory: the neural cache, MbPA on the softmax layer, and a language model with both."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import floors, reading
from benchmarks.case import Call, Case
from benchmarks.checks import DisagreementError, same
from benchmarks.going import Going
from recollect import EpisodicMemory, LocalAdaptation, MbPA, Mixture, Parametric, neural_cache, rules
from recollect.language import CacheGrid, LSTMModel, MbPAGrid, Reading, Scores, evaluate, score
from recollect.predictors import Predictor

NAME = "language"
TITLE = "Reading a text with a memory"

_RATE = 0.15
_TEST_WORDS = 82_430  # of the Penn Treebank
_WEIGHTS = (0.75, 0.1, 0.15)  # of model, MbPA and cache: the paper's for the Penn Treebank


class Setting(NamedTuple):
    """A softmax layer and what is remembered; the tests take smaller ones."""

    text: str
    classes: int
    size: int
    """Inputs of the softmax layer."""
    entries: int
    """How many words are remembered."""
    few: int = 1
    """Words that one call of a loop reads."""
    hidden: int | None = None
    """The LSTM's outputs, by which neighbors are searched; None where they are the softmax layer's inputs."""
    neighbors: int = 256
    block: int = 256
    quick: bool = True

    @property
    def key(self) -> int:
        """The length of a key."""
        return self.hidden or self.size


CACHES = (
    Setting("PTB", 10_000, 400, 500, few=16),
    Setting("WikiText-2", 33_278, 400, 3785, few=4),
)
ADAPTED = (
    Setting("PTB", 10_000, 268, 5000, few=4),
    Setting("PTB", 10_000, 268, 5000, few=4, hidden=1194, quick=False),
    Setting("WikiText-2", 33_278, 241, 5000, few=2, quick=False),
    Setting("WikiText-2", 33_278, 241, 5000, few=2, hidden=1853, quick=False),
)
WHOLE = (Setting("PTB", 10_000, 268, 5000, hidden=1194, quick=False),)
FLATNESS = {"PTB": 1.0, "WikiText-2": 0.662}  # and the caches' weights below: as published for the AWD-LSTM
WEIGHT = {"PTB": 0.1, "WikiText-2": 0.1279}


def _makers(full: bool) -> list[Callable[[torch.device], Case]]:
    kinds = ((_cache, CACHES), (_mbpa, ADAPTED), (_whole, WHOLE))
    return [functools.partial(make, one) for make, settings in kinds for one in settings if full or one.quick]


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return len(_makers(full))


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other."""
    for make in _makers(full):
        yield make(device)


class _Block(NamedTuple):
    """Some words of a text that have been written and not been predicted."""

    keys: Tensor
    words: Tensor
    times: Tensor


class _Text:
    """A made text and a memory that has just read more of it than it can hold.

    The text begins anew when the memory has long forgotten its beginning: no word finds itself.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        blocks = -(-setting.entries // setting.block) + 2
        length = blocks * setting.block
        # Keys of length 4, whatever their size, as in the benchmark of the adaptation.
        self._keys = torch.randn(length, setting.key, generator=generator, device=device) * (4 * setting.key**-0.5)
        self._words = words(setting, length, generator)
        self.blocks = list(zip(self._keys.split(setting.block), self._words.split(setting.block), strict=True))
        self.memory = EpisodicMemory(setting.entries, setting.key, history=setting.block).to(device)
        self._done = 0
        for _ in range(blocks):
            self.last = self.next()

    def next(self) -> _Block:
        """Writes the next block."""
        keys, came = self.blocks[self._done % len(self.blocks)]
        self.memory.write(keys, came)
        times = int(self.memory.step) - len(came) + torch.arange(len(came), device=came.device)
        self._done += 1
        return _Block(keys, came, times)

    def past(self, queries: int) -> reading.Past:
        """Returns what was read at first, up to the first few words of the last block."""
        end = len(self._keys) - len(self.last.words) + queries
        return reading.Past(self._keys[:end], self._words[:end], self.memory.capacity)


def words(setting: Setting, count: int, generator: torch.Generator) -> Tensor:
    """Draws words by Zipf's law: the n-th most frequent is n times as rare as the first."""
    ranks = torch.arange(1, setting.classes + 1, device=generator.device)
    return torch.multinomial(1 / ranks, count, replacement=True, generator=generator)


class _Scorer:
    """Reads blocks as ``score`` does, which makes of each word's distribution only what the word that came got.

    Args:
        parts: What comes before the softmax layer, and that layer.
        settings: Of ``score``.
    """

    def __init__(self, *parts: nn.Module, **settings: Any) -> None:
        self._projection, self._layer = parts
        self._settings = settings

    def all(self, keys: Tensor, words: Tensor) -> Scores:
        """Reads a text from its first word to its last."""
        return score([self._reading(keys, words)], **self._settings)

    def going(self, text: _Text) -> Going:
        """Reads a block more in each call."""
        readings = (self._reading(*block) for block in itertools.cycle(text.blocks))
        going = Going(lambda parts: score(parts, **self._settings), readings)
        for _ in text.blocks:
            going()
        return going

    @torch.no_grad()
    def _reading(self, keys: Tensor, words: Tensor) -> Reading:
        inputs = self._projection(keys)
        return Reading(keys, inputs, self._layer(inputs), words)


def _head(setting: Setting, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Linear]:
    """Returns what maps keys to logits, and its parts: what comes before the softmax layer, and that layer."""
    torch.manual_seed(0)  # layers draw their weights from it
    layer = nn.Linear(setting.size, setting.classes).to(device)
    if setting.hidden is None:
        return layer, nn.Identity(), layer
    projection = nn.Linear(setting.hidden, setting.size, bias=False).to(device)
    return nn.Sequential(projection, layer), projection, layer


def _read_block(text: _Text, output: Predictor) -> Tensor:
    """Reads a block as ``evaluate`` does: writes it, and predicts each word by what came before it."""
    block = text.next()
    with torch.no_grad():
        return _gold(output(block.keys, before=block.times), block.words)


def _gold(chances: Tensor, came: Tensor) -> Tensor:
    return chances.gather(1, came.unsqueeze(1)).squeeze(1)


def _cache(setting: Setting, device: torch.device) -> Case:
    head, *layers = _head(setting, device)
    flatness, weight = FLATNESS[setting.text], WEIGHT[setting.text]
    text, still = _Text(setting, device), _Text(setting, device)
    last, settings = still.last, {"flatness": flatness, "weight": weight}
    ones = still.past(setting.few).words.unsqueeze(1)
    scorer = _Scorer(*layers, cache=CacheGrid((setting.entries,), (flatness,)), mbpa=())
    history = torch.zeros(len(ones), setting.classes, device=device).scatter_(1, ones, 1.0)

    def mixture(memory: EpisodicMemory) -> Mixture:
        cache = neural_cache(memory, classes=setting.classes, flatness=flatness)
        return Mixture(Parametric(head), cache, weights=(1 - weight, weight))

    def started(few: int) -> tuple[Tensor, Tensor, reading.Past]:
        queries = last.keys[:few]
        with torch.no_grad():
            return queries, head(queries), still.past(few)

    loops: dict[str, Callable[[], Iterator[Tensor]]] = {
        "one-hot loop": lambda: reading.pointer(*started(setting.few), history, **settings),
        "loop": lambda: reading.added_up(*started(setting.block), **settings),
    }

    def check() -> None:
        ours = mixture(still.memory)(last.keys, before=last.times)
        for name, loop in loops.items():
            theirs = torch.stack(list(loop())).log()
            same(name, ours[: len(theirs)], theirs, tolerance=1e-4)
        scores = scorer.all(*still.past(setting.block)[:2])
        theirs = ((1 - weight) * scores.model + weight * scores.cache[0])[-setting.block :].log()
        same("score", _gold(ours, last.words), theirs, tolerance=1e-4)

    def scored(loop: Callable[[], Iterator[Tensor]]) -> Tensor:
        return torch.stack([chances[word].log() for chances, word in zip(loop(), last.words, strict=False)])

    return Case(
        group="neural cache",
        label=f"{setting.text}, V={setting.classes:,} d={setting.size} N={setting.entries:,}",
        contenders={
            "recollect": functools.partial(_read_block, text, mixture(text.memory)),
            "score": scorer.going(text),
            **{name: functools.partial(scored, loop) for name, loop in loops.items()},
        },
        ours="recollect",
        work=floors.cache(setting.size, setting.classes, setting.block, window=setting.entries),
        queries=setting.block,
        fewer={"one-hot loop": setting.few},
        check=check,
        derived=functools.partial(_over_score, "one-hot loop"),
    )


def _over_score(loop: str, walls: Mapping[str, float]) -> Mapping[str, str]:
    """Returns how many times as long as ``score`` a loop takes."""
    return {f"{loop} / score": f"{walls[loop] / walls['score']:.0f}x"}


def _model(setting: Setting, head: nn.Module, memory: EpisodicMemory) -> MbPA:
    """Returns MbPA with one step of the softmax layer, which is the last of the head's."""
    names = ("1",) if isinstance(head, nn.Sequential) else None
    adaptation = LocalAdaptation(rules.sgd(_RATE), steps=1, parameters=names, keep_base=True)
    return MbPA(head, memory, neighbors=setting.neighbors, adaptation=adaptation)


def _mbpa(setting: Setting, device: torch.device) -> Case:
    head, projection, softmax_layer = _head(setting, device)
    text, still = _Text(setting, device), _Text(setting, device)
    queries, came, times = (part[: setting.few] for part in still.last)

    def found() -> Iterator[reading.Neighbors]:
        return reading.neighbors(queries, times, still.memory, count=setting.neighbors, projection=projection)

    grid = MbPAGrid((setting.entries,), (setting.neighbors,), (_RATE,))
    scorer = _Scorer(projection, softmax_layer, cache=(), mbpa=grid, table_dtype=torch.bfloat16)
    loops: dict[str, Callable[[], Iterator[Tensor]]] = {
        "copy loop": lambda: reading.copied(softmax_layer, found(), rate=_RATE),
        "gradient loop": lambda: reading.differentiated(softmax_layer, found(), rate=_RATE),
    }

    def check() -> None:
        base = Parametric(head)(queries)
        ours = _model(setting, head, still.memory)(queries, before=times) - base  # which alone is nearly the same
        if not float(ours.abs().max()) > 1e-3:
            raise DisagreementError("The adaptation changes next to nothing, so that it could be missing.")
        for name, loop in loops.items():
            same(name, ours, torch.cat(list(loop())).log_softmax(1) - base, tolerance=1e-2)
        scores = scorer.all(*still.past(setting.few)[:2])
        theirs = (scores.mbpa[0].log() - scores.model.log())[-setting.few :]
        same("score", _gold(ours, came), theirs, tolerance=1e-2)

    def scored(loop: Callable[[], Iterator[Tensor]]) -> Tensor:
        return torch.cat([logits.log_softmax(1)[:, word] for logits, word in zip(loop(), came, strict=True)])

    key = "" if setting.hidden is None else f"{setting.hidden} to "
    return Case(
        group=f"MbPA, T=1 K={setting.neighbors}",
        label=f"{setting.text}, V={setting.classes:,} d={key}{setting.size} N={setting.entries:,}",
        contenders={
            "recollect": functools.partial(_read_block, text, _model(setting, head, text.memory)),
            "score": scorer.going(text),
            **{name: functools.partial(scored, loop) for name, loop in loops.items()},
        },
        ours="recollect",
        work=_mbpa_work(setting, setting.block),
        queries=setting.block,
        fewer=dict.fromkeys(loops, setting.few),
        check=check,
        derived=functools.partial(_over_score, "gradient loop"),
    )


def _mbpa_work(setting: Setting, count: int) -> floors.Work:
    sizes = (setting.size, setting.classes, count, setting.neighbors)
    return floors.together(
        floors.search(setting.entries, setting.key, count),
        floors.projection(setting.hidden, setting.size, count),
        floors.linear_kept(*sizes, steps=1, entries=setting.entries + setting.block),
    )


def _whole(setting: Setting, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_size": setting.key, "embedding_size": setting.size}
    lm = LSTMModel(setting.classes, **sizes, generator=generator).to(device)
    length = 3 * setting.block

    def text(before: int) -> Iterator[Tensor]:
        yield words(setting, before + setting.block, generator).to(device)
        while True:
            yield words(setting, length, generator).to(device)

    def alone() -> Call:
        return Going(lambda parts: evaluate(lm.hidden, Parametric(lm.decoder), None, parts), text(0))

    def mixed(*, adapts: bool) -> Call:
        memories = [EpisodicMemory(setting.entries, setting.key, history=setting.block).to(device) for _ in range(2)]
        cache = neural_cache(memories[0], classes=setting.classes)
        if adapts:
            parts = Parametric(lm.decoder), _model(setting, lm.decoder, memories[1]), cache
            output = Mixture(*parts, weights=_WEIGHTS)
        else:
            memories = memories[:1]
            output = Mixture(Parametric(lm.decoder), cache, weights=(1 - _WEIGHTS[2], _WEIGHTS[2]))
        return Going(
            lambda parts: evaluate(lm.hidden, output, memories, parts, block=setting.block), text(setting.entries)
        )

    return Case(
        group="evaluate",
        label=f"{setting.text}, LSTM {setting.key}-{setting.size} V={setting.classes:,} N={setting.entries:,}",
        contenders={
            "LSTM, MbPA, cache": mixed(adapts=True),
            "LSTM, cache": mixed(adapts=False),
            "LSTM": alone(),
        },
        ours="LSTM, MbPA, cache",
        work=floors.together(
            floors.recurrent(setting.size, setting.key, length),
            floors.cache(setting.key, 0, length, window=setting.entries),
            _mbpa_work(setting, length),
        ),
        queries=length,
        derived=_whole_text,
    )


def _whole_text(walls: Mapping[str, float]) -> Mapping[str, str]:
    """Returns how long the whole test text takes."""
    return {f"{_TEST_WORDS:,} words, {name}": f"{_TEST_WORDS * wall:.0f} s" for name, wall in walls.items()}
