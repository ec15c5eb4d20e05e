"""The benchmark of continual learning: its baselines compute what recollect does, and it says who is missing."""

import pytest
import torch

from benchmarks import avalanche_lib, continual, floors, learning
from benchmarks.case import Case, Work
from benchmarks.checks import DisagreementError
from benchmarks.machine import Rates
from benchmarks.measure import measure
from benchmarks.report import line

CPU = torch.device("cpu")
SMALL = continual.Scale(
    sizes=(12, 7, 5, 3), tasks=4, examples=300, earlier=200, short=30, strength=1e4, fewer=20, capacity=50
)


@pytest.fixture(autouse=True)
def _without_avalanche(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avalanche_lib, "installed", lambda: False)


@pytest.mark.parametrize("number", range(continual.count(True)))
def test_contenders_agree(number: int) -> None:
    case = continual._makers(True, SMALL)[number](CPU)
    assert case.check is not None
    case.check()
    assert case.ours in case.contenders


def test_a_penalty_that_does_nothing_is_not_measured() -> None:
    case = continual._epoch(SMALL._replace(strength=0.0), CPU)
    assert case.check is not None
    with pytest.raises(DisagreementError, match="could be missing"):
        case.check()


def test_importances_that_differ_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = learning.fisher

    def doubled(*args: torch.Tensor) -> learning.Importances:
        return {name: 2 * part for name, part in right(*args).items()}

    monkeypatch.setattr(learning, "fisher", doubled)
    case = continual._fisher("exact", SMALL, CPU)
    assert case.check is not None
    with pytest.raises(DisagreementError, match=r"loop, 0\.weight differs"):
        case.check()


@pytest.mark.parametrize("full", [False, True])
def test_has_as_many_cases_as_it_says(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continual, "Scale", lambda: SMALL)
    assert len(list(continual.cases(full, CPU))) == continual.count(full)


def test_says_how_to_get_who_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(continual, "Scale", lambda: SMALL)
    case = next(continual.cases(False, CPU))
    assert "pip install --no-deps 'torchvision==0.15.2' 'avalanche-lib==0.6.0'" in capsys.readouterr().out
    assert dict(case.left_out) == {"Avalanche": "not installed", "Avalanche, no penalty": "not installed"}


def test_who_is_left_out_is_recorded() -> None:
    case = Case("sums", "n=9", {"ours": lambda: sum(range(9))}, "ours", Work(9, 0), 1, left_out={"others": "not here"})
    row = measure(case, rounds=5, rates=lambda: Rates({1: 1e9}, {1: 1e9}, 1e9), device=CPU)
    assert row["contenders"]["others"] == {"left_out": "not here"}
    assert "others not here" in line(1, 1, row)


def test_floors_count_by_hand() -> None:
    # 5-7-3: weights of 35 and 21. Outputs and gradients of the weights, and those at the second layer's inputs.
    assert floors.epoch((5, 7, 3), 10, batch=4).multiply_adds == 10 * (2 * 56 + 21)
    assert floors.epoch((5, 7, 3), 10, batch=4).bytes == 4 * (3 * 4 * 56 + 10 * 5)
    assert floors.importances((5, 7, 3), 10, directions=3).multiply_adds == 10 * (2 * 56 + 3 * 21)
    assert floors.importances((5, 7, 3), 10, directions=3).bytes == 4 * 10 * 5
    assert floors.sample(10, 5, capacity=10).bytes == 2 * 4 * 10 * 5
