"""The split, the pictures as the network sees them, and a training that can be stopped at any step."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.bits import bits
from torch import Tensor

from recollect.data import ImageClasses, Images
from recollect.errors import DeviceError, FormatError, NonFiniteError
from recollect.experiments.incremental import pretraining
from recollect.experiments.incremental.pretraining import (
    Recipe,
    features,
    moved,
    prepared,
    reduced,
    settings,
    split,
    trained,
)

Untouched = Callable[[], AbstractContextManager[None]]

CLASSES, TRAIN, TEST = 6, 20, 4
RECIPE = Recipe(widths=(4, 8), blocks=(1, 1), epochs=3, batch=8, rate=0.05, shift=2)
STEPS = 3 * (CLASSES // 2 * TRAIN * 9 // 10 // 8)  # 3 epochs of 54 images


def pictures(count: int, seed: int, *, height: int = 16, width: int = 16) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=g)


def data() -> ImageClasses:
    train, test = (
        Images(pictures(CLASSES * count, seed), torch.arange(CLASSES).repeat_interleave(count))
        for seed, count in enumerate((TRAIN, TEST))
    )
    return ImageClasses(train, test, tuple("abcdef"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test looks into the user's cache."""
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "incremental"


# The split ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "count"), [(6, 20), (200, 500), (7, 10), (2, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_split(classes: int, count: int, seed: int, rng_untouched: Untouched) -> None:
    labels = torch.arange(classes).repeat_interleave(count)
    with rng_untouched():
        parts = split(labels, classes, seed=seed)
    assert int(parts.new.sum()) == (classes + 1) // 2
    assert torch.equal(torch.cat([parts.train, parts.valid]).sort().values, torch.arange(classes * count))
    assert labels[parts.valid].bincount(minlength=classes).tolist() == [-(-count // 10)] * classes
    assert torch.equal(parts.train, parts.train.sort().values)
    assert torch.equal(parts.valid, parts.valid.sort().values)
    assert bits(split(labels, classes, seed=seed)) == bits(parts)


def test_labels_may_stand_in_any_order() -> None:
    labels = torch.arange(5).repeat_interleave(20)[torch.randperm(100, generator=torch.Generator().manual_seed(3))]
    parts = split(labels, 5, seed=0)
    assert labels[parts.valid].bincount().tolist() == [2] * 5
    assert torch.equal(torch.cat([parts.train, parts.valid]).sort().values, torch.arange(100))


def test_seeds_draw_the_classes_and_not_the_validation_images() -> None:
    labels = torch.arange(200).repeat_interleave(20)
    all_parts = [split(labels, 200, seed=seed) for seed in range(20)]
    assert len({tuple(parts.new.tolist()) for parts in all_parts}) == 20
    assert len({tuple(parts.valid.tolist()) for parts in all_parts}) == 1
    often = torch.stack([parts.new for parts in all_parts]).sum(0)
    assert 0 < often.min() < 10 < often.max() < 20, "each class is new sometimes"
    places = all_parts[0].valid % 20
    assert len(places.unique()) == 20, "from anywhere in a class"


# The pictures ---------------------------------------------------------------------------------------------------------


def test_reduced() -> None:
    whole = data()
    some = reduced(whole, 5)
    for part, before, size, count in ((some.train, whole.train, TRAIN, 5), (some.test, whole.test, TEST, 2)):
        rows = [row for row in range(CLASSES * size) if row % size < count]
        assert torch.equal(part.pixels, before.pixels[rows])
        assert part.labels.tolist() == [label for label in range(CLASSES) for _ in range(count)]
    assert some.names == whole.names
    assert reduced(whole, None) is whole
    assert len(reduced(whole, 1).test.labels) == CLASSES
    assert bits(tuple(reduced(whole, 100))) == bits(tuple(whole)), "there are no more than there are"


def test_prepared() -> None:
    pixels = pictures(3, 0, height=4, width=5)
    found = prepared(pixels)
    assert found.shape == (3, 3, 4, 5)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    for color, (mean, deviation) in enumerate([(122.5, 70.5), (114.3, 68.6), (101.4, 71.8)]):
        wanted = (pixels[..., color].double() - mean) / deviation
        torch.testing.assert_close(found[:, color].double(), wanted, rtol=1e-6, atol=1e-6)


def slowly(pixels: Tensor, down: int, right: int, mirrored: bool) -> list[list[list[int]]]:
    """Returns what a window sees that is moved over a picture with mirrors at its edges."""
    height, width = pixels.shape[:2]
    content = pixels.tolist()

    def inside(place: int, size: int) -> int:
        while not 0 <= place < size:
            place = -place if place < 0 else 2 * (size - 1) - place
        return place

    rows = [[content[inside(y + down, height)][inside(x + right, width)] for x in range(width)] for y in range(height)]
    return [row[::-1] for row in rows] if mirrored else rows


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_moved(shift: int, rng_untouched: Untouched) -> None:
    """Each picture is one of those that a slow loop makes, and all of them occur."""
    pixels = pictures(1, 0, height=6, width=7).expand(400, -1, -1, -1)
    with rng_untouched():
        found = moved(pixels, shift, torch.Generator().manual_seed(0))
    moves = [(y, x, m) for y in range(-shift, shift + 1) for x in range(-shift, shift + 1) for m in (False, True)]
    by_picture = {str(slowly(pixels[0], *move)): move for move in moves}
    assert len(by_picture) == len(moves)
    done = [by_picture[str(picture.tolist())] for picture in found]
    assert set(done) == set(moves)
    assert 160 < sum(mirrored for *_, mirrored in done) < 240
    assert found.dtype == torch.uint8


def test_each_picture_is_moved_by_itself() -> None:
    pixels = pictures(50, 0, height=5, width=4)
    found = moved(pixels, 1, torch.Generator().manual_seed(0))
    for before, after in zip(pixels, found, strict=True):
        moves = [(y, x, m) for y in (-1, 0, 1) for x in (-1, 0, 1) for m in (False, True)]
        assert after.tolist() in [slowly(before, *move) for move in moves]
    assert torch.equal(moved(pixels, 1, torch.Generator().manual_seed(0)), found)
    assert not torch.equal(moved(pixels, 1, torch.Generator().manual_seed(1)), found)


# The training ---------------------------------------------------------------------------------------------------------


class Counter:
    """Counts the steps of a training, and stops it before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.last = 0, STEPS + 1
        monkeypatch.setattr(pretraining, "moved", self._moved)

    def _moved(self, *arguments: Any) -> Tensor:
        self.steps += 1
        if self.steps == self.last:
            raise KeyboardInterrupt
        return moved(*arguments)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def test_features_are_what_the_trained_network_says(
    cache: Path, monkeypatch: pytest.MonkeyPatch, rng_untouched: Untouched
) -> None:
    monkeypatch.setattr(pretraining, "multiplies_bfloat16", lambda place: False)  # exact, on all machines
    images = data()
    with rng_untouched():
        found = features(images, RECIPE, seed=0)
        net = trained(images, RECIPE, seed=0)
    assert not net.training
    assert names(cache) == ["features", "network"]
    for got, part in ((found.train, images.train), (found.test, images.test)):
        with torch.no_grad():
            torch.testing.assert_close(got, net.features(prepared(part.pixels)))
            torch.testing.assert_close(found.head()(got), net(prepared(part.pixels)))
    assert torch.equal(found.weight, net.fc.weight)
    assert torch.equal(found.bias, net.fc.bias)
    with rng_untouched():
        head = found.head()
    head.weight.data.zero_()
    assert found.weight.abs().max() > 0, "a head has weights of its own"
    torch.nn.functional.cross_entropy(found.head()(found.train), images.train.labels).backward()


def test_a_training_learns_the_old_classes() -> None:
    images = data()
    light = images.train.labels[:, None, None, None] * 40  # classes that can be told apart
    images = images._replace(train=images.train._replace(pixels=(images.train.pixels // 8 + light).to(torch.uint8)))
    found = features(images, dataclasses.replace(RECIPE, epochs=10), seed=0)
    parts = split(images.train.labels, CLASSES, seed=0)
    rows = parts.valid[~parts.new[images.train.labels[parts.valid]]]
    predicted = found.head()(found.train).argmax(1)
    assert (predicted == images.train.labels)[rows].double().mean() > 0.8
    assert not parts.new[predicted].any(), "nobody has told it of the others"


def test_weights_decay_but_scales_of_the_normalization_do_not() -> None:
    plain = trained(data(), dataclasses.replace(RECIPE, decay=0.0), seed=0)
    small = trained(data(), dataclasses.replace(RECIPE, decay=2.0), seed=0)
    for name, weight in plain.named_parameters():
        ratio = float(small.get_parameter(name).detach().norm() / weight.detach().norm())
        if name.endswith(".weight"):
            assert ratio < 0.7 if weight.dim() > 1 else 0.9 < ratio < 1.1, name


def test_a_training_sees_neither_new_classes_nor_validation_nor_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data()
    parts = split(images.train.labels, CLASSES, seed=0)
    seen = parts.train[~parts.new[images.train.labels[parts.train]]]
    assert len(seen) == 54
    pixels = torch.zeros_like(images.train.pixels)
    pixels[seen] = images.train.pixels[seen]
    other = images._replace(
        train=images.train._replace(pixels=pixels),
        test=images.test._replace(pixels=torch.zeros_like(images.test.pixels)),
    )
    one = bits(trained(images, RECIPE, seed=0).state_dict())
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "another"))
    assert bits(trained(other, RECIPE, seed=0).state_dict()) == one
    pixels[seen[0]] = 0
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "a third"))
    assert bits(trained(other, RECIPE, seed=0).state_dict()) != one


def test_a_second_call_trains_nothing(cache: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    found = features(data(), RECIPE, seed=0)
    assert counter.steps == STEPS
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.iterdir()}
    torch.manual_seed(5)
    again = trained(data(), RECIPE, seed=0)
    assert torch.equal(again.fc.weight, found.weight)
    assert counter.steps == STEPS
    monkeypatch.delattr(pretraining, "trained")
    assert bits(tuple(features(data(), RECIPE, seed=0))) == bits(tuple(found))
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.iterdir()} == before


def test_nothing_but_the_seed_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bits(tuple(features(data(), RECIPE, seed=0)))
    torch.manual_seed(5)
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "another"))
    assert bits(tuple(features(data(), RECIPE, seed=0))) == one
    assert bits(tuple(features(data(), RECIPE, seed=1))) != one


@pytest.mark.parametrize(("stop", "kept"), [(1, 0), (6, 0), (7, 6), (10, 6), (13, 12), (18, 12)])
def test_a_stop_goes_on_behind_the_last_epoch(
    tmp_path: Path, cache: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch, stop: int, kept: int
) -> None:
    counter.last = stop
    with pytest.raises(KeyboardInterrupt):
        features(data(), RECIPE, seed=0)
    counter.last = -1
    found = features(data(), RECIPE, seed=0)
    assert counter.steps == stop + STEPS - kept
    net = bits(trained(data(), RECIPE, seed=0).state_dict())
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "another"))
    assert bits(tuple(features(data(), RECIPE, seed=0))) == bits(tuple(found))
    assert bits(trained(data(), RECIPE, seed=0).state_dict()) == net


def test_a_stop_behind_the_training_trains_nothing_again(
    cache: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "_embed", stop)
        with pytest.raises(KeyboardInterrupt):
            features(data(), RECIPE, seed=0)
    assert names(cache) == ["network"]
    features(data(), RECIPE, seed=0)
    assert counter.steps == STEPS


def test_a_training_that_diverges(cache: Path) -> None:
    recipe = dataclasses.replace(RECIPE, rate=1e30)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"diverged at a step size of 1e\+30. Try a smaller one"):
            features(data(), recipe, seed=0)
    assert not cache.exists()


def test_a_device_that_is_not_there(cache: Path) -> None:
    for call in (features, trained):
        with pytest.raises(DeviceError, match="got 'cuda:99'"):
            call(data(), RECIPE, seed=0, device="cuda:99")
    assert not cache.exists()


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["features", "network"])
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_file_is_named(cache: Path, counter: Counter, kind: str, keep: int) -> None:
    found = features(data(), RECIPE, seed=0)
    (file,) = cache.glob(f"{kind}-*")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"Delete it to start anew") as caught:
        (features if kind == "features" else trained)(data(), RECIPE, seed=0)
    assert str(file) in str(caught.value)
    file.unlink()
    assert bits(tuple(features(data(), RECIPE, seed=0))) == bits(tuple(found))


OTHERS: dict[str, Any] = {
    "widths": (4, 9),
    "blocks": (1, 2),
    "epochs": 4,
    "batch": 9,
    "rate": 0.06,
    "momentum": 0.8,
    "decay": 1e-4,
    "shift": 1,
    "examples": 19,
}


def test_other_settings_never_share_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of a recipe counts, and the split, and the images."""
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(Recipe)}
    recipes = [RECIPE, *(dataclasses.replace(RECIPE, **{name: value}) for name, value in OTHERS.items())]
    runs = [(data(), recipe, 0) for recipe in recipes]
    runs.append((data(), RECIPE, 1))
    darker = data().train.pixels // 2
    runs.append((data()._replace(train=Images(darker, data().train.labels)), RECIPE, 0))
    runs.append((data()._replace(test=Images(data().test.pixels // 2, data().test.labels)), RECIPE, 0))
    assert len({str(settings(*run)) for run in runs}) == len(runs)
    monkeypatch.setattr(pretraining, "_epoch", lambda *_: None)  # the names are made without it
    for images, recipe, seed in runs:
        features(images, recipe, seed=seed)
    assert names(cache) == ["features"] * len(runs) + ["network"] * len(runs)


def test_a_file_of_other_settings_is_refused(cache: Path) -> None:
    features(data(), RECIPE, seed=0)
    (old,) = cache.glob("features-*")
    features(data(), RECIPE, seed=1)
    (other,) = set(cache.glob("features-*")) - {old}
    os.replace(other, old)
    with pytest.raises(FormatError, match=r"other settings \(split=1 there, 0 asked\)"):
        features(data(), RECIPE, seed=0)
