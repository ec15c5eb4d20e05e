"""The bookkeeping of class-balancing reservoir sampling: plain numbers, and the buffers that save them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recollect.memory import EpisodicMemory


class Groups:
    """Members in groups, each at a place in its group's list: to add, find by place and remove takes constant time."""

    def __init__(self) -> None:
        self.members: defaultdict[int, list[int]] = defaultdict(list)
        self.places: dict[int, int] = {}
        self.moved: set[int] = set()  # the members whose place may have changed since somebody emptied this set

    def add(self, group: int, member: int) -> None:
        self.places[member] = len(self.members[group])
        self.members[group].append(member)
        self.moved.add(member)

    def remove(self, group: int, member: int) -> None:
        place, last = self.places.pop(member), self.members[group].pop()
        if last != member:
            self.members[group][place] = last
            self.places[last] = place
            self.moved.add(last)


class Balance:
    """Which slots each class has, how many of each class were seen, and which classes ever were the largest.

    Classes are numbered in the order in which they appear; these numbers index ``labels``, ``seen`` and ``full``.
    """

    def __init__(self, capacity: int, table: list[list[int]], stored: Iterable[tuple[int, int, bool]]) -> None:
        """Starts from what is known of the classes and from what is stored.

        Args:
            capacity: The number of slots.
            table: What ``row`` gave for each class.
            stored: Slot and label of each example, and whether it still has to be counted as seen; those of one class
                in the order of their places.
        """
        self.labels: list[int] = []
        self.seen: list[int] = []
        self.full: list[bool] = []  # whether the class ever was the largest, or one of those, with no slot empty
        self.slots = Groups()  # by class
        self.sizes = Groups()  # the classes by how many slots they have
        self._numbers: dict[int, int] = {}
        self._capacity = capacity
        for label, seen, full, _ in table:
            number = self.number(label)
            self.seen[number], self.full[number] = seen, bool(full)
        for slot, label, new in stored:
            number = self.number(label)
            self.slots.add(number, slot)
            self.seen[number] = max(self.seen[number] + new, len(self.slots.members[number]))
        places = [place for *_, place in table] + [capacity] * (len(self.labels) - len(table))
        self.sizes = Groups()
        for number in sorted(range(len(places)), key=places.__getitem__):
            self.sizes.add(len(self.slots.members[number]), number)
        self._largest = max(self.sizes.members, default=0)
        self.mark()

    def row(self, number: int) -> list[int]:
        """Returns what is to be known of a class: label, seen, full, place among the classes of its size."""
        return [self.labels[number], self.seen[number], int(self.full[number]), self.sizes.places[number]]

    def number(self, label: int) -> int:
        """Returns the number of a class, a new one if it is new."""
        number = self._numbers.setdefault(label, len(self.labels))
        if number == len(self.labels):
            self.labels.append(label)
            self.seen.append(0)
            self.full.append(False)
            self.sizes.add(0, number)
        return number

    def give(self, slot: int, number: int) -> None:
        """Adds an empty slot to a class."""
        size = len(self.slots.members[number])
        self.slots.add(number, slot)
        self.sizes.remove(size, number)
        self.sizes.add(size + 1, number)
        self._largest = max(self._largest, size + 1)

    def mark(self, numbers: Iterable[int] | None = None) -> None:
        """Marks those of the classes (all, when None) that are the largest as full, if no slot is empty."""
        if len(self.slots.places) == self._capacity:
            for number in list(self.sizes.members[self._largest] if numbers is None else numbers):
                if len(self.slots.members[number]) == self._largest and not self.full[number]:
                    self.full[number] = True
                    self.sizes.moved.add(number)

    def choose(self, labels: list[int], free: list[int], draws: list[int]) -> dict[int, int]:
        """Decides for each example of a batch which slot it gets, if any.

        Args:
            labels: Of the examples, in the order of the stream.
            free: Empty slots for the first of them: all that there are, or as many as examples.
            draws: A uniform draw for each of the others, from a range far larger than the examples seen.

        Returns:
            The row of the batch that each slot gets.
        """
        rows: dict[int, int] = {}
        for row, label in enumerate(labels):
            number = self.number(label)
            self.seen[number] += 1
            self.sizes.moved.add(number)
            largest = self._largest
            if row < len(free):
                slot = free[row]
            elif self.full[number]:
                own, place = self.slots.members[number], draws[row - len(free)] % self.seen[number]
                if place < len(own):  # so with probability m_c / n_c; `place` is then uniform among the m_c
                    rows[own[place]] = row
                continue
            else:
                slot = self._take(draws[row - len(free)])
            self.give(slot, number)
            rows[slot] = row
            # Where the size of the largest fell, which it does at most `capacity` times, others may have become those.
            self.mark((number,) if row >= len(free) and self._largest == largest else None)
        return rows

    def _take(self, draw: int) -> int:
        """Takes a slot from the largest class or classes, each of their slots with the same chance."""
        size = self._largest
        numbers = self.sizes.members[size]
        which, place = divmod(draw % (len(numbers) * size), size)
        number = numbers[which]
        slot = self.slots.members[number][place]
        self.slots.remove(number, slot)
        self.sizes.remove(size, number)
        self.sizes.add(size - 1, number)
        if not numbers:
            self._largest -= 1
        return slot


class Classes(nn.Module):
    """A ``Balance`` that is saved, loaded and moved with the module it is in, and knows when it no longer holds.

    Args:
        memory: Where the examples are; labels are its values.
    """

    table: Tensor
    places: Tensor
    _written: Tensor
    _labels: Tensor

    def __init__(self, memory: EpisodicMemory) -> None:
        super().__init__()
        self.register_buffer("table", memory.written.new_zeros(0, 4))  # what `Balance.row` says of each class
        # Where a slot stands in its class. Draws choose by these places: they are state, though any would do.
        self.register_buffer("places", memory.written.new_zeros(memory.capacity))
        self.register_buffer("_written", memory.written.clone(), persistent=False)  # of the memory at the last save
        self.register_buffer("_labels", memory.values.clone(), persistent=False)
        self.register_load_state_dict_pre_hook(_fit_table)
        self.register_load_state_dict_post_hook(_forget_balance)
        self._balance: Balance | None = None
        self.balance(memory, 0)
        self.save(memory)

    def balance(self, memory: EpisodicMemory, step: int) -> Balance:
        """Returns the bookkeeping, derived anew where the memory is not as it was at the last ``save``.

        Args:
            memory: The memory.
            step: What was written to it from this time on has not been counted as seen.
        """
        same = torch.equal(self._written, memory.written) and torch.equal(self._labels, memory.values)
        if self._balance is None or not same:
            table = self.table.tolist() if int(memory.step) >= step else []
            slots = (memory.written >= 0).nonzero().squeeze(1)
            slots = slots[self.places[slots].argsort(stable=True)]
            stored = (slots, memory.values[slots], memory.written[slots] >= step)
            self._balance = Balance(memory.capacity, table, zip(*(part.tolist() for part in stored), strict=True))
        return self._balance

    @torch.inference_mode(False)  # tensors made in inference mode could not be changed outside of it
    def save(self, memory: EpisodicMemory) -> None:
        """Writes what has changed to the buffers, when the memory has changed in the same way."""
        balance = self._balance
        if balance is None:
            return
        slots, numbers = balance.slots, balance.sizes.moved
        new = self.table.new_zeros(max(0, len(balance.labels) - len(self.table)), 4)
        self.table = torch.cat([self.table, new])[: len(balance.labels)]
        if numbers:
            self.table[list(numbers)] = self.table.new_tensor([balance.row(number) for number in numbers])
        if slots.moved:
            self.places[list(slots.moved)] = self.places.new_tensor([slots.places[slot] for slot in slots.moved])
        self._written.copy_(memory.written)
        self._labels.copy_(memory.values)
        slots.moved.clear()
        numbers.clear()


def _fit_table(classes: Classes, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Before loading: there are as many classes as the saved buffer had seen."""
    saved = state.get(f"{prefix}table")
    if isinstance(saved, Tensor) and saved.shape[1:] == classes.table.shape[1:]:
        classes.table = classes.table.new_zeros(saved.shape)


def _forget_balance(classes: Classes, incompatible: object) -> None:
    classes._balance = None
