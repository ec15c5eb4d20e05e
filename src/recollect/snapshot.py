"""A snapshot: a folder of a description and tensors, old or new as a whole whenever the writer is killed.

    config.json                     the description, the size and SHA-256 of the tensor file, a SHA-256 of itself
    tensors-<hash>.safetensors      the tensors by name

A folder changes from the old snapshot to the new one in a single step, the replacement of config.json. By then
the new tensor file lies beside the old one, under another name. ``persistence`` knows what descriptions say.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recollect.errors import DtypeError, FormatError, MissingDataError

_FORMAT, _VERSION = "recollect", 1
_CONFIG = "config.json"
_TENSORS = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")

Tensors = dict[str, Shaped[Tensor, "..."]]
Description = dict[str, Any]  # what JSON can hold


def write(folder: Path, description: Description, tensors: Tensors) -> None:
    """Makes ``folder`` a snapshot, or replaces the one in it.

    Raises:
        DtypeError: If a tensor cannot be stored.
        FormatError: If ``folder`` is a file, or holds something other than a snapshot. It stays as it is.
        OSError: If writing fails. An old snapshot stays as it is.
    """
    folder = folder.resolve()  # through a link, so that the partial folder lies on the same file system
    _require_ours(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir()
        name = _write_files(partial, description, tensors)
        if folder.exists():
            _replace(folder, partial, name)
        else:
            partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(folder: Path) -> tuple[Description, Tensors]:
    """Returns what ``write`` wrote, the tensors on the CPU. Nothing on disk changes.

    Raises:
        MissingDataError: If there is no such folder.
        FormatError: If it is no complete and undamaged snapshot of this format version.
    """
    if not folder.exists():
        raise MissingDataError(f"there is no folder {folder}. Pass the folder that save wrote.")
    while True:
        config = _read_config(folder)
        try:
            return config, _read_tensors(folder, **config["tensors"])
        except FileNotFoundError as error:
            if _read_config(folder) == config:  # else a new snapshot has replaced the one that we were reading
                raise FormatError(
                    f"{folder} lacks {error.filename}, which its config.json names. Save again."
                ) from error


def _require_ours(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FormatError(f"{folder} is a file. Name a folder that does not exist yet, or that holds an older save.")
    names = {path.name for path in folder.iterdir()}
    if _CONFIG in names:
        _parse(folder / _CONFIG)
    elif not all(map(_TENSORS.fullmatch, names)):  # a first save here may have been killed before config.json came
        raise FormatError(f"{folder} is not empty and holds no save of recollect. Name a new or an empty folder.")


def _remove_leftovers(folder: Path) -> None:
    leftover = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{16}}\.partial")
    for path in folder.parent.iterdir():
        if leftover.fullmatch(path.name):
            shutil.rmtree(path)


def _write_files(folder: Path, description: Description, tensors: Tensors) -> str:
    """Writes a complete snapshot into an empty folder, through to the disk; returns the tensor file's name."""
    unnamed, config = folder / "tensors", folder / _CONFIG
    try:
        save_file(_storable(tensors), unnamed)
    except (KeyError, ValueError) as error:
        raise DtypeError(f"a tensor cannot be stored as safetensors: {error}. Convert it with .to().") from error
    except SafetensorError as error:  # all that it reports when it writes are errors of the file system
        raise OSError(f"{unnamed}: {error}") from error
    digest = _digest(unnamed)
    path = unnamed.rename(folder / f"tensors-{digest[:16]}.safetensors")
    stated = {"file": path.name, "size": path.stat().st_size, "sha256": digest}
    content = {"format": _FORMAT, "version": _VERSION, "library": _library(), "tensors": stated, **description}
    config.write_text(json.dumps(content | {"sha256": _seal(content)}, indent=1))
    path.chmod(config.stat().st_mode)  # safetensors makes files that only their owner may read
    for written in (path, config, folder):
        _sync(written)
    return path.name


def _storable(tensors: Tensors) -> Tensors:
    """Returns the tensors contiguous, on the CPU, each with a storage of its own."""
    stored: Tensors = {}
    storages = set()
    for name, tensor in tensors.items():
        packed = tensor.detach().cpu().contiguous()
        if packed.untyped_storage().data_ptr() in storages:
            packed = packed.clone()
        storages.add(packed.untyped_storage().data_ptr())
        stored[name] = packed
    return stored


def _replace(folder: Path, partial: Path, tensors: str) -> None:
    """Moves the snapshot in ``partial`` into ``folder``, in the place of an older one."""
    os.replace(partial / tensors, folder / tensors)
    _sync(folder)
    os.replace(partial / _CONFIG, folder / _CONFIG)  # from here on the new snapshot counts
    _sync(folder)
    for path in folder.iterdir():
        if _TENSORS.fullmatch(path.name) and path.name != tensors:
            path.unlink()


def _parse(path: Path) -> Description:
    """Returns what is in a config.json if it is one of ours, of any version."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FormatError(f"{path.parent} is no save of recollect: it holds no {_CONFIG}.") from error
    except NotADirectoryError as error:
        raise FormatError(f"{path.parent} is a file; pass the folder that save wrote.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged, or not recollect's: {error}. Use another folder.") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise FormatError(f'{path} is not recollect\'s: it does not say "format": "{_FORMAT}". Use another folder.')
    return config


def _read_config(folder: Path) -> Description:
    config = _parse(folder / _CONFIG)
    version, seal = config.get("version"), config.pop("sha256", None)
    if version != _VERSION:
        raise FormatError(
            f"{folder} has format version {version!r} (written by recollect {config.get('library')}), and this "
            f"recollect reads version {_VERSION}. Update recollect: pip install -U recollect."
        )
    if seal != _seal(config):
        raise FormatError(f"{folder / _CONFIG} is damaged: its SHA-256 is {_seal(config)}, need {seal}. Save again.")
    return config


def _read_tensors(folder: Path, file: str, size: int, sha256: str) -> Tensors:
    path = folder / file
    if not _TENSORS.fullmatch(file):
        raise FormatError(f"{folder / _CONFIG} names the tensor file {file!r}, need a name like tensors-<hash>.")
    if path.stat().st_size != size:
        raise FormatError(f"{path} is truncated: got {path.stat().st_size} bytes, need {size}. Save again.")
    if (digest := _digest(path)) != sha256:
        raise FormatError(f"{path} is damaged: got the SHA-256 {digest}, need {sha256}. Save again.")
    try:
        with safe_open(path, "pt", device="cpu") as opened:
            # The file is only mapped; a clone is aligned as torch aligns, and the last bit can depend on that.
            names = opened.keys()
            return {name: opened.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise FormatError(f"{path} is no safetensors file: {error}. Save again.") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(config: Description) -> str:
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()


def _library() -> str:
    try:
        return metadata.version("recollect")
    except metadata.PackageNotFoundError:
        return "unknown, as it was not installed"


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
