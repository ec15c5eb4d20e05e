"""Laws of drawn tasks: every image says which class and place it came from, so that all draws can be read back."""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recollect.data import Images, by_class, class_split, episodes, jittered, sequences
from recollect.errors import DtypeError, SettingError, ShapeError

CLASSES, EACH = 12, 7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def known(classes: int = CLASSES, each: int = EACH) -> Tensor:
    """Returns images of 1 x 2 pixels: the class and the place."""
    rows, places = torch.meshgrid(torch.arange(classes), torch.arange(each), indexing="ij")
    return torch.stack([rows, places], -1)[:, :, None].double()


# Few-shot tasks -------------------------------------------------------------------------------------------------------


@given(
    tasks=st.integers(1, 5),
    ways=st.integers(1, 6),
    shots=st.integers(1, 3),
    queries=st.integers(1, 4),
    seed=st.integers(0, 2**30),
)
def test_laws_of_few_shot_tasks(tasks: int, ways: int, shots: int, queries: int, seed: int) -> None:
    allowed = torch.randperm(CLASSES, generator=seeded(seed))[:6]
    some = episodes(known(), allowed, tasks=tasks, ways=ways, shots=shots, queries=queries, generator=seeded(seed))
    assert some.support.shape == (tasks, ways * shots, 1, 2)
    assert some.queries.shape == (tasks, ways * queries, 1, 2)
    assert some.classes.shape == (tasks, ways)
    for task in range(tasks):
        chosen = some.classes[task].tolist()
        assert len(set(chosen)) == ways
        assert set(chosen) <= set(allowed.tolist())
        seen: list[tuple[int, int]] = []
        for images, labels, each in (
            (some.support[task], some.support_labels[task], shots),
            (some.queries[task], some.query_labels[task], queries),
        ):
            assert labels.tolist() == list(range(ways)) * each
            for image, label in zip(images[:, 0].tolist(), labels.tolist(), strict=True):
                assert image[0] == chosen[label]
                seen.append((int(image[0]), int(image[1])))
        assert len(set(seen)) == len(seen) == ways * (shots + queries), "no image comes twice"


def test_all_images_of_a_class_may_be_used() -> None:
    some = episodes(known(), torch.arange(3), tasks=4, ways=3, shots=3, queries=4, generator=seeded())
    places = torch.cat([some.support, some.queries], 1)[:, :, 0, 1].view(4, EACH, 3)
    assert torch.equal(places.sort(1).values, torch.arange(EACH).double()[None, :, None].expand(4, -1, 3))


def test_every_class_gets_every_label_equally_often() -> None:
    allowed = torch.tensor([1, 4, 6, 11])
    some = episodes(known(), allowed, tasks=12_000, ways=3, shots=1, queries=1, generator=seeded())
    counts = Counter((label, row) for task in some.classes.tolist() for label, row in enumerate(task))
    assert set(counts) == {(label, row) for label in range(3) for row in allowed.tolist()}
    for count in counts.values():  # 3000 expected, standard deviation 47
        assert abs(count - 3000) < 5 * 47
    assert len({tuple(task) for task in some.classes.tolist()}) == 24, "all orders of all choices"


def test_every_image_comes_equally_often_to_support_and_queries() -> None:
    some = episodes(known(), torch.arange(2), tasks=7000, ways=2, shots=1, queries=1, generator=seeded())
    for images in (some.support, some.queries):
        counts = Counter(map(tuple, images[:, :, 0].flatten(0, 1).tolist()))
        assert len(counts) == 14
        for count in counts.values():  # 1000 expected, standard deviation 29
            assert abs(count - 1000) < 5 * 30


def test_tasks_of_a_call_differ() -> None:
    some = episodes(known(), torch.arange(CLASSES), tasks=50, ways=5, shots=1, queries=1, generator=seeded())
    assert len({tuple(task) for task in some.classes.tolist()}) > 45


def test_the_generator_alone_decides(rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    def draw(seed: int) -> list[Tensor]:
        generator = seeded(seed)
        arguments = {"tasks": 3, "ways": 3, "generator": generator, "turned": True}
        images = torch.rand(CLASSES, EACH, 4, 4, generator=seeded(9))
        few = episodes(images, torch.arange(CLASSES), shots=1, queries=2, **arguments)
        row = sequences(images, torch.arange(CLASSES), instances=4, **arguments)
        return [
            *(*few, *row),
            jittered(row.inputs, generator=generator),
            *class_split(20, 7, 5, generator=generator),
        ]

    with rng_untouched():
        first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_bytes_and_truth_values_become_numbers_from_zero_to_one() -> None:
    pixels = torch.randint(256, (4, 5, 3, 3), generator=seeded(), dtype=torch.uint8)
    drawn = [
        episodes(images, torch.arange(4), tasks=2, ways=2, shots=1, queries=1, generator=seeded()).queries
        for images in (pixels, pixels.double() / 255, pixels > 127)
    ]
    assert [images.dtype for images in drawn] == [torch.float32, torch.float64, torch.float32]
    torch.testing.assert_close(drawn[0].double(), drawn[1])
    assert torch.equal(drawn[2], (drawn[1] > 0.5).float())


def test_any_layout_gives_the_same() -> None:
    """A part of the images of each class, and colors moved to the front, are views that do not lie row after row."""
    whole = torch.rand(6, 9, 4, 4, 3, generator=seeded())
    for view in (whole[:, ::2], whole[:, 2:7], whole.permute(0, 1, 4, 2, 3), whole.transpose(0, 1)):
        few = [
            episodes(images, torch.arange(5), tasks=2, ways=3, shots=1, queries=2, generator=seeded())
            for images in (view, view.contiguous())
        ]
        assert all(torch.equal(a, b) for a, b in zip(*few, strict=True))


def test_turned_classes() -> None:
    """All images of a class are turned alike, every class of a task by its own angle, and no class comes twice."""
    images = torch.rand(5, 4, 2, 3, 3, generator=seeded())
    arguments = {"tasks": 800, "ways": 3, "shots": 1, "queries": 2}
    some = episodes(images, torch.arange(5), **arguments, turned=True, generator=seeded())
    turns: Counter[tuple[int, int]] = Counter()
    for task in range(100):
        chosen = some.classes[task].tolist()
        assert len(set(chosen)) == 3
        drawn = torch.cat([some.support[task], some.queries[task]]).view(3, 3, 2, 3, 3)
        for label, row in enumerate(chosen):
            fitting = [
                turn
                for turn in range(4)
                if all(
                    (images[row].rot90(turn, (-2, -1)) == image).flatten(1).all(1).any() for image in drawn[:, label]
                )
            ]
            assert len(fitting) == 1
            turns[row, fitting[0]] += 1
    assert len(turns) == 20
    assert max(turns.values()) < 4 * min(turns.values())


# Sequences ------------------------------------------------------------------------------------------------------------


@given(tasks=st.integers(1, 5), ways=st.integers(1, 6), instances=st.integers(1, EACH), seed=st.integers(0, 2**30))
def test_laws_of_sequences(tasks: int, ways: int, instances: int, seed: int) -> None:
    allowed = torch.randperm(CLASSES, generator=seeded(seed))[:6]
    some = sequences(known(), allowed, tasks=tasks, ways=ways, instances=instances, generator=seeded(seed))
    assert some.inputs.shape == (tasks, ways * instances, 1, 2)
    for task in range(tasks):
        chosen = some.classes[task].tolist()
        assert len(set(chosen)) == ways
        assert set(chosen) <= set(allowed.tolist())
        before: Counter[int] = Counter()
        images = [(int(row), int(place)) for row, place in some.inputs[task, :, 0].tolist()]
        for (row, _), label in zip(images, some.labels[task].tolist(), strict=True):
            assert row == chosen[label]
            before[label] += 1
        assert before == dict.fromkeys(range(ways), instances)
        assert len(set(images)) == len(images), "no image comes twice"


def test_every_order_of_a_sequence_is_equally_likely() -> None:
    some = sequences(known(), torch.arange(2), tasks=6000, ways=2, instances=2, generator=seeded())
    counts = Counter(map(tuple, some.labels.tolist()))
    assert len(counts) == 6
    for count in counts.values():  # 1000 expected, standard deviation 29
        assert abs(count - 1000) < 5 * 29


def test_places_of_a_sequence_are_in_random_order() -> None:
    some = sequences(known(), torch.arange(1), tasks=4000, ways=1, instances=3, generator=seeded())
    assert len({tuple(task) for task in some.inputs[:, :, 0, 1].tolist()}) == 7 * 6 * 5


def test_turned_sequences() -> None:
    images = torch.rand(5, 4, 3, 3, generator=seeded())
    some = sequences(images, torch.arange(5), tasks=40, ways=3, instances=3, turned=True, generator=seeded())
    turns = set()
    for task in range(40):
        for label, row in enumerate(some.classes[task].tolist()):
            drawn = some.inputs[task][some.labels[task] == label]
            fitting = [
                turn
                for turn in range(4)
                if all((images[row].rot90(turn, (-2, -1)) == image).flatten(1).all(1).any() for image in drawn)
            ]
            assert len(fitting) == 1
            turns.add((row, fitting[0]))
    assert len(turns) == 20


# Small turns and shifts -----------------------------------------------------------------------------------------------


def centers(images: Tensor) -> Tensor:
    """Returns where the ink of each image is, as (right, down) from the middle in pixels."""
    down, right = (torch.arange(n, dtype=images.dtype) - (n - 1) / 2 for n in images.shape[-2:])
    ink = images.sum((-1, -2))
    return torch.stack([(images.sum(-2) * right).sum(-1), (images.sum(-1) * down).sum(-1)], -1) / ink[..., None]


def blob(down: int, right: int, *, height: int = 61, width: int = 61) -> Tensor:
    """Returns a soft spot so far from the middle."""
    y, x = torch.arange(height) - height // 2 - down, torch.arange(width) - width // 2 - right
    return torch.exp(-(y[:, None] ** 2 + x[None] ** 2).double() / 4)


def test_no_turn_and_no_shift_change_nothing() -> None:
    images = torch.rand(3, 2, 9, 7, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(jittered(images, angle=0.0, shift=0.0, generator=seeded()), images)


def test_shifts_are_uniform_within_their_limits() -> None:
    images = blob(0, 0, width=41).expand(2000, 1, -1, -1)
    moved = centers(jittered(images, angle=0.0, shift=0.1, generator=seeded()))[:, 0]
    for way, side in ((moved[:, 0], 41), (moved[:, 1], 61)):
        most = 0.1 * side
        assert way.abs().max() < most + 1e-6
        assert way.abs().max() > 0.98 * most
        assert abs(way.mean()) < 5 * most / math.sqrt(3 * 2000)
        assert abs(way.abs().mean() - most / 2) < 5 * most / math.sqrt(12 * 2000)
    assert abs(torch.corrcoef(moved.T)[0, 1]) < 0.1, "both ways are drawn apart"


@pytest.mark.parametrize("width", [61, 91])
def test_turns_are_uniform_and_keep_distances(width: int) -> None:
    images = blob(12, 16, width=width).expand(2000, -1, -1)
    moved = centers(jittered(images, angle=30.0, shift=0.0, generator=seeded()))
    torch.testing.assert_close(moved.norm(dim=-1), torch.full((2000,), 20.0).double(), atol=0.02, rtol=0)
    degrees = torch.rad2deg(torch.atan2(moved[:, 1], moved[:, 0])) - math.degrees(math.atan2(12, 16))
    assert 29 < degrees.abs().max() < 30.1
    assert abs(degrees.mean()) < 5 * 30 / math.sqrt(3 * 2000)
    assert abs(degrees.abs().mean() - 15) < 5 * 30 / math.sqrt(12 * 2000)


def test_what_comes_from_outside_is_empty() -> None:
    moved = jittered(torch.ones(50, 8, 8), angle=0.0, shift=2.0, generator=seeded())
    assert moved.min() == 0
    assert moved.max() <= 1


# Splits and photographs -----------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), more=st.integers(0, 5), seed=st.integers(0, 2**30))
def test_splits_share_no_class(sizes: list[int], more: int, seed: int) -> None:
    classes = torch.randperm(100, generator=seeded(seed))[: sum(sizes) + more]
    groups = class_split(classes, *sizes, generator=seeded(seed))
    assert [len(group) for group in groups] == sizes
    together = torch.cat(groups).tolist()
    assert len(set(together)) == len(together)
    assert set(together) <= set(classes.tolist())
    assert all(group.tolist() == sorted(group.tolist()) for group in groups)


def test_splits_are_random() -> None:
    counts = Counter(int(c) for seed in range(600) for c in class_split(6, 2, 3, generator=seeded(seed))[0])
    assert len(counts) == 6
    for count in counts.values():  # 200 expected, standard deviation 12
        assert abs(count - 200) < 5 * 12


def test_photographs_by_class() -> None:
    """They are the same from any order of rows; where they lie class after class, nothing is copied."""
    pixels = torch.randint(256, (12, 5, 5, 3), generator=seeded(), dtype=torch.uint8)
    labels = torch.arange(4).repeat_interleave(3)
    found = by_class(Images(pixels, labels))
    assert found.data_ptr() == pixels.data_ptr()
    assert found.shape == (4, 3, 3, 5, 5)
    for row in range(12):
        assert torch.equal(found[row // 3, row % 3], pixels[row].permute(2, 0, 1))
    order = torch.tensor([9, 0, 3, 6, 10, 7, 4, 1, 2, 5, 8, 11])
    shuffled = by_class(Images(pixels[order], labels[order]))
    assert torch.equal(shuffled, found)
    some = episodes(found, torch.arange(4), tasks=2, ways=4, shots=1, queries=2, generator=seeded())
    assert some.queries.shape == (2, 8, 3, 5, 5)


# Errors ---------------------------------------------------------------------------------------------------------------

FEW = {"tasks": 2, "ways": 3, "shots": 1, "queries": 2}
ROW = {"tasks": 2, "ways": 3, "instances": 4}


@pytest.mark.parametrize("draw", [episodes, sequences])
@pytest.mark.parametrize(
    ("images", "classes", "changed", "error", "message"),
    [
        (known(), [0, 1], {}, SettingError, "ways must be at most 2, the number of classes to draw from, got 3. Ask"),
        (known(), [], {}, SettingError, "classes must name at least one row of images, got none"),
        (known(), [0, 1, 12], {}, SettingError, "rows of images, from 0 to 11, got 0 to 12"),
        (known(), [-1, 1, 2], {}, SettingError, "rows of images, from 0 to 11, got -1 to 2"),
        (known(), [0, 1, 5, 1], {}, SettingError, "classes must name each class once, got 1 twice"),
        (known(), [[0, 1, 2]], {}, ShapeError, r"classes must have shape \(m,\), got \(1, 3\)"),
        (known(), [0.0, 1.0, 2.0], {}, DtypeError, "classes must be whole numbers, .* got torch.float32"),
        (known(), [True] * 12, {}, DtypeError, "classes must be whole numbers, .* got torch.bool"),
        (known().long(), [0, 1, 2], {}, DtypeError, "images must be bytes, .* got torch.int64"),
        (torch.ones(12), [0, 1, 2], {}, ShapeError, r"images must have shape \(classes, .*got \(12,\)"),
        (known(), [0, 1, 2], {"turned": True}, ShapeError, r"must be square to be turned, got shape \(1, 2\)"),
        (torch.ones(3, 9), [0, 1, 2], {"turned": True}, ShapeError, r"must be square to be turned, got shape \(\)"),
        (known(), [0, 1, 2], {"ways": 0}, SettingError, "ways must be a whole number above 0, got 0"),
        (known(), [0, 1, 2], {"tasks": -1}, SettingError, "tasks must be a whole number above 0, got -1"),
        (known(), [0, 1, 2], {"tasks": 2.0}, SettingError, "tasks must be a whole number above 0, got 2.0"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_drawn(
    draw: Callable[..., object],
    images: Tensor,
    classes: list[float],
    changed: dict[str, float],
    error: type[Exception],
    message: str,
) -> None:
    settings = (FEW if draw is episodes else ROW) | changed
    rows = torch.tensor(classes, dtype=torch.long) if not classes else torch.tensor(classes)
    with pytest.raises(error, match=message):
        draw(images, rows, **settings, generator=seeded())


@pytest.mark.parametrize("name", ["shots", "queries"])
def test_numbers_below_one(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name} must be a whole number above 0, got 0"):
        episodes(known(), torch.arange(3), **(FEW | {name: 0}), generator=seeded())


def test_more_images_than_there_are() -> None:
    with pytest.raises(SettingError, match=r"shots \+ queries = 5 \+ 3 must be at most 7, the images of a class"):
        episodes(known(), torch.arange(3), tasks=1, ways=2, shots=5, queries=3, generator=seeded())
    with pytest.raises(SettingError, match="instances = 8 must be at most 7, the images of a class"):
        sequences(known(), torch.arange(3), tasks=1, ways=2, instances=8, generator=seeded())
    with pytest.raises(SettingError, match="instances must be a whole number above 0, got 0"):
        sequences(known(), torch.arange(3), tasks=1, ways=2, instances=0, generator=seeded())


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: episodes(known(), torch.arange(3), **FEW, generator=generator),
        lambda generator: sequences(known(), torch.arange(3), **ROW, generator=generator),
        lambda generator: jittered(torch.rand(2, 4, 4), generator=generator),
        lambda generator: class_split(5, 3, generator=generator),
    ],
)
@pytest.mark.parametrize("wrong", [None, 0, torch.Generator])
@pytest.mark.usefixtures("untyped")
def test_draws_need_a_generator(draw: Callable[[object], object], wrong: object) -> None:
    with pytest.raises(SettingError, match=r"generator must be a source of draws, such as torch\.Generator\(\)"):
        draw(wrong)


@pytest.mark.usefixtures("untyped")
def test_lists_are_no_tensors() -> None:
    with pytest.raises(DtypeError, match="classes must be a tensor, got list"):
        episodes(known(), [0, 1, 2], **FEW, generator=seeded())
    with pytest.raises(DtypeError, match="images must be a tensor, got list"):
        sequences([[0.0]], torch.arange(3), **ROW, generator=seeded())
    with pytest.raises(DtypeError, match="classes must be a tensor, got list"):
        class_split([0, 1, 2], 2, generator=seeded())
    with pytest.raises(DtypeError, match="images must be a tensor, got list"):
        jittered([[0.0]], generator=seeded())


@pytest.mark.parametrize(
    ("classes", "sizes", "message"),
    [
        (5, (3, 3), r"at most 5 classes in all, what there is, got \(3, 3\)"),
        (5, (), r"at least one group .* got \(\)"),
        (5, (3, 0), "sizes must be a whole number above 0, got 0"),
        (0, (1,), "classes must be a whole number above 0, got 0"),
        (torch.tensor([3, 3, 4]), (1, 1), "classes must name each class once, got 3 twice"),
    ],
)
def test_what_cannot_be_split(classes: int | Tensor, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        class_split(classes, *sizes, generator=seeded())


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 0, 1], "got 1 to 2 of a class"), ([1, 1, 1], "got 0 to 3 of a class"), ([], "got none")],
)
def test_photographs_that_are_not_as_many_of_each_class(labels: list[int], message: str) -> None:
    some = Images(torch.zeros(len(labels), 4, 4, 3, dtype=torch.uint8), torch.tensor(labels, dtype=torch.long))
    with pytest.raises(SettingError, match=message):
        by_class(some)


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_jittered() -> None:
    images = torch.rand(2, 4, 4)
    with pytest.raises(SettingError, match="angle must be a finite number of at least 0, got -1"):
        jittered(images, angle=-1.0, generator=seeded())
    with pytest.raises(SettingError, match="shift must be a finite number of at least 0, got nan"):
        jittered(images, shift=math.nan, generator=seeded())
    with pytest.raises(DtypeError, match=r"floating-point numbers to be interpolated, got torch\.uint8"):
        jittered(images.to(torch.uint8), generator=seeded())
    with pytest.raises(ShapeError, match=r"shape \(..., height, width\), got \(4,\)"):
        jittered(images[0, 0], generator=seeded())
