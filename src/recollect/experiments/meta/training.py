"""A training that may be stopped at any time: its state is saved each minute, and the next start goes on there."""

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from recollect import checkpoint
from recollect.errors import NonFiniteError
from recollect.experiments.runner import Progress

_SECONDS = 60.0  # between two saves


@runtime_checkable
class Part(Protocol):
    """What has a state: a network, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def train(
    folder: Path,
    title: str,
    parts: Mapping[str, Part],
    *,
    run: Mapping[str, Any],
    generator: torch.Generator,
    steps: int,
    step: Callable[[int], float],
) -> None:
    """Takes the steps that are left of a training.

    Args:
        folder: That of the run. A file below it, named by the title, holds the state, and at the end the trained parts.
        title: What is trained.
        parts: All that a step changes beside the generator, by name.
        run: The settings that determine the training.
        generator: All that a step draws comes from it.
        steps: How many, from 1.
        step: Takes a step, given its number, and returns its loss.

    Raises:
        NonFiniteError: If a loss is NaN or infinite.
        FormatError: If the file is damaged, or that of another training.
    """
    file = folder / "checkpoints" / (re.sub(r"\W+", "-", title) + ".checkpoint")
    saved = checkpoint.read(file, run=run)
    done = 0
    if saved is not None:
        done = saved["steps"]
        generator.set_state(saved["generator"])
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
    last = time.monotonic()
    with Progress(steps, title) as progress:
        progress.skip(done)
        for number in range(done + 1, steps + 1):
            loss = step(number)
            if not math.isfinite(loss):
                raise NonFiniteError(f"the loss of step {number} is {loss}: the training diverged. Use a smaller rate.")
            progress.advance(1)
            if number == steps or time.monotonic() - last > _SECONDS:
                state = {"steps": number, "generator": generator.get_state()}
                state["parts"] = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.write(file, state, run=run)
                last = time.monotonic()
