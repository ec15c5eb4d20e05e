"""Table 2 and Figure 8: language models that adapt while they read.

Paper: Section 4.3, Table 2, Appendices B and C. An LSTM is trained on Penn Treebank or WikiText-2. While it reads the
test text, a neural cache, MbPA on its softmax layer, and dynamic evaluation learn from what has just been read. All
settings are chosen on the validation text; the test text is read once by each row of the table.
"""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path

from recollect.errors import require_choice
from recollect.experiments.language_models import CORPORA, Size, read, trained
from recollect.experiments.runner import Run, refuse_strange
from recollect.experiments.table2_report import report
from recollect.experiments.table2_study import LARGE, Study, StudySettings
from recollect.language import CacheGrid, MbPAGrid, Schedule


@dataclass(frozen=True)
class Scale:
    """What a scale stands for."""

    size: Size
    schedule: Schedule
    study: StudySettings
    words: int | None = None
    """How many words of the training text (of the others a tenth); all when None."""


_SMALL = Size(650, 256, input_dropout=0.4, state_dropout=0.2, output_dropout=0.35)
_SHORT = Schedule(epochs=20.0, rate=0.003, turn=200, patience=4, decay=0.3, anneal=0.3)
_MELIS = {"input_dropout": 0.5799, "state_dropout": 0.2153, "output_dropout": 0.3270}
_SMOKE = Scale(
    replace(_SMALL, hidden_size=48, embedding_size=32),
    Schedule(epochs=2.0, batch=16, rate=0.01, turn=50, patience=4, decay=0.3, anneal=0.3),
    StudySettings(
        CacheGrid(sizes=(500, 2000), flatness=(0.0, 0.3, 1.0)),
        (MbPAGrid((1000,), (32, 128), (0.3, 3.0)), MbPAGrid((1000,), (8,), (0.3,), steps=(2, 5))),
        **{"tune": 2000, "dynamic_tune": 1000, "statistics": 20, "segment": 20, "rates": (1e-4, 1e-3)},
    ),
    words=40_000,
)
SCALES = {
    ("smoke", "ptb"): _SMOKE,
    ("smoke", "wikitext-2"): _SMOKE,
    ("small", "ptb"): Scale(_SMALL, _SHORT, StudySettings()),
    ("small", "wikitext-2"): Scale(
        replace(_SMALL, input_dropout=0.2, state_dropout=0.1, output_dropout=0.2),  # too short a training to overfit
        replace(_SHORT, epochs=3.0, turn=466),
        LARGE,
    ),
    ("paper", "ptb"): Scale(Size(1194, 268, **_MELIS), Schedule(), StudySettings()),
    ("paper", "wikitext-2"): Scale(Size(1853, 241, **_MELIS), Schedule(), LARGE),
}


@dataclass(frozen=True)
class Table2:
    """Penn Treebank and WikiText-2: cache, MbPA, dynamic evaluation and their mixtures."""

    corpus: str = "ptb"
    """``ptb`` or ``wikitext-2``."""
    scale: str = "smoke"
    """``smoke`` (a minute), ``small`` (three hours of one core, half of them training), ``paper`` (for a GPU)."""
    out: Path = Path("runs/table2")
    """The folder for results, one inside it for each corpus; a run that was stopped goes on there."""
    seed: int = 0
    """Determines the initial weights and the dropout."""
    device: str = "cpu"
    """Where to train and to read: ``cpu`` or ``cuda``."""


def opened(config: Table2) -> Run:
    """Returns the record of a run, new or old.

    Raises:
        SettingError: If it is of a run with other settings.
    """
    scale = dataclasses.asdict(SCALES[config.scale, config.corpus])
    settings = {"corpus": config.corpus, "scale": config.scale, "seed": config.seed, **scale}
    return Run(config.out / config.corpus, settings)


def run(config: Table2) -> str:
    """Runs the experiment for one corpus and returns the table of all corpora in the folder.

    Raises:
        MissingDataError: If the corpus is neither at hand nor can be downloaded.
        SettingError: If a setting is out of range or ``out`` holds a run with other settings.
    """
    require_choice("--scale", config.scale, ("smoke", "small", "paper"))
    require_choice("--corpus", config.corpus, tuple(CORPORA))
    if not any((config.out / corpus / "config.json").exists() for corpus in CORPORA):
        refuse_strange(config.out / "config.json", config.out / "table.md", config.out / "figure8.png")
    scale = SCALES[config.scale, config.corpus]
    text = read(config.corpus, most=scale.words)
    record = opened(config)
    lm = trained(record, text, scale.size, scale.schedule, seed=config.seed, device=config.device)
    Study(record, text, lm, scale.study).run()
    return report(config.out)
