"""``application``: the endpoints of a service, as an ASGI application."""

import functools
import importlib.resources
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from recollect.errors import MissingExtraError
from recollect.serve import schema, wire
from recollect.serve.batching import Gatherer, too_slow
from recollect.serve.engine import Engine, Observation, Prediction
from recollect.serve.guard import ClientGoneError, Guard, read_body
from recollect.serve.metrics import TYPE, Metrics
from recollect.serve.problems import RefusedError
from recollect.serve.settings import Settings
from recollect.serve.wire import Object, Rows

try:
    from fastapi import FastAPI, Request, Response
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtraError("recollect serve needs FastAPI: pip install 'recollect[serve]'.") from error

_PAGE = {
    "page.js": "text/javascript",
    "draw.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
_ABOUT = (
    "Predictions by a network whose output layer fits itself to its memories. What is observed counts from the next "
    "prediction on; nothing is trained."
)
_WORDS = {404: "no_such_address", 405: "wrong_method"}

Endpoint = Callable[[Request], Awaitable[Response]]


class Desk:
    """The endpoints: each reads a request, has it worked on, and writes the answer.

    Args:
        engine: What does the work, in the worker thread.
        settings: The limits.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self.metrics = Metrics(entries=lambda: engine.entries, capacity=engine.memory.capacity)
        self._gatherer: Gatherer[Rows, list[Prediction]] = Gatherer(
            engine.predict,
            most=settings.gather,
            wait=settings.wait,
            room=settings.queue,
            seconds=settings.timeout,
            told=self.metrics.batch,
        )
        self.metrics.waiting(lambda: self._gatherer.size)
        self._samples = self._shown_samples()
        self._page = {name: _file(name) for name in ("index.html", *_PAGE)}

    async def predict(self, request: Request) -> Response:
        """Predicts the class of each input."""
        content = await self._object(request, "inputs")
        rows = wire.inputs(content["inputs"], self._engine.service.input_shape, self._settings.inputs)
        predictions = await self._gatherer.submit(rows, rows.size)
        return _json({"predictions": [prediction._asdict() for prediction in predictions]})

    async def observe(self, request: Request) -> Response:
        """Writes inputs and their labels to the memory; committed before it is answered."""
        content = await self._object(request, "inputs", "labels", optional="idempotency_key")
        rows = wire.inputs(content["inputs"], self._engine.service.input_shape, self._settings.inputs)
        labels = wire.labels(content["labels"], rows.size)
        key = wire.idempotency_key(request.headers.get("idempotency-key"), content)
        job = functools.partial(self._engine.observe, Observation(rows, labels, key))
        observed = await self._gatherer.alone(job, rows.size)
        if not observed.is_replay:
            self.metrics.observed.inc(rows.size)
        replayed = {"idempotency-replayed": "true"} if observed.is_replay else None
        return Response(observed.text, headers=replayed, media_type="application/json")

    async def explain(self, request: Request) -> Response:
        """Says what each neighbor in the memory has added to one prediction."""
        content = await self._object(request, "input")
        rows = wire.inputs([content["input"]], self._engine.service.input_shape, 1, "input")
        return _json(await self._gatherer.alone(functools.partial(self._engine.explain, rows), 1))

    async def forget(self, request: Request) -> Response:
        """Removes one entry from the memory, at once and for good."""
        slot = wire.slot(request.path_params["slot"], self._engine.memory.capacity)
        written = wire.time(request.query_params.get("written"))
        entries = await self._gatherer.alone(functools.partial(self._engine.forget, slot, written), 1)
        self.metrics.forgotten.inc()
        return _json({"slot": slot, "entries": entries})

    async def model(self, request: Request) -> Response:
        """Says what is served: classes, inputs, the size of the memory."""
        engine, settings = self._engine, self._settings
        return _json(
            {
                "classes": engine.classes(),
                "room": engine.room,
                "input_shape": engine.service.input_shape,
                "is_picture": engine.service.is_picture,
                "entries": engine.entries,
                "capacity": engine.memory.capacity,
                "samples": self._samples,
                "limits": {"body": settings.body, "inputs": settings.inputs, "queue": settings.queue},
            }
        )

    async def healthy(self, request: Request) -> Response:
        """Says that the process answers."""
        return _json({"healthy": True})

    async def ready(self, request: Request) -> Response:
        """Says whether predictions can be made: not while the model is stuck."""
        if self._gatherer.is_stuck:
            raise too_slow(self._settings.timeout, begun=False)
        return _json({"ready": True, "entries": self._engine.entries})

    async def count(self, request: Request) -> Response:
        """Shows the counters for Prometheus."""
        return Response(self.metrics.text(), headers={"content-type": TYPE})

    async def page(self, request: Request) -> Response:
        """Shows the page."""
        return Response(self._page["index.html"], media_type="text/html")

    async def part(self, request: Request) -> Response:
        """Shows what belongs to the page."""
        name = request.path_params["name"]
        if name not in _PAGE:
            raise HTTPException(404)
        return Response(self._page[name], media_type=_PAGE[name])

    def close(self) -> bool:
        """Finishes what was begun; returns whether the model has, within the time for a request."""
        is_done = self._gatherer.close(self._settings.timeout)
        if is_done:
            self._engine.close()
        return is_done

    async def _object(self, request: Request, *needed: str, optional: str | None = None) -> Object:
        settings = self._settings
        body = await read_body(request.scope, request.receive, most=settings.body, seconds=settings.timeout)
        fields = {*needed} | ({optional} if optional else set())
        return wire.parse(body, frozenset(fields), frozenset(needed))

    def _shown_samples(self) -> list[dict[str, Any]]:
        samples = self._engine.service.samples
        if samples is None:
            return []
        rows = (
            samples.inputs if isinstance(samples.inputs, list) else samples.inputs.double().round(decimals=4).tolist()
        )
        return [{"label": label, "input": row} for row, label in zip(rows, samples.labels, strict=True)]


def application(engine: Engine, settings: Settings) -> FastAPI:
    """Returns the service as an ASGI application, which closes the engine when it is shut down."""
    desk = Desk(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.is_done = desk.close()

    app = FastAPI(title="recollect", description=_ABOUT, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.is_done = True  # unless the end finds the model at work
    _add(app, desk, engine, settings)
    app.add_exception_handler(RefusedError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_address)
    app.add_exception_handler(ClientGoneError, _nobody)
    app.add_exception_handler(Exception, _broken)
    app.add_middleware(Guard, token=settings.token, told=desk.metrics.answered)
    return app


def _add(app: FastAPI, desk: Desk, engine: Engine, settings: Settings) -> None:
    service, answers = engine.service, schema.answers
    sent, busy = (408, 413, 415, 422), (429, 503)
    many, one = {"inputs": schema.many_inputs(service, settings)}, {"input": schema.one_input(service)}
    taught = many | {"labels": schema.labels(settings)} | schema.KEY_FIELD

    def add(method: str, path: str, endpoint: Endpoint, responses: Mapping[int | str, Any], extra: Any = None) -> None:
        app.add_api_route(path, endpoint, methods=[method], responses=dict(responses), openapi_extra=extra)

    add("POST", "/v1/predict", desk.predict, answers(schema.PREDICTED, *sent, *busy), schema.body(many, "inputs"))
    extra = schema.body(taught, "inputs", "labels") | {"parameters": [schema.KEY_HEADER]}
    add("POST", "/v1/observe", desk.observe, answers(schema.OBSERVED, *sent, *busy, 507), extra)
    add("POST", "/v1/explain", desk.explain, answers(schema.EXPLAINED, *sent, *busy), schema.body(one, "input"))
    extra = {"parameters": [schema.SLOT_PATH, schema.WRITTEN_QUERY]}
    add("DELETE", "/v1/memories/{slot}", desk.forget, answers(schema.FORGOTTEN, 409, 422, *busy, 507), extra)
    add("GET", "/v1/model", desk.model, answers(schema.MODEL))
    add("GET", "/healthz", desk.healthy, answers({"type": "object"}))
    add("GET", "/readyz", desk.ready, answers({"type": "object"}, 503))
    for path, endpoint in (("/metrics", desk.count), ("/", desk.page), ("/page/{name}", desk.part)):
        app.add_api_route(path, endpoint, include_in_schema=False)


def _file(name: str) -> bytes:
    return importlib.resources.files("recollect.serve").joinpath("page", name).read_bytes()


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(text, status, headers, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    retry = None if error.retry is None else {"retry-after": str(error.retry)}
    return _json(error.content, error.status, retry)


async def _refuse_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = RefusedError(
        error.status_code,
        _WORDS.get(error.status_code, "refused"),
        got=f"{request.method} {request.url.path[:200]}",
        need="one of the addresses and methods of /openapi.json",
        do="Correct the address or the method.",
    )
    return _json(problem.content, problem.status, dict(error.headers or {}))


async def _broken(request: Request, error: Exception) -> Response:
    """Answers where this code is wrong; the traceback goes to the log."""
    problem = RefusedError(
        500, "broken", got="a request that recollect fails on", need="a correction of recollect", do="Please report it."
    )
    return _json(problem.content, problem.status)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody is left to read it
