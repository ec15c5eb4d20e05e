"""The data sets, as tensors in memory."""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from recollect.data.fetch import fetch
from recollect.errors import FormatError, MissingExtraError


class Dataset(NamedTuple):
    """Inputs and labels, row by row."""

    inputs: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]

    def take(self, rows: Int[Tensor, " m"] | slice) -> "Dataset":
        """Returns the examples of these rows."""
        return Dataset(self.inputs[rows], self.labels[rows])

    def batches(self, size: int, *, generator: torch.Generator | None = None) -> Iterator["Dataset"]:
        """Yields batches of ``size`` examples (the last may be smaller), shuffled where a generator is given."""
        if generator is None:
            rows = torch.arange(len(self.labels))
        else:
            rows = torch.randperm(len(self.labels), generator=generator)
        for part in rows.split(size):
            yield self.take(part)


def read_idx(path: Path) -> UInt8[Tensor, "..."]:
    """Reads a gzipped IDX file of unsigned bytes, the format of MNIST.

    Raises:
        FormatError: If the file is truncated or something else.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(f"{path} is no complete gzip file ({error}). Delete it and fetch it again.") from error
    dims = data[3] if len(data) > 3 else 0
    header = 4 + 4 * dims
    if len(data) < header or data[:3] != b"\x00\x00\x08" or dims == 0:
        raise FormatError(f"{path} is no IDX file of unsigned bytes. Delete it and fetch it again.")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if len(data) != header + math.prod(shape):
        raise FormatError(
            f"{path} should hold {math.prod(shape)} bytes for shape {shape}, but holds {len(data) - header}. "
            "Delete it and fetch it again."
        )
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).view(shape)


def mnist(part: str) -> Dataset:
    """Returns MNIST's ``"train"`` (60,000) or ``"test"`` (10,000) images as 784 pixels in [0, 1], and their labels.

    Raises:
        MissingDataError, MissingExtraError: See ``fetch``.
        FormatError: If a file is damaged.
    """
    prefix = {"train": "train", "test": "t10k"}[part]
    images = read_idx(fetch(f"mnist/{prefix}-images-idx3-ubyte.gz"))
    labels = read_idx(fetch(f"mnist/{prefix}-labels-idx1-ubyte.gz"))
    return Dataset(images.flatten(1).float() / 255, labels.long())


def digits() -> Dataset:
    """Returns the 1,797 handwritten digits that ship with scikit-learn, as 64 pixels in [0, 1].

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("digits() needs scikit-learn: pip install 'recollect[experiments]'.") from error
    pixels, labels = load_digits(return_X_y=True)
    return Dataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels, dtype=torch.long))
