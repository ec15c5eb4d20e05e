"""What was found word by word."""

import pytest
import torch

from recollect.language.collected import Collected


@pytest.mark.parametrize("block", [1, 3, 7, 200])
def test_results_come_in_the_order_of_the_words(block: int) -> None:
    numbers = torch.arange(101)
    collected = Collected()
    for some in numbers.split(block):
        collected.add(some.double(), torch.stack([some, -some]), some.new_empty(0, len(some)))
    first, second, third = collected.joined()
    assert first.dtype == torch.float64
    assert first.tolist() == numbers.tolist()
    assert second.tolist() == [numbers.tolist(), (-numbers).tolist()]
    assert third.shape == (0, 101)


def test_few_tensors_are_held_however_many_blocks_come() -> None:
    """Thousands of small ones would cut the heap into pieces that no large array fits into."""
    collected = Collected()
    most = 0
    for block in torch.arange(5000).split(2):
        collected.add(block)
        most = max(most, len(collected._parts))
    assert most <= 12
    assert collected.joined()[0].tolist() == list(range(5000))
