"""``Learner``: a network, its optimizer, and what keeps it from forgetting, task by task."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from recollect.continual.examples import Examples, as_pair, batches
from recollect.continual.outputs import Outputs, output_mask
from recollect.continual.penalties import EWC, MAS
from recollect.continual.projections import AGEM, GEM
from recollect.continual.replay import ClassBalanced, Reservoir, Ring
from recollect.errors import FormatError, LabelError, SettingError, require
from recollect.memory import EpisodicMemory

Buffer = Ring | Reservoir | ClassBalanced
Loss = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Penalty(Protocol):
    """What ``EWC``, ``MAS``, ``SI`` and ``LwF`` have in common."""

    @property
    def network(self) -> nn.Module: ...

    def extra_repr(self) -> str: ...

    def __call__(self) -> Tensor: ...

    def consolidate(self, data: Examples, *, outputs: Outputs | None = None) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


class Learner:
    """Trains one network on one task after another.

    A task is what is learned between two consolidations. Where nobody says when one ends, pass the stream in pieces of
    any size: replay and memories take no notice of where one ends (but ``keep`` counts in each), penalties and ``GEM``
    consolidate there, and what ``AGEM`` keeps of a piece is its reference from then on.

    Args:
        network: Maps inputs to logits ``(b, c)``.
        optimizer: Of its parameters.
        penalty: Added to the loss: ``EWC``, ``MAS``, ``SI`` or ``LwF`` of this network.
        projection: Corrects the gradient: ``GEM`` or ``AGEM`` of this network. A ``Ring``, ``Reservoir`` or
            ``ClassBalanced`` of ``AGEM`` is written to here, at a task's end, as far as ``keep`` says.
        replay: What is stored in it is learned again, as many examples in each step as there are new ones, in one batch
            with them.
        memory: Stores inputs (flattened) and labels, for predictors such as ``MbPA``. It may be the memory of a buffer,
            which then writes to it.
        keep: How many examples of each task are written to ``replay`` and ``memory``, the first that come; all if None.
            An example is written after the step that learns it, in the first pass.
        loss: ``(outputs, labels) -> mean loss``.
        epochs: Passes over each task.
        batch: New examples in each step, where a task is a pair of tensors.
        generator: Shuffles; one of its own, seeded with 0, where None is given.

    Raises:
        SettingError: If a setting is out of range.

    Example:
        >>> import torch
        >>> from recollect.continual import EWC
        >>> net = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> learner = Learner(net, optimizer, penalty=EWC(net, 1.0), epochs=20)
        >>> learner.learn((torch.eye(2), torch.tensor([0, 1])))
        >>> net(torch.eye(2)).argmax(1)
        tensor([0, 1])
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        penalty: Penalty | None = None,
        projection: GEM | AGEM | None = None,
        replay: Buffer | None = None,
        memory: EpisodicMemory | None = None,
        keep: int | None = None,
        loss: Loss = nn.functional.cross_entropy,
        epochs: int = 1,
        batch: int = 128,
        generator: torch.Generator | None = None,
    ) -> None:
        require("network", network, nn.Module, "a torch.nn.Module")
        require("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise SettingError(
                "a Learner takes one step for each gradient, and LBFGS takes several. Use another optimizer."
            )
        if min(epochs, batch) < 1 or (keep is not None and keep < 0):
            raise SettingError(
                f"epochs and batch must be at least 1 and keep at least 0, got {epochs}, {batch} and {keep}."
            )
        for name, part in (("penalty", penalty), ("projection", projection)):
            if part is not None and part.network is not network:
                raise SettingError(
                    f"the {name} ({type(part).__name__}) was made for another network than this learner's."
                )
        own = {id(p) for p in network.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise SettingError("the optimizer has none of the network's parameters: make it from network.parameters().")
        self.network = network
        self.optimizer = optimizer
        self.penalty = penalty
        self.projection = projection
        self.replay = replay
        self.memory = memory
        self.learned = 0  # tasks
        self._keep = keep
        self._loss = loss
        self._epochs = epochs
        self._batch = batch
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._together = torch.zeros(0, 0, dtype=torch.bool)  # which outputs stand beside which label

    def learn(self, train: Examples, *, outputs: Outputs | None = None) -> None:
        """Trains on a task, then consolidates.

        Args:
            train: A pair ``(inputs, labels)`` of tensors, which is shuffled, or an iterable of batches that can be gone
                through again, such as a ``DataLoader``.
            outputs: The outputs that the task has, where its identity is known: in this task's loss, then and whenever
                its labels are replayed, the other outputs do not count.

        Raises:
            SettingError: If ``train`` is an iterator or empty, or ``outputs`` are not numbers of outputs.
            LabelError: If a label is not among ``outputs``.
            ShapeError, DtypeError: If ``train`` are no inputs and labels.
        """
        if isinstance(train, Iterator):
            raise SettingError("a task is gone through more than once: pass tensors, a list or a DataLoader.")
        before = self._together
        try:
            self._learn(train, outputs)
        except BaseException:
            self._together = before  # a task that was refused has no outputs
            raise
        self.learned += 1

    def _learn(self, train: Examples, outputs: Outputs | None) -> None:
        own = None if outputs is None else self._join(outputs)
        self.network.train()
        room = sys.maxsize if self._keep is None else self._keep  # for examples still to be stored
        reference = self._reference()
        kept: list[tuple[Tensor, Tensor]] = []
        for epoch in range(self._epochs):
            for inputs, labels in self._batches(train):
                if own is not None and not set(labels.unique().tolist()) <= own:
                    raise LabelError(
                        f"labels must be among the task's outputs {sorted(own)}, got {labels.unique().tolist()}."
                    )
                self._step(inputs, labels)
                if epoch == 0 and room > 0:
                    first = inputs[:room], labels[:room]
                    self._store(*first)
                    if reference is not None:
                        kept.append(first)
                    room -= len(first[0])
        if self.penalty is not None:
            self.penalty.consolidate(train, outputs=outputs)
        if self.projection is not None:
            self.projection.consolidate(train)
        if reference is not None:
            for first in kept:  # a task is no reference for its own gradients
                reference.write(*first)

    def _batches(self, train: Examples) -> Iterable[tuple[Tensor, Tensor]]:
        pair = as_pair(train)
        if pair is not None:
            inputs, labels = pair
            if len(inputs) == 0:
                raise SettingError("there are no examples in this task.")
            order = torch.randperm(len(inputs), generator=self._generator)
            for rows in order.split(self._batch):
                yield inputs.index_select(0, rows.to(inputs.device)), labels.index_select(0, rows.to(labels.device))
            return
        for inputs, labels in batches(train, size=2**31):
            if labels is None:
                raise SettingError("a task needs labels: pass pairs (inputs, labels).")
            yield inputs, labels

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        if self.replay is not None and len(self.replay):
            old_inputs, old_labels = self.replay.sample(len(inputs))
            inputs, labels = torch.cat([inputs, old_inputs.to(inputs)]), torch.cat([labels, old_labels.to(labels)])
        loss = self._masked_loss(self.network(inputs), labels)
        if self.penalty is not None and not isinstance(self.penalty, EWC | MAS):
            loss = loss + self.penalty()
        self.optimizer.zero_grad()
        self.network.zero_grad()  # the optimizer may have a part of it only
        loss.backward()
        if isinstance(self.penalty, EWC | MAS):
            self.penalty.add_gradient()  # as (loss + penalty()).backward() would, in fewer passes
        if self.projection is not None:
            self.projection.project(self._masked_loss)
        self.optimizer.step()

    def _store(self, inputs: Tensor, labels: Tensor) -> None:
        if self.replay is not None:
            self.replay.write(inputs, labels)
        if self.memory is not None and all(b.memory is not self.memory for b in self._buffers()):
            self.memory.write(inputs.flatten(1), labels)

    def _reference(self) -> Buffer | None:
        """Returns the buffer of ``AGEM``, where it is not the one that is replayed."""
        own = self.projection.buffer if isinstance(self.projection, AGEM) else None
        if not isinstance(own, Buffer) or (self.replay is not None and own.memory is self.replay.memory):
            return None
        return own

    def _buffers(self) -> list[Buffer]:
        return [buffer for buffer in (self.replay, self._reference()) if buffer is not None]

    def _masked_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self._together.numel():
            self._widen(outputs.shape[1])
            if len(self._together) > outputs.shape[1]:
                raise SettingError(
                    f"a task has output {len(self._together) - 1}, but the network has {outputs.shape[1]} outputs."
                )
            allowed = self._together.to(outputs.device)[labels.long()]
            allowed |= ~allowed.any(1, keepdim=True)  # of a task whose outputs nobody named
            outputs = outputs.masked_fill(~allowed, -torch.inf)
        return self._loss(outputs, labels)

    def _join(self, outputs: Outputs) -> set[int]:
        self._widen(len(output_mask(outputs)))
        mask = output_mask(outputs, len(self._together))
        self._together = self._together.clone()
        self._together[mask] = mask
        return set(mask.nonzero().squeeze(1).tolist())

    def _widen(self, size: int) -> None:
        more = max(0, size - len(self._together))
        self._together = nn.functional.pad(self._together, (0, more, 0, more))

    def _parts(self) -> dict[str, Any]:
        parts = {"penalty": self.penalty, "projection": self.projection, "memory": self.memory}
        parts.update((f"buffer-{number}", buffer) for number, buffer in enumerate(self._buffers()))
        return {name: part for name, part in parts.items() if part is not None}

    def settings(self) -> dict[str, Any]:
        """Returns what a learner must have been made with to go on where this one is."""
        parts = {"penalty": self.penalty, "projection": self.projection}
        named = {key: part and f"{type(part).__name__}({part.extra_repr()})" for key, part in parts.items()}
        buffers = [type(buffer).__name__ for buffer in self._buffers()]
        return {"epochs": self._epochs, "batch": self._batch, "keep": self._keep, **named, "buffers": buffers}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that learning on depends on."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "together": self._together,
            "learned": self.learned,
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state_dict`` returned, in a learner that was made alike.

        Raises:
            FormatError: If the state is that of a learner with other companions.
        """
        if state.keys() != self.state_dict().keys():
            raise FormatError(
                f"this is the state of a learner with {sorted(state.keys())}, and this one has "
                f"{sorted(self.state_dict().keys())}. Make the learner as it was made then."
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._generator.set_state(state["generator"])
        self._together = state["together"]
        self.learned = int(state["learned"])
