"""A checkpoint: nested states of tensors, numbers and words in one file, old or new as a whole after any kill.

The tensors are safetensors; what is between them is JSON in its header; a SHA-256 of both ends the file. No pickle.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from recollect.errors import DtypeError, FormatError

_FORMAT = "recollect checkpoint 1"
_DIGEST = 32  # bytes


def write(path: Path, state: Mapping[str, Any], *, run: Mapping[str, Any]) -> None:
    """Writes a state, such as ``{"network": network.state_dict(), "optimizer": optimizer.state_dict()}``.

    Args:
        path: The file. Its folder is made if need be.
        state: Dictionaries, lists and tuples of tensors, numbers, strings, booleans and None.
        run: What a reader must ask for to get it: settings that JSON can hold.

    Raises:
        DtypeError: If the state or the settings hold something else; an old file stays as it is.
        OSError: If writing fails; an old file stays as it is.
    """
    tensors: dict[str, Tensor] = {}
    header = {"format": _FORMAT, "run": _as_text(run), "state": json.dumps(_encode(state, tensors))}
    data = save(tensors, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.write(hashlib.sha256(data).digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, *, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what ``write`` wrote, the tensors on the CPU, or None if there is no file.

    Raises:
        FormatError: If the file is something else, damaged, or of another run.
    """
    wanted = _as_text(run)
    if not path.exists():
        return None
    whole = path.read_bytes() if path.is_file() else b""
    data, digest = whole[:-_DIGEST], whole[-_DIGEST:]
    if hashlib.sha256(data).digest() != digest:
        raise FormatError(
            f"{path} is no checkpoint of recollect, or damaged. Delete it to start anew, or name another."
        )
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if header.get("format") != _FORMAT:
        raise FormatError(f"{path} is a checkpoint of another version. Delete it to start anew, or name another.")
    there, asked = json.loads(header["run"]), json.loads(wanted)
    if there != asked:
        none = object()
        other = sorted(k for k in there.keys() | asked.keys() if there.get(k, none) != asked.get(k, none))
        what = ", ".join(f"{k}={there.get(k, 'nothing')} there, {asked.get(k, 'nothing')} asked" for k in other)
        raise FormatError(f"{path} belongs to a run of other settings ({what}). Delete it, or name another file.")
    return _decode(json.loads(header["state"]), load(data))


def _as_text(run: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(run), sort_keys=True)
    except TypeError as error:
        raise DtypeError(f"the settings of a run must be what JSON can hold: {error}.") from error


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns ``value`` as JSON; dictionaries as pairs, since their keys may be numbers."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
            raise DtypeError(f"a checkpoint holds plain tensors of real numbers, got {value.dtype}, {value.layout}.")
        name = f"tensor-{len(tensors)}"
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping) and all(type(key) in {str, int} for key in value):
        return {"dict": [[key, _encode(part, tensors)] for key, part in value.items()]}
    if type(value) in {list, tuple, torch.Size}:
        return {"list" if type(value) is list else "tuple": [_encode(part, tensors) for part in value]}
    if value is None or type(value) in {bool, int, float, str}:
        return value
    raise DtypeError(
        f"a checkpoint holds tensors, numbers, strings, lists, tuples, and dictionaries of those by name or number, "
        f"got {type(value).__name__}."
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(part, tensors) for key, part in content}
    parts = [_decode(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else parts
