"""Real MNIST and digits, and IDX files of every kind of damage."""

import gzip
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from recollect.data import Dataset, data_folder, digits, mnist
from recollect.data.datasets import read_idx
from recollect.errors import FormatError, MissingDataError, SettingError

MNIST = data_folder() is not None and (data_folder() / "mnist" / "train-images-idx3-ubyte.gz").is_file()
needs_mnist = pytest.mark.skipif(
    not MNIST, reason="MNIST is not here: set RECOLLECT_DATA to a folder that holds mnist/"
)


def idx(*shape: int, kind: int = 8) -> bytes:
    """Returns an IDX file that counts 0, 1, 2, ... modulo 256."""
    header = bytes([0, 0, kind, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    count = 1
    for size in shape:
        count *= size
    return header + bytes(i % 256 for i in range(count))


@needs_mnist
@pytest.mark.parametrize(("part", "count"), [("train", 60_000), ("test", 10_000)])
def test_mnist(part: str, count: int) -> None:
    data = mnist(part)
    assert data.inputs.shape == (count, 784)
    assert data.inputs.dtype == torch.float32
    assert (data.inputs.min().item(), data.inputs.max().item()) == (0.0, 1.0)
    assert data.labels.dtype == torch.long
    assert data.labels.unique().tolist() == list(range(10))


@needs_mnist
def test_mnist_is_the_real_one() -> None:
    train, test = mnist("train"), mnist("test")
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert train.inputs.mean().item() == pytest.approx(0.1307, abs=1e-4)  # the number that everyone normalizes with
    assert train.inputs.std().item() == pytest.approx(0.3081, abs=1e-4)
    one = test.inputs[2].view(28, 28)  # upright: taller than wide
    assert (one > 0).any(1).sum() > 2 * (one > 0).any(0).sum()


def test_mnist_has_two_parts() -> None:
    with pytest.raises(SettingError, match=r"\['train', 'test'\], got 'validation'"):
        mnist("validation")


def test_digits() -> None:
    data = digits()
    assert data.inputs.shape == (1797, 64)
    assert data.inputs.dtype == torch.float32
    assert (data.inputs.min().item(), data.inputs.max().item()) == (0.0, 1.0)
    assert data.labels[:10].tolist() == list(range(10))
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_batches_cover_everything_once(rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    data = Dataset(torch.arange(10.0)[:, None], torch.arange(10))
    assert [batch.labels.tolist() for batch in data.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with rng_untouched():
        shuffled = list(data.batches(4, generator=torch.Generator().manual_seed(0)))
    labels = torch.cat([batch.labels for batch in shuffled])
    assert labels.tolist() != list(range(10))
    assert labels.sort().values.tolist() == list(range(10))
    assert all(torch.equal(batch.inputs[:, 0], batch.labels.float()) for batch in shuffled)


def test_take() -> None:
    data = Dataset(torch.arange(10.0)[:, None], torch.arange(10))
    assert data.take(torch.tensor([3, 1])).labels.tolist() == [3, 1]
    assert data.take(slice(8, None)).inputs.tolist() == [[8.0], [9.0]]


@pytest.mark.parametrize("shape", [(7,), (3, 2, 5), (300, 2), (0, 28, 28)])
def test_idx_of_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx(*shape)))
    content = read_idx(path)
    assert content.shape == shape
    assert content.dtype == torch.uint8
    assert content.flatten().tolist() == [i % 256 for i in range(content.numel())]


GOOD = idx(2, 3)
DAMAGED = {
    "an empty file": (b"", "no IDX file"),
    "an empty gzip file": (gzip.compress(b""), "no IDX file"),
    "not compressed": (GOOD, "no complete gzip file"),
    "a web page": (b"<!DOCTYPE html><title>403</title>", "no complete gzip file"),
    "cut short": (gzip.compress(GOOD)[:-9], "no complete gzip file"),
    "cut in its header": (gzip.compress(GOOD)[:5], "no complete gzip file"),
    "a flipped bit": (gzip.compress(GOOD)[:-5] + b"\x00" + gzip.compress(GOOD)[-4:], "no complete gzip file"),
    "bytes after the gzip stream": (gzip.compress(GOOD) + b"more", "no complete gzip file"),
    "data cut short": (gzip.compress(GOOD[:-1]), r"should hold 6 bytes for shape \[2, 3\], but holds 5"),
    "bytes too many": (gzip.compress(GOOD + b"\x00"), r"should hold 6 bytes for shape \[2, 3\], but holds 7"),
    "two files in one": (gzip.compress(GOOD) * 2, "should hold 6 bytes"),
    "a header without sizes": (gzip.compress(GOOD[:6]), "no IDX file"),
    "no dimensions": (gzip.compress(b"\x00\x00\x08\x00\x01"), "no IDX file"),
    "floats": (gzip.compress(idx(2, 3, kind=13)), "no IDX file of unsigned bytes"),
    "text": (gzip.compress(b"label,pixel\n5,0\n"), "no IDX file"),
    "an absurd size": (gzip.compress(idx(2)[:4] + b"\xff\xff\xff\xff" + b"12"), "should hold 4294967295 bytes"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_idx(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "fetch it again" in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"gone.gz cannot be read: No such file"):
        read_idx(tmp_path / "gone.gz")


@pytest.mark.parametrize(
    ("images", "labels"),
    [((3, 28, 28), (2,)), ((3, 28, 27), (3,)), ((3, 784), (3,)), ((3,), (3, 28, 28)), ((3, 28, 28), (3, 1))],
)
def test_images_and_labels_must_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    (tmp_path / "mnist").mkdir()
    for kind, shape in (("images-idx3", images), ("labels-idx1", labels)):
        (tmp_path / "mnist" / f"t10k-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(*shape)))
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path))
    with pytest.raises(FormatError, match="should hold n images of 28 x 28 and n labels"):
        mnist("test")
