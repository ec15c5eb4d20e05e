"""``recollect serve``: a model and its memory behind HTTP, and a page to try them. Needs the extra ``[serve]``.

    service.py   what is served: ``Service``, which a factory of yours returns
    settings.py  where and how: the command line
    engine.py    what is done with model and memory, one thing at a time
    ledger.py    the one place that writes: memory and journal agree, whatever happens
    journal.py   what must outlive the process beside the memory: class names, idempotency keys, pictures
    batching.py  concurrent requests become one batch; one worker thread
    wire.py      JSON in and out
    app.py       the endpoints; guard.py stands before them, schema.py describes them, metrics.py counts them

This file loads none of FastAPI, uvicorn and prometheus-client, so a factory may import it anywhere.
"""

from recollect.serve.service import Examples, Service

__all__ = ["Examples", "Service"]
