"""Tiny-ImageNet: 200 classes of small photographs, decoded once into a cache of plain bytes."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from recollect.data.archives import fingerprint, pixels, read, write
from recollect.data.fetch import cache_folder, data_folder, fetch
from recollect.errors import FormatError

_NAME = "tiny-imagenet-200"
_ARCHIVE = f"tiny-imagenet/{_NAME}.zip"
_ANNOTATIONS = "val/val_annotations.txt"
_CLASSES, _TRAIN, _TEST, _SIDE = 200, 500, 50, 64


class Images(NamedTuple):
    """Photographs and their classes, row by row."""

    pixels: UInt8[Tensor, "n h w 3"]
    """Red, green, blue."""
    labels: Int[Tensor, " n"]

    def take(self, rows: Int[Tensor, " m"] | slice) -> "Images":
        """Returns the images of these rows."""
        return Images(self.pixels[rows], self.labels[rows])


class ImageClasses(NamedTuple):
    """A data set of images: what to learn from, what to be judged by, and what the labels mean."""

    train: Images
    test: Images
    names: tuple[str, ...]
    """A few words for each label."""


class _Class(NamedTuple):
    """The encoded files of one class."""

    train: list[str]
    test: list[str]


def tiny_imagenet(*, watch: Callable[[float], None] = lambda part: None) -> ImageClasses:
    """Returns Tiny-ImageNet: 500 images for training and 50 for the test of each of 200 classes, 64 x 64 pixels.

    It is read from the folder, zip or tar.xz called ``tiny-imagenet/tiny-imagenet-200`` in the data folder, or
    downloaded. The first call decodes all images (about a minute) into the cache folder, one file for each class; if it
    is stopped, the next one goes on. Labels count the classes in the order of their WordNet numbers, and images stand
    in the order of their file names, so all three sources give the same rows.

    The test images are the official validation images: the labels of the official test images are not public.

    Args:
        watch: Is told of each part of the decoding that is done; the parts sum to one.

    Raises:
        MissingDataError: If it is neither at hand nor can be downloaded, or cannot be read.
        MissingExtraError: If Pillow (or pooch, for a download) is not installed.
        FormatError: If an archive is cut short, a class or an image is missing, or an image cannot be decoded, by
            the file's name; nothing is cached then.
    """
    source = _find()
    cache = cache_folder() / "tiny-imagenet" / fingerprint(source)
    parts = decoded(source, cache, watch=watch)
    if len(parts) != _CLASSES or {len(images) for part in parts.values() for images in part[:2]} != {_TRAIN, _TEST}:
        _empty(cache)
        sizes = sorted({(len(part[0]), len(part[1])) for part in parts.values()})
        raise FormatError(
            f"{source} should hold {_CLASSES} classes of {_TRAIN} + {_TEST} images, but holds {len(parts)} classes of "
            f"{', '.join(f'{train} + {test}' for train, test in sizes)}. Fetch it again."
        )
    train, test, names = zip(*parts.values(), strict=True)
    return ImageClasses(_joined(train), _joined(test), names)


def decoded(
    source: Path, cache: Path, *, watch: Callable[[float], None] = lambda part: None
) -> dict[str, tuple[UInt8[Tensor, "n h w 3"], UInt8[Tensor, "m h w 3"], str]]:
    """Returns training images, test images and name of each class of a folder or archive laid out as Tiny-ImageNet.

    Args:
        source: The folder ``tiny-imagenet-200``, or a zip or tar.xz of it.
        cache: The folder for the decoded classes.
        watch: See ``tiny_imagenet``.

    Raises:
        MissingDataError, MissingExtraError, FormatError: See ``tiny_imagenet``.
    """
    index = cache / "classes.txt"
    try:
        if not index.exists():
            _decode(source, cache, watch)
        lines = index.read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines:
            raise FormatError(f"{index} in the cache is empty. Start again: the images are decoded anew.")
        return {wnid: (*_load(cache, wnid), name) for wnid, _, name in (line.partition("\t") for line in lines)}
    except FormatError:
        _empty(cache)
        raise


def _decode(source: Path, cache: Path, watch: Callable[[float], None]) -> None:
    """Decodes class after class into the cache; the list of classes is written last, and says that all are there."""
    files = read(source)
    classes = _layout(source, files)
    cache.mkdir(parents=True, exist_ok=True)
    for wnid, images in classes.items():
        if not (cache / f"{wnid}.safetensors").exists():
            parts = {
                name: pixels(source, files, paths, mode="RGB", side=_SIDE) for name, paths in images._asdict().items()
            }
            write(cache / f"{wnid}.safetensors", save(parts))
        watch(1 / len(classes))
    words = (line.partition("\t") for line in files.get("words.txt", b"").decode("utf-8", "replace").splitlines())
    names = {wnid: name for wnid, _, name in words}
    write(cache / "classes.txt", "".join(f"{wnid}\t{names.get(wnid, wnid)}\n" for wnid in classes).encode())


def _find() -> Path:
    folder = data_folder()
    if folder is not None:
        for name in (_NAME, f"{_NAME}.zip", f"{_NAME}.tar.xz"):
            if (folder / "tiny-imagenet" / name).exists():
                return folder / "tiny-imagenet" / name
    return fetch(_ARCHIVE)


def _layout(source: Path, files: Mapping[str, bytes]) -> dict[str, _Class]:
    """Returns which files belong to each class, the classes by WordNet number.

    Raises:
        FormatError: If a list or a class is missing, or classes differ in their number of images.
    """
    for name in ("wnids.txt", _ANNOTATIONS):
        if name not in files:
            raise FormatError(f"{source} holds no {name}, so it is no Tiny-ImageNet, or a part of it. Fetch it again.")
    wnids = sorted(set(files["wnids.txt"].decode("utf-8", "replace").split()))
    if not wnids:
        raise FormatError(f"wnids.txt in {source} names no class. Fetch it again.")
    folders: dict[str, list[str]] = defaultdict(list)
    for path in sorted(files):
        # What some systems leave beside each file begins with a dot.
        if path.startswith("train/") and path.endswith(".JPEG") and not PurePosixPath(path).name.startswith("."):
            folders[path.split("/")[1]].append(path)
    test: dict[str, list[str]] = defaultdict(list)
    for line in sorted(files[_ANNOTATIONS].decode("utf-8", "replace").splitlines()):
        name, _, rest = line.partition("\t")
        path = f"val/images/{name}"
        if path not in files:
            raise FormatError(f"{source} lacks {path}, which {_ANNOTATIONS} names. Fetch it again.")
        test[rest.partition("\t")[0]].append(path)
    for what, found in ((f"train/{{}}/images in {source}", folders), (f"{source}'s {_ANNOTATIONS}", test)):
        most = max((len(paths) for paths in found.values()), default=0)
        for wnid in wnids:
            if len(found[wnid]) != most or most == 0:
                raise FormatError(
                    f"{what.format(wnid)} holds {len(found[wnid])} images of class {wnid}, of other classes {most}. "
                    "Fetch it again."
                )
    return {wnid: _Class(folders[wnid], test[wnid]) for wnid in wnids}


def _load(cache: Path, wnid: str) -> tuple[UInt8[Tensor, "n h w 3"], UInt8[Tensor, "m h w 3"]]:
    file = cache / f"{wnid}.safetensors"
    try:
        parts = load_file(file)
        return parts["train"], parts["test"]
    except (SafetensorError, KeyError, FileNotFoundError) as error:
        raise FormatError(
            f"{file} in the cache is damaged ({error}). Start again: the images are decoded anew."
        ) from error


def _joined(parts: Sequence[UInt8[Tensor, "n h w 3"]]) -> Images:
    return Images(torch.cat(list(parts)), torch.arange(len(parts)).repeat_interleave(len(parts[0])))


def _empty(cache: Path) -> None:
    """Removes what was decoded, and nothing that somebody else may keep in the same folder."""
    for pattern in ("classes.txt", "*.safetensors", ".*.safetensors.*", ".classes.txt.*"):
        for path in cache.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # it holds other files, or another process has removed it
        cache.rmdir()
