"""What the language experiments share: a corpus by word numbers, and a model trained on it."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from recollect.data import penn_treebank, wikitext_2
from recollect.errors import require_choice, require_device
from recollect.experiments.runner import Progress, Run
from recollect.language import LSTMModel, Schedule, Step, Vocabulary, train
from recollect.language.report import articles, blocks

CORPORA = {"ptb": penn_treebank, "wikitext-2": wikitext_2}
_MOST = 30.0  # nats per word; a display needs no more, and the perplexity of 710 is no float


class Text(NamedTuple):
    """A corpus by word numbers."""

    vocabulary: Vocabulary
    train: Int[Tensor, " n"]
    valid: Int[Tensor, " n"]
    test: Int[Tensor, " n"]

    def groups(self, tokens: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Returns what may be taken for independent of each other: articles, or blocks where none are marked."""
        if "=" in self.vocabulary.words:
            found = articles(tokens, end=self.vocabulary.end, mark=self.vocabulary.number("="))
            if int(found.max()) > 1:
                return found
        return blocks(len(tokens))


def read(corpus: str, *, most: int | None = None) -> Text:
    """Reads a corpus, of the training text the first ``most`` words and of the others a tenth of that.

    The vocabulary is always that of the whole training text.

    Raises:
        SettingError: If there is no corpus of this name.
        MissingDataError, MissingExtraError: See ``recollect.data.fetch``.
    """
    require_choice("--corpus", corpus, tuple(CORPORA))
    files = CORPORA[corpus]()
    vocabulary = Vocabulary.build(files.train)
    parts = [vocabulary.encode(file) for file in files]
    if most is not None:
        parts = [part[:size] for part, size in zip(parts, (most, most // 10, most // 10), strict=True)]
    return Text(vocabulary, *parts)


@dataclass(frozen=True)
class Size:
    """The size of a model and its dropout."""

    hidden_size: int
    embedding_size: int
    input_dropout: float
    state_dropout: float
    output_dropout: float


def trained(record: Run, text: Text, size: Size, schedule: Schedule, *, seed: int, device: str) -> LSTMModel:
    """Trains a model, or goes on with its training, with a display of perplexity and time left.

    The checkpoint lies in the run's folder; what a look at the validation text showed becomes a row.

    Raises:
        DeviceError: If there is no such device.
        NonFiniteError, FormatError: See ``recollect.language.train``.
    """
    place = require_device(device)
    model = LSTMModel(len(text.vocabulary), **asdict(size), generator=torch.Generator().manual_seed(seed)).to(place)
    generator = torch.Generator(place).manual_seed(seed + 1)
    steps: dict[str, Any] = {}
    with Progress(1.0, "training") as progress:

        def watch(step: Step) -> None:
            if not steps:
                progress.skip((step.step - 1) / step.steps)
            steps["done"] = step.step
            turn = step.turn
            title = f"training: perplexity {math.exp(min(step.loss, _MOST)):.0f}"
            if turn is not None:
                title = f"{title}, validation {math.exp(min(turn.valid, _MOST)):.1f}"
                if record.find(part="train", step=turn.step) is None:
                    record.add(part="train", **{k: round(v, 6) for k, v in turn._asdict().items()})
            progress.advance(1 / step.steps, title)

        file = record.folder / "model.checkpoint"
        tokens, valid = text.train.to(place), text.valid.to(place)
        train(model, tokens, valid, schedule, generator=generator, file=file, watch=watch)
    return model.eval()
