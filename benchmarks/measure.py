"""Measuring the contenders of a case: in turns, so that whatever else the machine does hits all of them alike."""

import ctypes
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import torch

from benchmarks.case import Call, Case
from benchmarks.machine import Rates, synchronize

LEAST_ROUNDS = 5
LEAST_SECONDS = 0.01  # of one measurement: a faster call is repeated within it
MOST_SECONDS = 20.0  # of one call: a contender that needs more is left out


class Result(TypedDict):
    """What was measured of one contender; times in seconds and memory in bytes, for one query."""

    wall: NotRequired[float]
    cpu: NotRequired[float]
    rounds: NotRequired[list[float]]
    ratio: NotRequired[float]
    peak: NotRequired[float | None]
    queries: NotRequired[int]
    left_out: NotRequired[str]


class Row(TypedDict):
    """A row of a table, as it is recorded."""

    group: str
    label: str
    ours: str
    queries: int
    contenders: dict[str, Result]
    floor: float
    over_floor: float
    read_rate: float
    copy_rate: float
    products_rate: float
    note: str
    extra: dict[str, str]


class _Seconds(NamedTuple):
    wall: float
    cpu: float


def measure(case: Case, *, rounds: int, rates: Callable[[], Rates], device: torch.device) -> Row:
    """Measures a case.

    Args:
        case: What to measure.
        rounds: How often each contender has its turn; the medians are reported.
        rates: Measures what the machine can do; asked before and after, as the clock drifts.
        device: Where the contenders compute.

    Raises:
        DisagreementError: If the contenders do not compute the same.
    """
    if case.check is not None:
        case.check()
    before = rates()
    queries = {name: case.fewer.get(name, case.queries) for name in case.contenders}
    results, repeats = _warm_up(case, queries, device)
    samples: dict[str, list[_Seconds]] = {name: [] for name in repeats}
    for turn in range(rounds):
        order = list(repeats)[turn % len(repeats) :] + list(repeats)[: turn % len(repeats)]
        for name in order:
            samples[name].append(_timed(case.contenders[name], repeats[name], device))
    for name, taken in samples.items():
        walls = [seconds.wall / queries[name] for seconds in taken]
        results[name]["wall"] = statistics.median(walls)
        results[name]["cpu"] = statistics.median(seconds.cpu for seconds in taken) / queries[name]
        results[name]["rounds"] = walls
        results[name]["queries"] = queries[name]
    return _row(case, results, before.best(rates()))


def _warm_up(case: Case, queries: Mapping[str, int], device: torch.device) -> tuple[dict[str, Result], dict[str, int]]:
    """Returns the peak memory of each contender, and how often to repeat it in one measurement."""
    results: dict[str, Result] = {}
    repeats: dict[str, int] = {}
    for name, call in case.contenders.items():
        first = _timed(call, 1, device).wall
        if first > MOST_SECONDS and name != case.ours:
            results[name] = {"left_out": f"> {MOST_SECONDS:.0f} s a call"}
            continue
        peak = peak_bytes(call, device)
        results[name] = {"peak": None if peak is None else peak / queries[name]}
        repeats[name] = 1 if first > 1 else _repeats(call, device)
    return results, repeats


def _repeats(call: Call, device: torch.device) -> int:
    repeats, seconds = 1, _timed(call, 1, device).wall
    while seconds * repeats < LEAST_SECONDS:
        repeats = max(repeats + 1, math.ceil(1.2 * LEAST_SECONDS / max(seconds, 1e-7)))
        seconds = _timed(call, repeats, device).wall
    return repeats


def _timed(call: Call, repeats: int, device: torch.device) -> _Seconds:
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return _Seconds((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Returns by how much the memory in use rises while ``call`` runs; None where the system does not say.

    On a CPU this is resident memory, by whichever library it is taken: memory that the allocator holds in reserve
    from earlier calls is first given back, or it would hide what the call takes.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts anew from what is in use
        before = _memory("VmRSS")
    except OSError:  # not Linux, or not allowed
        return None
    call()
    return max(0, _memory("VmHWM") - before)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _trim() -> None:
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only


def _row(case: Case, results: dict[str, Result], rates: Rates) -> Row:
    walls = {name: result["wall"] for name, result in results.items() if "wall" in result}
    for name, wall in walls.items():
        results[name]["ratio"] = wall / walls[case.ours]
    floor = rates.floor(case.work) / case.queries
    derived = {} if case.derived is None else case.derived(walls)
    return {
        "group": case.group,
        "label": case.label,
        "ours": case.ours,
        "queries": case.queries,
        "contenders": {
            **{name: results[name] for name in case.contenders},
            **{name: {"left_out": why} for name, why in case.left_out.items()},
        },
        "floor": floor,
        "over_floor": walls[case.ours] / floor if floor else math.inf,
        "read_rate": rates.read[max(rates.read)],
        "copy_rate": rates.copy[max(rates.copy)],
        "products_rate": rates.products,
        "note": case.note,
        "extra": {**case.extra, **derived},
    }
