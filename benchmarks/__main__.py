"""``python -m benchmarks``: runs the benchmarks; see ``--help``."""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from benchmarks.case import Benchmark

NAMES = ("adaptation", "read", "write", "durable", "predict", "approximate", "continual", "language", "meta")
FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PAGE = FOLDER.parent / "docs" / "performance.md"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measures recollect against its baselines.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones ({', '.join(NAMES)}); default: all")
    parser.add_argument("--full", action="store_true", help="the whole grid, recorded in benchmarks/results")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5, as by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, help="where to write; default: a temporary folder without --full")
    parser.add_argument("--docs", action="store_true", help="measure nothing: put the records into docs/performance.md")
    chosen = parser.parse_args(words)
    unknown = set(chosen.names) - set(NAMES)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    if chosen.rounds < 5:
        parser.error("fewer than 5 rounds are no measurement")
    if chosen.threads is not None and chosen.threads < 1:
        parser.error("--threads must be at least 1")
    return chosen


def command(name: str, chosen: argparse.Namespace, *, threads: int, device: str) -> str:
    """Returns the command that measures this benchmark again, with what was left to the defaults spelled out."""
    full = " --full" if chosen.full else ""
    return f"python -m benchmarks {name}{full} --threads {threads} --rounds {chosen.rounds} --device {device}"


def main(words: list[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    chosen = arguments(words)
    import torch

    from benchmarks import report, runner
    from benchmarks.machine import threads_available

    if chosen.docs:
        report.update_page(PAGE, RESULTS)
        return 0
    threads = chosen.threads or threads_available()
    torch.set_num_threads(threads)
    limit_faiss(threads)
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = chosen.out or (RESULTS if chosen.full else Path(tempfile.gettempdir()) / "recollect-benchmarks")
    for name in chosen.names or NAMES:
        benchmark = cast("Benchmark", importlib.import_module(f"benchmarks.{name}"))
        again = command(name, chosen, threads=threads, device=device)
        settings = {"full": chosen.full, "device": torch.device(device), "rounds": chosen.rounds, "command": again}
        runner.run(benchmark, out, **settings)
    return 0


def limit_faiss(threads: int) -> None:
    """Gives faiss, where it is installed, as many threads as torch."""
    try:
        import faiss
    except ImportError:  # a benchmark that needs it says so itself
        return

    faiss.omp_set_num_threads(threads)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nBroken off: nothing was written of the benchmark that was running.", file=sys.stderr)
        sys.exit(130)
