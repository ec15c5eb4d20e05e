"""The benchmark of learning to learn: its baselines compute what recollect does."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from benchmarks import floors, meta, oneself
from benchmarks.checks import DisagreementError

CPU = torch.device("cpu")
SMALL = meta.Scale(waves=3, drawings=2, ways=3, episodes=2, steps=6, inputs=7, hidden=5, slots=9, width=4, reads=2)


@pytest.mark.parametrize("number", range(meta.count(True)))
def test_contenders_agree(number: int) -> None:
    case = meta._makers(SMALL)[number](CPU)
    assert case.check is not None
    case.check()
    assert set(case.contenders) == {"recollect", "loop"}
    for call in case.contenders.values():
        call()


def test_gradients_that_differ_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = oneself.maml

    def slower(net: nn.Module, tasks: Iterable[tuple[Tensor, ...]], *, rate: float, loss: oneself.Loss) -> list[Tensor]:
        return right(net, tasks, rate=0.9 * rate, loss=loss)

    monkeypatch.setattr(oneself, "maml", slower)
    case = meta._sinusoid(SMALL, CPU)
    assert case.check is not None
    with pytest.raises(DisagreementError, match="the loop differs"):
        case.check()


def test_has_as_many_cases_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta, "Scale", lambda: SMALL)
    assert len(list(meta.cases(False, CPU))) == meta.count(False)


def test_floors() -> None:
    assert floors.maml(2, 10, tasks=3, support=4, queries=5, numbers=7) == floors.Work(
        3 * (4 * (8 + 90) + 5 * (4 + 30)), 56
    )
    work = floors.mann(7, 5, 3, slots=9, width=4, reads=2, episodes=2, steps=6)
    weights = 4 * 5 * (8 + 5) + 5 * 2 * 5 + 13 * 3
    assert work.multiply_adds == 12 * (2 * 140 + 3 * (weights + 3 * 9 * 8))
    assert work.bytes == 8 * (140 + weights)
