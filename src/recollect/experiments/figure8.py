"""Figure 8: which words MbPA helps, by how often the training text has them.

Paper: Appendix C. It is drawn from the readings of Table 2, which are made first where the folder does not hold them.
"""

from recollect.experiments import table2
from recollect.experiments.table2 import Table2
from recollect.experiments.table2_report import buckets

__all__ = ["Table2", "run"]


def run(config: Table2) -> str:
    """Runs Table 2 where it has not been run, and returns the gains by training frequency.

    Raises:
        MissingDataError, SettingError: See ``table2.run``.
    """
    table2.run(config)
    return buckets(config.out)
