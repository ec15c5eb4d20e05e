"""The machine: what it is, and how fast it moves bytes and multiplies matrices with the threads that are measured."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.case import Work

SIZES = (2**22, 2**25, 2**28)  # bytes of the arrays that the bandwidth is measured with: in the caches to far beyond


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def threads_available() -> int:
    """Returns how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def describe(device: torch.device) -> dict[str, str | int]:
    """Returns what a reader needs to know to compare numbers with those of another machine."""
    versions = {}
    for package in ("torch", "faiss-cpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # only where it takes part
        versions["avalanche-lib"] = importlib.metadata.version("avalanche-lib")
    accelerator = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    cores, threads = threads_available(), torch.get_num_threads()
    return {"cpu": _cpu(), **accelerator, "cores": cores, "threads": threads, "system": system, **versions}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Rates:
    """What the machine can do.

    Args:
        read: Bytes read in a second, by the size of the array in bytes.
        copy: Bytes read and written in a second (both counted), likewise.
        products: Floating point operations in a second in float32 matrix products.
    """

    read: dict[int, float]
    copy: dict[int, float]
    products: float

    def best(self, other: "Rates") -> "Rates":
        """Returns the better of each rate: what is slower was held up by others."""
        read = {size: max(rate, other.read[size]) for size, rate in self.read.items()}
        copy = {size: max(rate, other.copy[size]) for size, rate in self.copy.items()}
        return Rates(read, copy, max(self.products, other.products))

    def floor(self, work: Work) -> float:
        """Returns the seconds below which nobody does ``work`` in float32 on this machine, however it is written."""
        bandwidth = self.read if work.moves == "read" else self.copy
        footprint = work.bytes if work.footprint is None else work.footprint
        # Of an array between two of the sizes we know only that it is no faster than the smaller one.
        size = max((size for size in bandwidth if size <= footprint), default=min(bandwidth))
        return max(work.bytes / bandwidth[size], 2 * work.multiply_adds / self.products)


def measure_rates(device: torch.device) -> Rates:
    """Measures the rates; they drift with the clock and with other users of the machine, so measure them often."""
    source = torch.ones(SIZES[-1] // 4, device=device)
    target = torch.ones_like(source)
    read, copy = {}, {}
    for size in reversed(SIZES):
        part, place = source[: size // 4], target[: size // 4]
        rate = size / fastest(functools.partial(torch.sum, part), device)
        read[size] = max([rate, *read.values()])  # small arrays are no slower; what shows otherwise is the call itself
        rate = 2 * size / fastest(functools.partial(place.copy_, part), device)
        copy[size] = max([rate, *copy.values()])
    return Rates(read, copy, _products(device))


def _products(device: torch.device) -> float:
    """Returns the best rate of two forms of the same product."""
    slots, size, batch = 2**14, 784, 256
    generator = torch.Generator(device).manual_seed(0)
    keys = torch.randn(slots, size, device=device, generator=generator)
    queries = torch.randn(batch, size, device=device, generator=generator)
    # A 1x1 convolution is the same product and runs in oneDNN, which can be twice as fast as MKL (on AMD).
    image = keys.view(64, 1, slots // 64, size).permute(0, 3, 1, 2)
    forms = (
        functools.partial(torch.mm, queries, keys.mT),
        functools.partial(torch.nn.functional.conv2d, image, queries[:, :, None, None]),
    )
    return 2 * slots * size * batch / min(fastest(form, device) for form in forms)


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of the fastest of a few calls after a first one."""
    call()
    synchronize(device)
    seconds, started = [], time.perf_counter()
    while len(seconds) < 5 or (time.perf_counter() - started < 0.02 and len(seconds) < 200):
        before = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - before)
    return min(seconds)
