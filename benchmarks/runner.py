"""Running a benchmark: its cases one by one, a line for each, and the record at the very end."""

import functools
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.case import Benchmark
from benchmarks.machine import describe, measure_rates
from benchmarks.measure import Row, measure


def run(
    benchmark: Benchmark, out: Path, *, full: bool, device: torch.device, rounds: int, command: str
) -> report.Record:
    """Measures all cases of a benchmark and records them.

    Nothing is written before the last case is measured: a run that is broken off leaves the last record as it was.

    Args:
        benchmark: The module.
        out: The folder for the record.
        full: The whole grid instead of the quick one.
        device: Where to compute.
        rounds: How many.
        command: What reproduces this run.
    """
    total = benchmark.count(full)
    cases = benchmark.cases(full, device)
    rows: list[Row] = []
    rates = functools.partial(measure_rates, device)
    print(f"{benchmark.TITLE} ({total} rows)", flush=True)
    for number in range(1, total + 1):
        # The case gets no name here: one would keep its arrays while the next ones are made.
        rows.append(measure(next(cases), rounds=rounds, rates=rates, device=device))
        print(report.line(number, total, rows[-1]), flush=True)
    record: report.Record = {
        "name": benchmark.NAME,
        "title": benchmark.TITLE,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(device),
        "rows": rows,
    }
    report.write(record, out)
    print(f"Recorded in {out / benchmark.NAME}.md and .json\n", flush=True)
    return record
