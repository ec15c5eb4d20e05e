"""Where the rows of a batch go in a dictionary of fixed size that is written row by row."""

from collections import OrderedDict


def assign(
    groups: list[int], known: dict[int, int], order: list[int]
) -> tuple[dict[int, list[int]], set[int], dict[int, int]]:
    """Says where the rows of a batch go when they are written one by one.

    Args:
        groups: Which of the batch's different keys each row has.
        known: The slots of those that are in the dictionary.
        order: The slots to be overwritten, the first first: as many as there are rows, or all.

    Returns:
        The rows that make the entry in each slot, in their order; the slots whose entries are new, by the first of
        these rows; and where each key is in the end, if it is.
    """
    place, holder = dict(known), {slot: group for group, slot in known.items()}
    queue = OrderedDict.fromkeys(order)
    rows: dict[int, list[int]] = {}
    fresh: set[int] = set()
    for row, group in enumerate(groups):
        slot = place.get(group)
        if slot is None:
            slot, _ = queue.popitem(last=False)
            place.pop(holder.get(slot, group), None)  # what was there is overwritten
            place[group], holder[slot] = slot, group
            rows[slot] = []
            fresh.add(slot)
        else:
            queue.pop(slot, None)
        queue[slot] = None
        rows.setdefault(slot, []).append(row)
    return rows, fresh, place
