"""A run that is stopped while it adds rows, and started again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recollect.experiments.meta import training
from recollect.experiments.runner import Run


def rows_of_a_stopped_run(
    run: Callable[[Any], str], config: Callable[..., Any], folder: Path, *, stops: tuple[int, int] = (2, 4)
) -> tuple[str, str]:
    """Returns the rows of a run, and those of another one that was stopped twice, before its 2nd and its 3rd row.

    Args:
        run: Runs an experiment.
        config: Takes the folder of a run.
        folder: For both runs.
        stops: At which attempts to add a row the run is stopped.
    """
    run(config(out=folder / "whole"))
    real, calls = Run.add, []

    def stop(self: Run, **row: object) -> None:
        calls.append(row)
        if len(calls) in stops:
            raise KeyboardInterrupt
        real(self, **row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "add", stop)
        patch.setattr(training, "_SECONDS", -1.0)  # every step is saved
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(config(out=folder / "stopped"))
        run(config(out=folder / "stopped"))
    whole, stopped = ((folder / name / "results.jsonl").read_text() for name in ("whole", "stopped"))
    return whole, stopped
