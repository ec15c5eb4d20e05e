"""``Engine``: what is done with model, memory and journal. One worker thread calls it, one thing after the other.

So a prediction sees all or nothing of a write, and there is one writer.
"""

import hashlib
import json
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from recollect.errors import LabelError, SettingError
from recollect.serve import wire
from recollect.serve.journal import Journal
from recollect.serve.ledger import Ledger, Write
from recollect.serve.problems import RefusedError, is_of_the_disk, not_stored, refused
from recollect.serve.service import Batch, Service, ring
from recollect.serve.wire import Rows

_BATCH = 256  # inputs that are encoded at once
_GROW = "Correct the labels, or give the head more outputs with recollect.grow(head, classes)."
_SHARED = (
    "Correct the labels, or name all classes in Service: other processes that share this memory cannot know new ones."
)


class Prediction(NamedTuple):
    """What is predicted for one input."""

    label: str
    probabilities: list[float]


class Observation(NamedTuple):
    """A request to remember."""

    rows: Rows
    labels: list[str]
    key: str | None


class Observed(NamedTuple):
    """Its answer, in JSON."""

    text: str
    is_replay: bool


class Engine:
    """A service's model and memory at work.

    Args:
        service: What is served.
        journal: What is known beside the memory.

    Raises:
        SettingError: If encoder, layer, names and journal do not fit each other.
    """

    def __init__(self, service: Service, journal: Journal) -> None:
        self.service = service
        self.memory = service.layer.memory
        self._journal = journal
        if isinstance(service.encode, nn.Module):
            service.encode.eval()
        self.outputs = self._try().shape[-1]
        self._ledger = Ledger(service, journal)
        self._ledger.names = self._agreed_names()
        self._require_names()
        if not journal.has_begun():
            if service.examples is not None and service.examples.labels and self.entries == 0:
                inputs, labels = service.examples
                self._write(inputs, labels, self._keys(inputs), key=None, digest="")
            journal.begin()  # last: examples that a kill has kept out are written at the next start

    def _try(self) -> Float[Tensor, "1 c"]:
        """Predicts for an empty input: what does not fit each other shows at the start."""
        try:
            return self.service.layer(self.service.keys(self.service.blank(1)))
        except LabelError:  # which says it all
            raise
        except (ValueError, TypeError, RuntimeError, LookupError) as error:
            shape = self.service.input_shape
            raise SettingError(f"the model fails on an input of shape {shape}: {error} Correct input_shape.") from error

    def _agreed_names(self) -> list[str]:
        """Returns the names of the classes, which the journal has kept if it is not new."""
        known, given = self._journal.names(), list(self.service.classes)
        if len(given) > self.outputs:
            raise SettingError(f"{len(given)} classes have names, but the head has only {self.outputs} outputs.")
        if len(known) > self.outputs:
            raise SettingError(
                f"this memory was begun with the classes {known}, but the head has {self.outputs} outputs. Serve one "
                "with an output for each, or another folder."
            )
        if known[: len(given)] != given and known:
            raise SettingError(
                f"the classes are {given}, but this memory was begun with {known}. Name them as before, or serve "
                "another folder."
            )
        if not known:
            known = given or [str(number) for number in range(self.outputs)]
            self._journal.complete(names=known)
        return known

    def _require_names(self) -> None:
        """Refuses entries of classes without a name: nobody could predict them, and a new class would take their place.

        Only the rings show them all.
        """
        now = ring(self.memory)
        labels = [] if now is None else now.values[now.written >= 0].unique().tolist()
        if labels and labels[-1] >= len(self.names):
            raise SettingError(
                f"the memory holds entries of the label {labels[-1]}, but only the outputs 0 to {len(self.names) - 1} "
                "have names. Name them all in classes, or forget those entries."
            )

    @property
    def names(self) -> list[str]:
        """The names of the classes, by output."""
        return self._ledger.names

    @property
    def entries(self) -> int:
        """How many entries the memory has, as far as this process knows."""
        return self._ledger.entries

    @property
    def room(self) -> int:
        """How many more classes can be taught: none where other processes write, too, and would name others."""
        return 0 if ring(self.memory) is None else self.outputs - len(self.names)

    def close(self) -> None:
        """Closes journal and memory."""
        self._ledger.close()

    # Predictions ------------------------------------------------------------------------------------------------------

    def predict(self, parts: list[Rows]) -> list[list[Prediction] | Exception]:
        """Predicts for several requests in one batch.

        Returns:
            For each request its predictions, or why there are none: what one request holds does not hurt another.
        """
        try:
            return self._predict(parts)
        except Exception as error:
            if len(parts) == 1 or isinstance(error, ConnectionError):  # which no input is to blame for
                return [refused(error)] * len(parts)
            return [answer for part in parts for answer in self.predict([part])]

    def _predict(self, parts: list[Rows]) -> list[list[Prediction] | Exception]:
        layer, shape = self.service.layer, self.service.input_shape
        chances = layer(self.service.keys(wire.joined(parts, shape))).exp()
        best = chances[:, : len(self.names)].argmax(-1).tolist()
        rows = [Prediction(self.names[number], chance) for number, chance in zip(best, chances.tolist(), strict=True)]
        answers: list[list[Prediction] | Exception] = []
        start = 0
        for part in parts:
            own = rows[start : start + part.size]
            start += part.size
            finite = all(math.isfinite(sum(row.probabilities)) for row in own)
            answers.append(own if finite else _diverged())
        return answers

    def explain(self, rows: Rows) -> dict[str, Any]:
        """Says what each neighbor has added to one prediction; what it returns becomes JSON."""
        try:
            key = self.service.keys(wire.joined([rows], self.service.input_shape))[0]
            why = self.service.layer.explain(key)
        except Exception as error:
            raise refused(error) from error
        before, after = why.before.exp(), why.after.exp()
        if not all(bool(part.isfinite().all()) for part in (before, after, why.contributions, why.distances)):
            raise _diverged()
        named = slice(len(self.names))
        neighbors = [
            {"slot": slot, "label": self._name(value), "weight": weight, "distance": distance, "contributions": parts}
            | dict(zip(("written", "input"), self._ledger.shown(slot), strict=True))
            for slot, value, weight, distance, parts in zip(
                *(part.tolist() for part in (why.slots, why.values, why.weights, why.distances, why.contributions)),
                strict=True,
            )
        ]
        return {
            "before": {"label": self.names[int(before[named].argmax())], "probabilities": before.tolist()},
            "after": {"label": self.names[int(after[named].argmax())], "probabilities": after.tolist()},
            "classes": self.classes(),
            "exact": why.exact,
            "neighbors": neighbors,
        }

    def classes(self) -> list[str | None]:
        """Returns the name of each output; None where there is room for a class."""
        names = list(self.names)  # the event loop asks, while the worker may add one
        return [*names, *[None] * (self.outputs - len(names))]

    def _name(self, value: int) -> str:
        return self.names[value] if 0 <= value < len(self.names) else str(value)

    # Writes -----------------------------------------------------------------------------------------------------------

    def observe(self, wanted: Observation) -> Observed:
        """Writes inputs and labels to the memory; they are committed when this returns.

        Raises:
            RefusedError: If there is no room for a class, the key was used for something else, the model cannot take
                the inputs, or the disk refuses. Then nothing of it was stored.
        """
        digest = _digest(wanted)
        try:
            self._ledger.settle()
            known = self._ledger.answer(wanted.key)
        except Exception as error:
            raise not_stored(error) from error
        if known is not None:
            if known.digest != bytes.fromhex(digest):
                raise RefusedError(
                    422,
                    "key_was_used",
                    got=f"the idempotency key {wanted.key!r} of another request",
                    need="a key for each different request",
                    do="Make a new key, such as a UUID.",
                )
            return Observed(known.text, is_replay=True)
        inputs = wire.joined([wanted.rows], self.service.input_shape)
        try:
            keys = self._keys(inputs)
        except Exception as error:
            raise refused(error) from error
        try:
            text = self._write(inputs, wanted.labels, keys, key=wanted.key, digest=digest)
        except Exception as error:
            raise (not_stored if is_of_the_disk(error) else refused)(error) from error
        return Observed(text, is_replay=False)

    def _keys(self, inputs: Batch) -> Shaped[Tensor, "n d"]:
        parts = [self.service.keys(inputs[start : start + _BATCH]) for start in range(0, len(inputs), _BATCH)]
        return torch.cat(parts)

    def _write(
        self, inputs: Batch, labels: list[str], keys: Shaped[Tensor, "n d"], *, key: str | None, digest: str
    ) -> str:
        """Writes to memory and journal; returns the answer."""
        new = self._new_names(labels)
        if len(labels) > self.memory.capacity:
            raise _too_many(len(labels), self.memory.capacity)
        return self._ledger.write(Write(keys, inputs, labels, new, key, digest))

    def _new_names(self, labels: list[str]) -> list[str]:
        new = [name for name in dict.fromkeys(labels) if name not in self.names]
        if len(new) > self.room:
            raise RefusedError(
                422,
                "no_room",
                got=f"{len(new)} classes never seen ({', '.join(map(repr, new[:5]))}), and room for {self.room}",
                need=f"labels among {self.names[:20]}, or outputs of the head that have no name yet",
                do=_SHARED if ring(self.memory) is None else _GROW,
            )
        return new

    def forget(self, slot: int, written: int | None) -> int:
        """Removes the entry in a slot, if it is (still) the one that was written at that time; returns what is left.

        Raises:
            RefusedError: If the slot is empty, or holds another entry by now.
        """
        now = ring(self.memory)
        if written is not None and now is not None and int(now.written[slot]) not in (written, -1):
            raise RefusedError(
                409,
                "overwritten",
                got=f"slot {slot} as it was written at {written}",
                need=f"what it holds now, written at {int(now.written[slot])}",
                do="Ask for an explanation again: the memory you mean is gone.",
            )
        try:
            is_gone = self._ledger.forget(slot)
        except Exception as error:
            raise (not_stored if is_of_the_disk(error) else refused)(error) from error
        if not is_gone:
            raise RefusedError(
                404, "empty_slot", got=f"slot {slot}, which holds nothing", need="a slot with a memory", do="Nothing."
            )
        return self.entries


def _digest(wanted: Observation) -> str:
    content = [wanted.rows.size, wanted.rows.numbers.tobytes().hex(), wanted.rows.texts, wanted.labels]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _diverged() -> RefusedError:
    return RefusedError(
        422,
        "not_finite",
        got="a prediction that is not finite: the adaptation ran away on this input",
        need="a rate at which the steps of the adaptation stay small",
        do="Check the scale of the input, or serve an MbPA with a lower rate.",
    )


def _too_many(count: int, capacity: int) -> RefusedError:
    return RefusedError(
        422, "too_many", got=f"{count} inputs at once", need=f"at most the memory's capacity, {capacity}", do="Split."
    )
