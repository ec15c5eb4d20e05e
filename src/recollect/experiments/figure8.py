"""Figure 8: which words MbPA helps, by how often the training text has them.

Paper: Appendix C. It is drawn from the results of Table 2, which are made first where the folder does not hold them.
"""

from dataclasses import dataclass

from recollect.experiments import table2
from recollect.experiments.runner import read_rows
from recollect.experiments.table2 import Table2
from recollect.experiments.table2_report import buckets, report


@dataclass(frozen=True)
class Figure8(Table2):
    """What each word gains by cache and MbPA, in five buckets by its frequency in the training text.

    It is drawn from the results of ``table2`` in the same folder; where there are none, ``table2`` is run first.
    """


def run(config: Figure8) -> str:
    """Runs Table 2 where it has not been run, draws the figure, and returns the gains by training frequency.

    Raises:
        MissingDataError, SettingError: See ``table2.run``.
    """
    rows = read_rows(config.out / config.corpus / "results.jsonl")
    if any(row["part"] == "bucket" for row in rows):
        table2.opened(config)  # refuses those of other settings
        report(config.out)
    else:
        table2.run(config)
    return buckets(config.out)
