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
from recollect.errors import FormatError, MissingDataError, MissingExtraError, SettingError

_PREFIX = {"train": "train", "test": "t10k"}
_REMEDY = "Delete it and fetch it again."


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
        FormatError: If the file is truncated, has bytes too many, or is something else.
        MissingDataError: If the file cannot be read.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(f"{path} is no complete gzip file ({error}). {_REMEDY}") from error
    except OSError as error:
        raise MissingDataError(f"{path} cannot be read: {error.strerror}.") from error
    dims = data[3] if len(data) > 3 else 0
    header = 4 + 4 * dims
    if len(data) < header or data[:3] != b"\x00\x00\x08" or dims == 0:
        raise FormatError(f"{path} is no IDX file of unsigned bytes. {_REMEDY}")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if len(data) != header + math.prod(shape):
        raise FormatError(
            f"{path} should hold {math.prod(shape)} bytes for shape {shape}, but holds {len(data) - header}. {_REMEDY}"
        )
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).view(shape)


def mnist(part: str) -> Dataset:
    """Returns MNIST's ``"train"`` (60,000) or ``"test"`` (10,000) images as 784 pixels in [0, 1], and their labels.

    Raises:
        SettingError: If ``part`` is neither.
        MissingDataError, MissingExtraError: See ``fetch``.
        FormatError: If a file is damaged, or images and labels do not belong together.
    """
    if part not in _PREFIX:
        raise SettingError(f"part must be one of {list(_PREFIX)}, got {part!r}.")
    files = [fetch(f"mnist/{_PREFIX[part]}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]
    images, labels = (read_idx(file) for file in files)
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise FormatError(
            f"{files[0]} and {files[1]} should hold n images of 28 x 28 and n labels, but hold shapes "
            f"{tuple(images.shape)} and {tuple(labels.shape)}. Delete both and fetch them again."
        )
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
