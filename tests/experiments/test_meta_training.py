"""A training goes on where it was stopped, as if it had not been."""

from pathlib import Path

import pytest
import torch
from oracles.bits import bits
from torch import nn

from recollect.errors import FormatError, NonFiniteError
from recollect.experiments.meta import training
from recollect.experiments.meta.training import train


def go(folder: Path, *, steps: int = 7, stop: int = 0, bad: int = 0, rate: float = 0.1) -> tuple[object, list[int]]:
    """Trains a layer on random numbers; at ``stop`` it is interrupted, at ``bad`` the loss is NaN."""
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(generator=g)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    seen = []

    def step(number: int) -> float:
        if number == stop:
            raise KeyboardInterrupt
        seen.append(number)
        loss = net(torch.randn(4, 3, generator=g)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float("nan") if number == bad else loss.item()

    parts = {"net": net, "optimizer": optimizer}
    train(folder, "a net, 3 inputs", parts, run={"rate": rate}, generator=g, steps=steps, step=step)
    return bits((net.state_dict(), optimizer.state_dict(), g.get_state())), seen


@pytest.mark.parametrize("stop", [1, 2, 5, 7])
def test_a_stop_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    whole, seen = go(tmp_path / "whole")
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    monkeypatch.setattr(training, "_SECONDS", -1.0)  # every step is saved
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", stop=stop)
    again, seen = go(tmp_path / "stopped")
    assert again == whole
    assert seen == list(range(stop, 8))


def test_what_was_not_saved_is_done_again(tmp_path: Path) -> None:
    whole, _ = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", stop=4)
    assert not (tmp_path / "stopped").exists(), "a minute has not gone by"
    assert go(tmp_path / "stopped") == (whole, [1, 2, 3, 4, 5, 6, 7])


def test_a_finished_training_is_loaded(tmp_path: Path) -> None:
    whole, _ = go(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["a-net-3-inputs.checkpoint"]
    assert go(tmp_path / "run") == (whole, [])


def test_a_longer_training_goes_on(tmp_path: Path) -> None:
    go(tmp_path / "run", steps=3)
    assert go(tmp_path / "run") == (go(tmp_path / "whole")[0], [4, 5, 6, 7])


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="the loss of step 7 is nan: the training diverged"):
        go(tmp_path / "run", bad=7)
    assert not (tmp_path / "run").exists(), "nothing of it is kept"


def test_the_file_of_another_training(tmp_path: Path) -> None:
    go(tmp_path / "run")
    with pytest.raises(FormatError, match=r"rate=0\.1 there, 0\.2 asked"):
        go(tmp_path / "run", rate=0.2)
