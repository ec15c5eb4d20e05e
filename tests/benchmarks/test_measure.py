"""How the benchmarks measure: floors, turns, peaks, checks, and that the baselines are worth comparing with."""

import functools
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import adaptation, floors, memories
from benchmarks.case import Case, Work
from benchmarks.checks import DisagreementError, agree, same
from benchmarks.machine import Rates, describe, measure_rates
from benchmarks.measure import measure, peak_bytes

CPU = torch.device("cpu")
RATES = Rates(read={2**20: 4e9, 2**24: 1e9}, copy={2**20: 2e9, 2**24: 5e8}, products=1e9)


def rates() -> Rates:
    return RATES


def example() -> Case:
    return Case(
        group="numbers",
        label="a sum",
        contenders={"ours": lambda: sum(range(200)), "theirs": lambda: sum(range(400))},
        ours="ours",
        work=Work(multiply_adds=100, bytes=0),
        queries=4,
    )


def test_floor_is_the_slower_of_moving_and_multiplying() -> None:
    assert RATES.floor(Work(multiply_adds=1e9, bytes=4e9)) == pytest.approx(4.0)
    assert RATES.floor(Work(multiply_adds=4e9, bytes=4e9)) == pytest.approx(8.0)
    assert RATES.floor(Work(multiply_adds=0, bytes=1e9, moves="copy")) == pytest.approx(2.0)


def test_floor_of_what_fits_the_caches_is_lower() -> None:
    assert RATES.floor(Work(multiply_adds=0, bytes=4e9, footprint=2**22)) == pytest.approx(1.0)
    assert RATES.floor(Work(multiply_adds=0, bytes=4e3)) == pytest.approx(1e-6)


def test_better_rates_are_the_better_of_each() -> None:
    other = replace(RATES, products=3e9, read={2**20: 1e9, 2**24: 2e9})
    assert RATES.best(other) == Rates(read={2**20: 4e9, 2**24: 2e9}, copy=RATES.copy, products=3e9)


def test_machine_is_described_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.machine.SIZES", (2**12, 2**18))
    assert describe(CPU)["threads"] == torch.get_num_threads()
    found = measure_rates(CPU)
    assert found.products > 0
    assert set(found.read) == set(found.copy) == {2**12, 2**18}
    assert found.read[2**12] >= found.read[2**18] > 0


def test_floors_count_by_hand() -> None:
    # 2 queries, 3 neighbors of size 5, 7 classes, 2 steps: 105 + 45 + 15 before the steps, then 63, 21 and 35.
    assert floors.linear(5, 7, 2, 3, steps=2).multiply_adds == 2 * (105 + 45 + 15 + 63 + 21 + 35)
    assert floors.linear(5, 7, 2, 3, steps=1).multiply_adds == 2 * (105 + 15 + 21 + 35)
    assert floors.linear(5, 7, 2, 3, steps=1).bytes == 4 * (2 * (15 + 5 + 7) + 35)
    assert floors.mlp((5, 7), 2, 3, steps=2) == floors.linear(5, 7, 2, 3, steps=2)
    assert floors.search(10, 5, 2) == Work(100, 200)
    assert floors.together(floors.search(10, 5, 2), Work(1, 2)) == Work(101, 202)


def test_measures_each_contender_for_one_query() -> None:
    row = measure(replace(example(), fewer={"theirs": 2}), rounds=5, rates=rates, device=CPU)
    ours, theirs = row["contenders"]["ours"], row["contenders"]["theirs"]
    assert len(ours["rounds"]) == len(theirs["rounds"]) == 5
    assert ours["wall"] == sorted(ours["rounds"])[2]
    assert theirs["ratio"] == theirs["wall"] / ours["wall"]
    assert row["floor"] == pytest.approx(2 * 100 / 1e9 / 4)
    assert row["over_floor"] == ours["wall"] / row["floor"]


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(0.011)  # long enough not to be repeated

    calls = {name: functools.partial(call, name) for name in ("ours", "b", "c")}
    measure(replace(example(), contenders=calls), rounds=5, rates=rates, device=CPU)
    changes = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert changes[:3] == ["ours", "b", "c"]  # the warm-up
    assert changes[3:6] == ["ours", "b", "c"]
    assert changes[6:9] == ["b", "c", "ours"]


def test_leaves_out_who_is_far_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.MOST_SECONDS", 1e-9)
    row = measure(example(), rounds=5, rates=rates, device=CPU)
    assert row["contenders"]["theirs"] == {"left_out": "> 0 s a call"}
    assert "wall" in row["contenders"]["ours"]


def test_derives_columns_from_times() -> None:
    case = replace(example(), extra={"a": "1"}, derived=lambda walls: {"b": f"{len(walls)}"})
    assert measure(case, rounds=5, rates=rates, device=CPU)["extra"] == {"a": "1", "b": "2"}


def test_peak_sees_what_a_call_takes() -> None:
    peak = peak_bytes(lambda: torch.ones(2**24), CPU)
    if peak is None:
        pytest.skip("this system does not say")
    assert 0.9 * 2**26 < peak < 1.5 * 2**26


def test_wrong_results_are_not_measured() -> None:
    def check() -> None:
        same("theirs", torch.ones(2), torch.zeros(2), tolerance=0.1)

    with pytest.raises(DisagreementError, match="theirs differs from ours by 1, of outputs up to 1"):
        measure(replace(example(), check=check), rounds=5, rates=rates, device=CPU)
    with pytest.raises(DisagreementError):
        same("theirs", torch.ones(2), torch.full((2,), torch.nan), tolerance=0.1)


def test_search_results_agree_by_distance() -> None:
    keys, queries = torch.arange(10.0).unsqueeze(1), torch.tensor([[0.2]])
    right, wrong = torch.tensor([[0, 1]]), torch.tensor([[0, 2]])
    agree(keys, queries, {"ours": right, "theirs": right.flip(1)})
    with pytest.raises(DisagreementError, match="nearer"):
        agree(keys, queries, {"ours": wrong, "theirs": right})
    with pytest.raises(DisagreementError, match="farther"):
        agree(keys, queries, {"ours": right, "theirs": wrong})


@pytest.mark.parametrize("rule", ["sgd", "rmsprop", "adam"])
def test_the_baselines_adapt_as_we_do(rule: str) -> None:
    case = adaptation._case(adaptation._linear(7, 12, 5, 3, rule=rule), 4, CPU)
    assert case.check is not None
    case.check()


@pytest.mark.parametrize("full", [False, True])
def test_adaptation_has_as_many_cases_as_it_says(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "_case", lambda *_: example())
    assert len(list(adaptation.cases(full, CPU))) == adaptation.count(full)


@pytest.mark.parametrize("maker", [memories.normal, memories.clustered, memories.features])
def test_memories_are_filled_the_same_each_time(maker) -> None:
    first, second = (memories.filled(maker(6, CPU), 100, 6, device=CPU) for _ in range(2))
    assert len(first) == 100
    assert torch.equal(first.keys, second.keys)
    assert not torch.isin(memories.queries(maker(6, CPU), 3, CPU)[:, 0], first.keys[:, 0][first.keys[:, 0] != 0]).any()
