"""What nested states hold, so that ``==`` compares them bit for bit."""

import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def bits(value: Any) -> Any:
    """Returns ``value`` with every tensor as its dtype, shape and a hash of its bytes, and every float as its bytes;
    a NaN is a NaN."""
    if isinstance(value, Tensor):
        flat = value.detach().resolve_conj().resolve_neg().contiguous().flatten()
        return "tensor", value.dtype, tuple(value.shape), hashlib.sha1(flat.view(torch.uint8).numpy()).hexdigest()
    if isinstance(value, Mapping):
        return "dict", [(type(key), key, bits(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(part) for part in value]
    if isinstance(value, float):
        return type(value), struct.pack("d", math.nan if math.isnan(value) else value)
    return type(value), value
