"""The sinusoid experiment: its waves, its errors step by step, and a run."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from recollect.experiments.meta import maml_sinusoid
from recollect.experiments.meta.maml_sinusoid import MamlSinusoid, Scale, Waves, run, waves
from recollect.experiments.runner import Run
from recollect.models import mlp


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Scale(iterations=3, tasks=2, hidden=(5,), rates=(0.01, 0.02), valid=5, test=6)
    monkeypatch.setattr(maml_sinusoid, "SCALES", {"smoke": tiny})


def test_waves() -> None:
    some = waves(400, 7, 9, generator=torch.Generator().manual_seed(0))
    assert some.x.shape == (400, 7, 1)
    assert some.queries.shape == (400, 9, 1)
    assert some.x.min() >= -5
    assert some.x.max() <= 5
    amplitudes = []
    for x, y, new, answers in zip(*some, strict=True):
        # a sin(x - p) = a cos(p) sin(x) - a sin(p) cos(x): two numbers from all points
        basis = torch.cat([x.sin(), x.cos()], 1).double()
        found = torch.linalg.lstsq(basis, y.double()).solution
        torch.testing.assert_close((basis @ found).float(), y, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            (torch.cat([new.sin(), new.cos()], 1).double() @ found).float(), answers, rtol=1e-2, atol=1e-3
        )
        amplitudes.append(float(found.norm()))
        assert -1e-3 <= math.atan2(-float(found[1]), float(found[0])) <= math.pi + 1e-3
    assert 0.099 < min(amplitudes) < 0.3
    assert 4.8 < max(amplitudes) < 5.001


def test_waves_are_judged_at_equal_distances() -> None:
    some = waves(2, 3, None, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(some.queries[1, :, 0], torch.arange(-5.0, 5.05, 0.1))


def test_errors_are_those_of_gradient_descent_on_the_squared_error() -> None:
    net = mlp(1, 5, 1, generator=torch.Generator().manual_seed(0))
    some = waves(3, 4, None, generator=torch.Generator().manual_seed(1))
    found = maml_sinusoid._errors(net, 0.02, some)
    assert found.shape == (11, 3)
    for task in range(3):
        own = mlp(1, 5, 1)
        own.load_state_dict(net.state_dict())
        optimizer = torch.optim.SGD(own.parameters(), lr=0.02)
        for steps in range(11):
            error = (own(some.queries[task]) - some.answers[task]).square().mean()
            torch.testing.assert_close(found[steps, task], error.detach(), rtol=1e-4, atol=1e-6)
            optimizer.zero_grad()
            (own(some.x[task]) - some.y[task]).square().mean().backward()
            optimizer.step()


def test_the_rate_with_the_least_error_is_chosen() -> None:
    net = mlp(1, 5, 1, generator=torch.Generator().manual_seed(0))
    scale = Scale(rates=(1e-6, 0.02, 1e9), valid=20)  # too small, right, divergent
    assert maml_sinusoid._best_rate(net, scale, 5) == 0.02


def test_the_rate_is_not_chosen_on_the_waves_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged, real = [], maml_sinusoid._errors

    def errors(net: nn.Module, rate: float, some: Waves) -> torch.Tensor:
        judged.append(some.answers)  # at the same places for all: equal for equal waves
        return real(net, rate, some)

    monkeypatch.setattr(maml_sinusoid, "_errors", errors)
    scale = Scale(iterations=3, tasks=2, hidden=(5,), rates=(0.01, 0.02), valid=6, test=6)
    maml_sinusoid._measure(Run(tmp_path, {}), scale, "pretrained", 5)
    *chosen_on, test = judged
    assert len(chosen_on) == 2
    assert torch.equal(*chosen_on), "all rates are tried on the same waves"
    assert torch.cdist(chosen_on[0].flatten(1), test.flatten(1)).min() > 0.1


def test_a_run(tmp_path: Path) -> None:
    table = run(MamlSinusoid(out=tmp_path))
    assert table == (tmp_path / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    models = ("MAML", "MAML, first order", "pretrained")
    assert [(row["model"], row["shots"]) for row in rows] == [(m, shots) for shots in (5, 10) for m in models]
    assert all(len(row["mse"]) == len(row["interval"]) == 11 for row in rows)
    assert {row["rate"] for row in rows} <= {0.01, 0.02}
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "| 5 | MAML | ours |" in table
    assert "|  |  | paper | 0.67 | 0.38 | 0.35 |" in table
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(MamlSinusoid(out=tmp_path)) == table
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_both_orders_and_the_pretrained_network_differ(tmp_path: Path) -> None:
    run(MamlSinusoid(out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({tuple(row["mse"]) for row in rows}) == len(rows)
