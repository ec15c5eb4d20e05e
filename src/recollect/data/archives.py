"""Folders and archives of pictures: told apart, read whole, decoded; and files that are written whole or not at all."""

import hashlib
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import UInt8
from torch import Tensor

from recollect.errors import FormatError, MissingDataError, MissingExtraError

# RuntimeError and ValueError are what zipfile raises at flags, methods and names that make no sense.
_BROKEN = (
    *(EOFError, OSError, RuntimeError, ValueError),
    *(lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error),
)


def fingerprint(source: Path) -> str:
    """Returns what tells this source from another: an archive's SHA-256, or the names and sizes of a folder's files.

    Raises:
        MissingDataError: If it cannot be read.
    """
    if source.is_dir():
        files = sorted(f"{path.relative_to(source).as_posix()} {path.stat().st_size}" for path in source.rglob("*.*"))
        return hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    try:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise MissingDataError(f"{source} cannot be read: {error.strerror}.") from error


def read(source: Path) -> dict[str, bytes]:
    """Returns the content of all files of a folder, zip or tar.xz by their path below the topmost folder.

    Raises:
        FormatError: If an archive is damaged.
        MissingDataError: If a file cannot be read.
    """
    try:
        if source.is_dir():
            return {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
        members = _zip(source) if source.suffix == ".zip" else _tar(source)
        return {"/".join(PurePosixPath(name).parts[1:]): content for name, content in members}
    except (FileNotFoundError, PermissionError) as error:
        raise MissingDataError(f"{error.filename or source} cannot be read: {error.strerror}.") from error
    except _BROKEN as error:
        raise FormatError(f"{source} is cut short or damaged ({error}). Fetch it again.") from error


def _zip(source: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield member.filename, archive.read(member)


def _tar(source: Path) -> Iterator[tuple[str, bytes]]:
    with lzma.open(source) as whole:
        with tarfile.open(fileobj=whole, mode="r|") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, file.read()
        while whole.read(1 << 20):  # only at its end is it known that nothing is missing; tarfile stops earlier
            pass


def pixels(
    source: Path, files: Mapping[str, bytes], paths: Sequence[str], *, mode: str, side: int
) -> UInt8[Tensor, "n h w *channels"]:
    """Returns the square pictures of some files.

    Args:
        source: Where the files come from, for messages.
        files: Their contents by path.
        paths: Which of them.
        mode: Pillow's ``"RGB"``, three channels, or ``"L"``, gray without a dimension for channels.
        side: How many pixels high and wide each must be.

    Raises:
        MissingExtraError: If Pillow is not installed.
        FormatError: If one cannot be decoded or has another size.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("decoding images needs Pillow: pip install 'recollect[experiments]'.") from error
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    found = torch.empty(len(paths), *shape, dtype=torch.uint8)
    for place, path in enumerate(paths):
        try:
            with Image.open(io.BytesIO(files[path])) as image:
                size = image.size
                content = image.convert(mode).tobytes() if size == (side, side) else b""
        except UnidentifiedImageError as error:
            raise FormatError(f"{path} in {source} cannot be decoded: it is no image. Fetch it again.") from error
        except (Image.DecompressionBombError, OSError, SyntaxError) as error:
            raise FormatError(f"{path} in {source} cannot be decoded ({error}). Fetch it again.") from error
        if size != (side, side):
            raise FormatError(f"{path} in {source} should have {side} x {side} pixels, but has {size[0]} x {size[1]}.")
        found[place] = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)
    return found


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
