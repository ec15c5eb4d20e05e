"""JSON in and out: what a request says, checked by hand, as thousands of numbers come with each.

Errors name the place, what came, what is needed and what to do.
"""

import itertools
import json
import math
from array import array
from typing import NamedTuple, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from recollect.errors import SettingError
from recollect.serve.problems import RefusedError
from recollect.serve.service import require_name

LARGEST = 3.4028234663852886e38  # of float32
_KEY = 200  # characters of an idempotency key at most
_TEXT = 100_000  # characters of an input at most

Object = dict[str, object]


class Rows(NamedTuple):
    """Inputs as they came: numbers one after the other, or texts."""

    size: int
    numbers: array
    texts: list[str]


def joined(parts: list[Rows], shape: tuple[int, ...] | None) -> Float[Tensor, "b ..."] | list[str]:
    """Returns the inputs of several requests as one batch."""
    if shape is None:
        return [text for part in parts for text in part.texts]
    numbers = array("f")
    for part in parts:
        numbers.extend(part.numbers)
    return torch.frombuffer(numbers, dtype=torch.float32).view(-1, *shape)


def parse(body: bytes, fields: frozenset[str], needed: frozenset[str]) -> Object:
    """Returns the object that a body holds.

    Raises:
        RefusedError: If it holds no JSON object, or not these fields.
    """
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
    except RefusedError:
        raise
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            400,
            "not_json",
            got=f"a body that is no JSON ({type(error).__name__}: {str(error)[:200]})",
            need=f"a JSON object with {_listed(needed)}",
            do="Send the body as UTF-8 JSON.",
        ) from error
    need = f"a JSON object with {_listed(needed)}"
    if not isinstance(content, dict):
        raise wrong("the body", content, need)
    if missing := needed - content.keys():
        raise _unfit("missing_field", f"no {_listed(missing)}", need, f"Add {_listed(missing)}.")
    if more := content.keys() - fields:
        name = min(more)[:_KEY].encode("ascii", "backslashreplace").decode()
        raise _unfit("unknown_field", f"a field {name!r}", f"no fields but {_listed(fields)}", "Leave it out.")
    return content


def inputs(value: object, shape: tuple[int, ...] | None, most: int, name: str = "inputs") -> Rows:
    """Returns a batch of inputs.

    Args:
        value: What the request says.
        shape: That of one input; None for texts.
        most: The largest number of inputs.
        name: Of the field.

    Raises:
        RefusedError: If it is not that.
    """
    if type(value) is not list or not value:
        raise wrong(name, value, f"a list of 1 to {most} inputs")
    if len(value) > most:
        raise _unfit("too_many", f"{len(value)} {name}", f"at most {most} in one request", "Send several requests.")
    if shape is None:
        return Rows(len(value), array("f"), [_text(text, f"{name}[{row}]") for row, text in enumerate(value)])
    level = value
    need = f"a nested list of numbers of shape {list(shape)}"
    for axis, size in enumerate(shape):
        for place, part in enumerate(level):
            if type(part) is not list or len(part) != size:
                row = place // math.prod(shape[:axis])
                raise wrong(f"{name}[{row}]", part, f"{need} (here {size} elements)", "wrong_shape")
        level = list(itertools.chain.from_iterable(level))
    if not set(map(type, level)) <= {int, float}:
        place = next(place for place, number in enumerate(level) if type(number) not in (int, float))
        raise wrong(f"{name}[{place // math.prod(shape)}]", level[place], f"{need}, and no other elements")
    if not (min(level) >= -LARGEST and max(level) <= LARGEST):
        place = next(place for place, number in enumerate(level) if not abs(number) <= LARGEST)
        got = f"a number beyond float32 in {name}[{place // math.prod(shape)}]"
        raise _unfit("not_finite", got, f"numbers from -{LARGEST:.3g} to {LARGEST:.3g}", "Scale the inputs down.")
    return Rows(len(value), array("f", level), [])


def labels(value: object, count: int) -> list[str]:
    """Returns the names of the classes that inputs belong to.

    Raises:
        RefusedError: If it is not one for each input, or one cannot be a name.
    """
    if type(value) is not list or len(value) != count:
        raise wrong("labels", value, f"a list of {count} labels, one for each input")
    for row, label in enumerate(value):
        try:
            require_name(label)
        except SettingError as error:
            need = "the name of a class, a text of 1 to 100 printable characters"
            raise wrong(f"labels[{row}]", label, need) from error
    return value


def idempotency_key(header: str | None, content: Object) -> str | None:
    """Returns the key of a request, from its header or from its body.

    Raises:
        RefusedError: If the two differ, or it is no short text.
    """
    field = content.get("idempotency_key")
    if "idempotency_key" in content and type(field) is not str:
        raise wrong("idempotency_key", field, "a text")
    if header is not None and field is not None and header != field:
        got = "another key in the Idempotency-Key header than in the body"
        raise _unfit("two_keys", got, "one idempotency key", "Leave one of them out.")
    key = str(field) if header is None and field is not None else header
    if key is not None and not (0 < len(key) <= _KEY and key.isascii() and key.isprintable()):
        need = f"1 to {_KEY} printable ASCII characters, such as a UUID"
        raise _unfit("bad_key", f"an idempotency key of {len(key)} characters", need, "Make another key.")
    return key


def slot(text: str, capacity: int) -> int:
    """Returns the slot that an address names.

    Raises:
        RefusedError: If it is none of this memory.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) < capacity):
        shown = text[:40].encode("ascii", "backslashreplace").decode()
        need = f"a slot from 0 to {capacity - 1}"
        raise _unfit("no_slot", f"the slot {shown!r}", need, "Take a slot from an answer of observe or explain.")
    return int(text)


def time(text: str | None) -> int | None:
    """Returns the write time that an address names, if it does.

    Raises:
        RefusedError: If it is none.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        shown = text[:40].encode("ascii", "backslashreplace").decode()
        need = "a write time, a whole number of at least 0"
        raise _unfit("no_time", f"written={shown!r}", need, "Take it from an answer of explain, or leave it out.")
    return int(text)


def wrong(where: str, value: object, need: str, code: str = "wrong_type") -> RefusedError:
    """Returns the error for a value that is not what it should be."""
    return _unfit(code, f"{_described(value)} as {where}", need, f"Correct {where}; nothing was stored.")


def _unfit(code: str, got: str, need: str, do: str) -> RefusedError:
    return RefusedError(422, code, got=got, need=need, do=do)


def _text(value: object, where: str) -> str:
    if type(value) is not str or len(value) > _TEXT:
        raise wrong(where, value, f"a text of at most {_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates
        raise wrong(where, value, "a text that UTF-8 can hold") from error
    return value


def _described(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        return "an empty text" if not value else f"the text {json.dumps(value[:40])}"
    return "a huge number" if isinstance(value, int) and abs(value) > 10**18 else json.dumps(value)


def _listed(names: frozenset[str] | set[str]) -> str:
    return " and ".join(repr(name) for name in sorted(names))


def _refuse_constant(name: str) -> NoReturn:
    raise RefusedError(
        422,
        "not_finite",
        got=f"{name}, which is no JSON",
        need="finite numbers",
        do="Look for what made it in your inputs; nothing was stored.",
    )
