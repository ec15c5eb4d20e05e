"""What one adapted prediction costs by the number of entries: the figures that docs/scaling.md reckons with.

``python -m benchmarks.scaling`` needs 10 GB of RAM and a quarter of an hour. The search and the adaptation count, on
one thread; what makes the keys does not. Times are the processor's, so that other work on the machine matters less.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks import memories
from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
from recollect.memory import ApproximateIndex, ExactIndex, Index

_SIZE, _CLASSES, _NEIGHBORS, _STEPS = 512, 100, 50, 10
_TURNS = {1: 25, 32: 7}
"""Batch: how often."""


def resident() -> int:
    """Returns the process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(slots: int, index: Index) -> tuple[float, float, dict[int, float]]:
    """Fills a memory and predicts from it.

    Returns:
        Resident bytes per entry, entries written per second, and seconds per prediction by batch.
    """
    cpu = torch.device("cpu")
    keys, before, begun = memories.features(_SIZE, cpu), resident(), time.process_time()
    memory = memories.filled(keys, slots, _SIZE, classes=_CLASSES, device=cpu, index=index)
    model = MbPA(
        nn.Linear(_SIZE, _CLASSES),
        memory,
        neighbors=_NEIGHBORS,
        adaptation=LocalAdaptation(rules.sgd(0.1), steps=_STEPS),
    ).eval()
    rate, each = slots / (time.process_time() - begun), dict[int, float]()
    for batch, turns in _TURNS.items():
        queries = memories.queries(keys, batch * (turns + 1), cpu).split(batch)
        model(queries[0])
        seconds = []
        for part in queries[1:]:
            begun = time.process_time()
            model(part)
            seconds.append((time.process_time() - begun) / batch)
        each[batch] = statistics.median(seconds)
    return (resident() - before) / slots, rate, each


def recall(slots: int) -> float:
    """Returns which part of the true neighbors the approximate search finds."""
    cpu = torch.device("cpu")
    keys = memories.features(_SIZE, cpu)
    queries = memories.queries(keys, 100, cpu)
    found = []
    for index in (ExactIndex(), ApproximateIndex()):
        memory: EpisodicMemory = memories.filled(keys, slots, _SIZE, device=cpu, index=index)
        found.append(memory.read(queries, neighbors=_NEIGHBORS).slots)
        del memory
    return float((found[0].unsqueeze(2) == found[1].unsqueeze(1)).any(2).float().mean())


def main(words: list[str] | None = None) -> int:
    """Measures what the command line asks for, and prints a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000, 1_000_000])
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    print("| entries | index | RAM per entry | written | B=1 | B=32, each | recall of 50 |")
    print("|---|---|---|---|---|---|---|")
    for slots in chosen.entries:
        for name, index in (("exact", ExactIndex()), ("approximate", ApproximateIndex())):
            size, rate, each = measure(slots, index)
            found = "1" if name == "exact" else f"{recall(slots):.4f}"
            cells = [f"{slots:,}", name, f"{size / 1000:.1f} kB", f"{rate:,.0f}/s"]
            cells += [*(f"{1000 * seconds:.2f} ms" for seconds in each.values()), found]
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
