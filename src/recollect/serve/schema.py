"""What OpenAPI says of requests and answers, for one service: the shape of its inputs, its limits."""

from typing import Any

from recollect.serve.service import Service
from recollect.serve.settings import Settings
from recollect.serve.wire import LARGEST

Schema = dict[str, Any]

_KEY = {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[ -~]*$"}
_SLOT = {"type": "integer", "minimum": 0}
_NUMBERS = {"type": "array", "items": {"type": "number"}}
_NAMES = {"type": "array", "items": {"type": "string"}}
_PREDICTION = {
    "type": "object",
    "required": ["label", "probabilities"],
    "properties": {"label": {"type": "string"}, "probabilities": _NUMBERS},
}
_CLASSES = {"type": "array", "items": {"type": ["string", "null"]}, "description": "Of each output; null: room."}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "got", "need", "do"],
            "properties": {name: {"type": "string"} for name in ("code", "got", "need", "do")},
        }
    },
}
_MEANINGS = {
    400: "No JSON, or no HTTP.",
    401: "No token, or a wrong one.",
    404: "There is no such thing.",
    405: "Another method.",
    408: "The body did not arrive in time.",
    409: "The slot holds another entry by now.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    421: "Without a token, the service answers to loopback names only.",
    422: "The request cannot be taken: what came, what is needed, what to do.",
    429: "Too much is waiting.",
    503: "Not in time, or the memory cannot be written just now.",
    507: "The disk is full.",
}
_ALWAYS = (400, 401, 404, 405, 421)


def answers(schema: Schema | None, *statuses: int, status: int = 200) -> dict[int | str, Schema]:
    """Returns what an endpoint answers: its result, and the errors that it may have."""
    good: Schema = {"description": "The answer."}
    if schema is not None:
        good["content"] = _json(schema)
    errors = {code: {"description": _MEANINGS[code], "content": _json(_ERROR)} for code in (*_ALWAYS, *statuses)}
    return {status: good, **errors}


def body(properties: Schema, *needed: str) -> Schema:
    """Returns what an endpoint takes."""
    content = {"type": "object", "required": list(needed), "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": _json(content)}}


def one_input(service: Service) -> Schema:
    """Returns the schema of one input."""
    if service.input_shape is None:
        return {"type": "string", "maxLength": 100_000}
    schema: Schema = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
    for size in reversed(service.input_shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return schema


def many_inputs(service: Service, settings: Settings) -> Schema:
    """Returns the schema of a batch of inputs."""
    return {"type": "array", "items": one_input(service), "minItems": 1, "maxItems": settings.inputs}


def labels(settings: Settings) -> Schema:
    """Returns the schema of the labels of a batch."""
    name = {"type": "string", "minLength": 1, "maxLength": 100}
    return {"type": "array", "items": name, "minItems": 1, "maxItems": settings.inputs}


KEY_FIELD: Schema = {"idempotency_key": _KEY}
KEY_HEADER: Schema = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": _KEY,
    "description": "A request that is repeated with its key is answered as before and written once.",
}
SLOT_PATH: Schema = {"name": "slot", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}}
WRITTEN_QUERY: Schema = {
    "name": "written",
    "in": "query",
    "required": False,
    "schema": {"type": "integer", "minimum": 0},
    "description": "Forget only if the slot still holds what was written at this time.",
}
PREDICTED: Schema = {
    "type": "object",
    "required": ["predictions"],
    "properties": {"predictions": {"type": "array", "items": _PREDICTION}},
}
OBSERVED: Schema = {
    "type": "object",
    "required": ["slots", "labels", "new_classes", "entries"],
    "properties": {
        "slots": {"type": "array", "items": _SLOT},
        "labels": _NAMES,
        "new_classes": _NAMES,
        "entries": {"type": "integer"},
    },
}
EXPLAINED: Schema = {
    "type": "object",
    "required": ["before", "after", "classes", "exact", "neighbors"],
    "properties": {
        "before": _PREDICTION,
        "after": _PREDICTION,
        "classes": _CLASSES,
        "exact": {"type": "boolean"},
        "neighbors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["slot", "label", "weight", "distance", "contributions", "written", "input"],
                "properties": {
                    "slot": _SLOT,
                    "label": {"type": "string"},
                    "weight": {"type": "number"},
                    "distance": {"type": "number"},
                    "contributions": _NUMBERS,
                    "written": {"type": ["integer", "null"]},
                    "input": {},
                },
            },
        },
    },
}
FORGOTTEN: Schema = {
    "type": "object",
    "required": ["slot", "entries"],
    "properties": {"slot": _SLOT, "entries": {"type": "integer"}},
}
MODEL: Schema = {
    "type": "object",
    "required": ["classes", "room", "input_shape", "is_picture", "entries", "capacity", "samples", "limits"],
    "properties": {
        "classes": _CLASSES,
        "room": {"type": "integer"},
        "input_shape": {"type": ["array", "null"], "items": {"type": "integer"}},
        "is_picture": {"type": "boolean"},
        "entries": {"type": "integer"},
        "capacity": {"type": "integer"},
        "samples": {"type": "array"},
        "limits": {"type": "object"},
    },
}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}
