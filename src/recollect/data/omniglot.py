"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people, decoded once for every size."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recollect.data.archives import fingerprint, pixels, read, write
from recollect.data.fetch import cache_folder, data_folder, fetch
from recollect.errors import FormatError, SettingError, require_whole

_SIDE, _DRAWINGS = 105, 20
_CHARACTERS = {"background": 964, "evaluation": 659}
_NAMES, _PIXELS = "names", "pixels"


class Characters(NamedTuple):
    """Handwritten characters: each is a class, with a row of drawings."""

    pixels: UInt8[Tensor, "c n h w"]
    """The share of each pixel's area that is ink, in 255ths."""
    names: tuple[str, ...]
    """Alphabet and character, such as ``"Greek/character01"``."""
    background: Int[Tensor, " b"]
    """Rows of the 30 alphabets that the authors give for learning."""
    evaluation: Int[Tensor, " e"]
    """Rows of the 20 alphabets that they give for the test."""


def omniglot(size: int = 28, *, watch: Callable[[float], None] = lambda part: None) -> Characters:
    """Returns Omniglot: 20 drawings of each of 1,623 characters, ``size`` x ``size`` pixels, ink on an empty ground.

    It is read from the folders or zips called ``omniglot/images_background`` and ``omniglot/images_evaluation`` in the
    data folder, or downloaded. The first call for a size decodes all drawings (seconds) into the cache folder, one file
    for each of the two; if it is stopped, the next one goes on. Characters stand in the order of their paths, those of
    the background set first, and drawings in the order of their file names (a number for each of the 20 people), so
    all sources give the same rows.

    For a network of convolutions, ``pixels[:, :, None]`` has a dimension for the channel. ``pixels`` and its rows
    are what ``episodes`` and ``sequences`` take; for splits see ``class_split``.

    Source: Lake et al. (2015), *Human-level concept learning through probabilistic program induction*, Science 350;
    https://github.com/brendenlake/omniglot.

    *Differs from published code:* drawings are scaled by exact averages over areas. The code of MAML asks Pillow for
    Lanczos' filter, but Pillow takes the nearest pixel in black-and-white images, whatever it is asked for. Public code
    for MANN also divides each image by its largest value, which here is 0.97 on average for 20 x 20 pixels.

    Args:
        size: Pixels on a side, at most the 105 of the drawings. 28 is that of MAML, 20 that of MANN.
        watch: Is told of each part of the decoding that is done; the parts sum to one.

    Raises:
        SettingError: If ``size`` is not from 1 to 105.
        MissingDataError: If it is neither at hand nor can be downloaded, or cannot be read.
        MissingExtraError: If Pillow (or pooch, for a download) is not installed.
        FormatError: If an archive is cut short, a character or a drawing is missing, or an image cannot be decoded, by
            the file's name; nothing of that archive is cached then.
    """
    require_whole("size", size)
    if size > _SIDE:
        raise SettingError(f"size must be at most {_SIDE}, that of the drawings, got {size}.")
    sources = {part: _find(part) for part in _CHARACTERS}
    files = {
        part: cache_folder() / "omniglot" / fingerprint(source) / f"{size}.safetensors"
        for part, source in sources.items()
    }
    wanted = {part: count for part, count in _CHARACTERS.items() if not files[part].exists()}
    for part, count in wanted.items():
        _decode(sources[part], files[part], count, size, watch, step=1 / sum(wanted.values()))
    (first, names), (second, more) = (_load(files[part], _CHARACTERS[part], size) for part in _CHARACTERS)
    rows = torch.arange(len(first) + len(second))
    return Characters(torch.cat([first, second]), names + more, *rows.split([len(first), len(second)]))


def shrunk(ink: UInt8[Tensor, "*n h w"], size: int) -> UInt8[Tensor, "*n size size"]:
    """Returns the share of ink in each of ``size`` x ``size`` equal areas of square images, in 255ths.

    Areas that cut through pixels count their parts. All numbers before the last rounding are whole, so every machine
    gives the same.

    Args:
        ink: 1 where there is ink, else 0.
        size: Areas on a side.

    Example:
        >>> import torch
        >>> shrunk(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.uint8), 2)
        tensor([[227,  57],
                [ 57,   0]], dtype=torch.uint8)
    """
    side = ink.shape[-1]
    # In units of 1 / size pixels: where an area of width side meets a pixel of width size.
    areas, squares = torch.arange(size)[:, None] * side, torch.arange(side)[None] * size
    overlap = torch.minimum(areas + side, squares + size) - torch.maximum(areas, squares)
    weights: Float[Tensor, "size h"] = overlap.clamp(min=0).float()
    sums = (weights @ ink.float() @ weights.T).long()  # at most side ** 2, far below where float32 skips whole numbers
    return ((2 * 255 * sums + side**2) // (2 * side**2)).to(torch.uint8)


def _find(part: str) -> Path:
    folder = data_folder()
    if folder is not None:
        for name in (f"images_{part}", f"images_{part}.zip"):
            if (folder / "omniglot" / name).exists():
                return folder / "omniglot" / name
    return fetch(f"omniglot/images_{part}.zip")


def _decode(
    source: Path, file: Path, characters: int, size: int, watch: Callable[[float], None], *, step: float
) -> None:
    """Decodes all drawings of a folder or archive into one file of the cache."""
    files = read(source)
    drawings = _layout(source, files, characters)
    found = torch.empty(characters, _DRAWINGS, size, size, dtype=torch.uint8)
    for row, paths in enumerate(drawings.values()):
        ink = pixels(source, files, paths, mode="L", side=_SIDE) < 128  # black on white
        found[row] = shrunk(ink.to(torch.uint8), size)
        watch(step)
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, save({_PIXELS: found}, metadata={_NAMES: "\n".join(drawings)}))


def _layout(source: Path, files: Mapping[str, bytes], characters: int) -> dict[str, list[str]]:
    """Returns the drawings of each character, both in the order of their paths.

    Raises:
        FormatError: If a character or a drawing is missing, or is too many.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path in map(PurePosixPath, sorted(files)):
        # What some systems leave beside each file begins with a dot.
        if path.suffix == ".png" and len(path.parts) == 3 and not path.name.startswith("."):
            found[path.parent.as_posix()].append(path.as_posix())
    for name, paths in found.items():
        if len(paths) != _DRAWINGS:
            raise FormatError(f"{name} in {source} should hold {_DRAWINGS} drawings, but holds {len(paths)}.")
    if len(found) != characters:
        raise FormatError(f"{source} should hold {characters} characters, but holds {len(found)}. Fetch it again.")
    return found


def _load(file: Path, characters: int, size: int) -> tuple[UInt8[Tensor, "c n h w"], tuple[str, ...]]:
    try:
        with safe_open(file, "pt") as content:
            found, names = content.get_tensor(_PIXELS), content.metadata()[_NAMES].split("\n")
        if found.shape != (characters, _DRAWINGS, size, size) or len(names) != characters:
            raise SafetensorError(f"{len(names)} names, pixels of shape {tuple(found.shape)}")
    except (SafetensorError, KeyError, TypeError, FileNotFoundError) as error:  # None, for no metadata, is no mapping
        file.unlink(missing_ok=True)
        raise FormatError(
            f"{file} in the cache is damaged ({error}). Start again: the drawings are decoded anew."
        ) from error
    return found, tuple(names)
