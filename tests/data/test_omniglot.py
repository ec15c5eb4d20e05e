"""A tiny Omniglot as folders and zips, in every kind of damage, a damaged cache, and the real one."""

import importlib
import io
import math
import os
import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache as once
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

from recollect.data import Characters, data_folder, omniglot
from recollect.data.omniglot import shrunk
from recollect.errors import FormatError, MissingDataError, MissingExtraError, SettingError

module = importlib.import_module("recollect.data.omniglot")  # the package has the function under this name

Files = dict[str, bytes]

KINDS = ("folder", "zip")
# Not in the order of their paths; a space comes before a slash.
NAMES = {
    "background": ("Greek/character02", "Greek/character01", "Greek (old)/character10"),
    "evaluation": ("Angelic/character01", "ULOG/character01"),
}
SORTED = (
    *("Greek (old)/character10", "Greek/character01", "Greek/character02"),
    *("Angelic/character01", "ULOG/character01"),
)
BROKEN = "Greek/character01/0003_07.png"


def drawn(seed: int) -> Tensor:
    """Returns where there is ink."""
    blocks = torch.rand(15, 15, generator=torch.Generator().manual_seed(seed)) < 0.2
    return blocks.repeat_interleave(7, 0).repeat_interleave(7, 1)


def png(ink: Tensor, mode: str = "1") -> bytes:
    """Returns a picture of black ink on white."""
    from PIL import Image

    gray = Image.frombytes("L", (ink.shape[1], ink.shape[0]), ((~ink).to(torch.uint8) * 255).numpy().tobytes())
    file = io.BytesIO()
    gray.convert(mode).save(file, "PNG")
    return file.getvalue()


@once
def _files(part: str) -> Files:
    """Returns 20 drawings of each character, by path; their numbers are those of the canonical archives."""
    found, numbers = {}, {name: sorted(SORTED).index(name) + 1 for name in SORTED}
    for name in NAMES[part]:
        for person in (*range(11, 21), *range(1, 11)):
            seed = 100 * numbers[name] + person
            found[f"{name}/{numbers[name]:04}_{person:02}.png"] = png(drawn(seed), "L" if person == 3 else "1")
    return found


def files(part: str, **changed: bytes | None) -> Files:
    """Returns the content of the fake data set by path; ``changed`` by path, without the files that it maps to None."""
    return {path: content for path, content in (_files(part) | changed).items() if content is not None}


def packed(content: Files, kind: str, place: Path, part: str, *, more: Files | None = None) -> Path:
    """Returns a folder or zip of these files; ``more`` are members by their names in the archive."""
    place.mkdir(parents=True, exist_ok=True)
    members = {f"images_{part}/{name}": data for name, data in content.items()} | (more or {})
    if kind == "folder":
        for name, data in members.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        return place / f"images_{part}"
    with zipfile.ZipFile(place / f"images_{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return place / f"images_{part}.zip"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the data is looked for; the size of the data set is that of the fake one."""
    monkeypatch.setattr(module, "_CHARACTERS", {part: len(names) for part, names in NAMES.items()})
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "kept"))
    (tmp_path / "data" / "omniglot").mkdir(parents=True)
    return tmp_path / "data" / "omniglot"


def put(place: Path, kind: str = "zip", **changed: bytes | None) -> None:
    """Lays both parts out; ``changed`` are files of the background part."""
    packed(files("background", **changed), kind, place, "background")
    packed(files("evaluation"), kind, place, "evaluation")


def cached(place: Path) -> list[str]:
    """Returns the names of all files in the cache."""
    return sorted(path.name for path in (place.parent.parent / "kept").rglob("*") if path.is_file())


def same(found: Characters, size: int = 105) -> bool:
    """Whether it is what was drawn, in the right order."""
    numbers = [sorted(SORTED).index(name) + 1 for name in SORTED]
    wanted = torch.stack([torch.stack([drawn(100 * n + person) for person in range(1, 21)]) for n in numbers])
    return (
        torch.equal(found.pixels, shrunk(wanted.to(torch.uint8), size))
        and found.names == SORTED
        and found.background.tolist() == [0, 1, 2]
        and found.evaluation.tolist() == [3, 4]
    )


# What is decoded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_sources_give_the_drawings(
    small: Path, kind: str, rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    put(small, kind)
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    parts: list[float] = []
    with rng_untouched():
        found = omniglot(105, watch=parts.append)
    assert same(found)
    assert found.pixels.dtype == torch.uint8
    assert set(found.pixels.unique().tolist()) == {0, 255}
    assert len(parts) == 5
    assert math.isclose(sum(parts), 1)
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before, "the data folder is not written"
    assert cached(small) == ["105.safetensors", "105.safetensors"]


def test_a_second_call_decodes_nothing_and_another_size_all(small: Path) -> None:
    put(small)
    parts: list[float] = []
    omniglot(15)
    assert same(omniglot(15, watch=parts.append), 15)
    assert not parts
    assert same(omniglot(watch=parts.append), 28)
    assert len(parts) == 5


def test_where_it_is_looked_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder comes before a zip, and both before a download."""
    asked: list[str] = []

    def fetched(name: str) -> Path:
        asked.append(name)
        part = name.removeprefix("omniglot/images_").removesuffix(".zip")
        return packed(files(part), "zip", small.parent / "elsewhere", part)

    monkeypatch.setattr(module, "fetch", fetched)
    assert same(omniglot(105))
    assert asked == ["omniglot/images_background.zip", "omniglot/images_evaluation.zip"]
    for kind in ("zip", "folder"):
        ink = drawn(len(kind))
        put(small, kind, **{BROKEN: png(ink)})
        assert torch.equal(omniglot(105).pixels[1, 6], shrunk(ink.to(torch.uint8), 105))
    assert len(asked) == 2


def test_what_others_leave_beside_the_drawings_is_no_matter(small: Path) -> None:
    hidden = {
        str(PurePosixPath(path).with_name(f"._{PurePosixPath(path).name}")): b"junk" for path in _files("background")
    }
    more = {"__MACOSX/images_background/Greek/character01/._0003_07.png": b"junk", "images_background/.DS_Store": b""}
    packed(files("background", **hidden), "zip", small, "background", more=more)
    packed(files("evaluation"), "zip", small, "evaluation", more={"images_evaluation/list.txt": b"", "x.png": b""})
    assert same(omniglot(105))


def test_a_stop_goes_on_where_it_was(small: Path) -> None:
    put(small)

    def stop(_: float) -> None:
        if cached(small):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        omniglot(105, watch=stop)
    assert cached(small) == ["105.safetensors"]
    parts: list[float] = []
    assert same(omniglot(105, watch=parts.append))
    assert len(parts) == 2, "the other part alone"
    assert math.isclose(sum(parts), 1)


# How it is scaled -----------------------------------------------------------------------------------------------------


def areas(ink: Tensor, size: int) -> Tensor:
    """Returns the share of ink in each area, over a grid so fine that neither pixels nor areas are cut."""
    return avg_pool2d(ink.double().repeat_interleave(size, 0).repeat_interleave(size, 1)[None], len(ink))[0]


@given(size=st.integers(1, 12), side=st.integers(1, 12), seed=st.integers(0, 2**30))
def test_shares_of_areas(size: int, side: int, seed: int) -> None:
    ink = torch.rand(2, side, side, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = shrunk(ink.to(torch.uint8), size)
    assert found.shape == (2, size, size)
    for one, many in zip(found, ink, strict=True):
        assert torch.equal(one, (255 * areas(many, size) + 0.5 + 1e-9).floor().to(torch.uint8)), "rounded half up"


@pytest.mark.parametrize("size", [20, 28])
def test_sizes_of_the_papers(size: int) -> None:
    ink = drawn(0)
    found = shrunk(ink.to(torch.uint8), size)
    torch.testing.assert_close(found.double() / 255, areas(ink, size), atol=0.501 / 255, rtol=0)
    for turn in range(4):
        assert torch.equal(shrunk(ink.to(torch.uint8).rot90(turn), size), found.rot90(turn))


@pytest.mark.parametrize("size", [0, -1, 106, 28.0, True])
@pytest.mark.usefixtures("untyped")
def test_sizes_that_there_are_not(size: float) -> None:
    limit = "at most 105, that of the drawings" if size == 106 else "a whole number above 0"
    with pytest.raises(SettingError, match=f"size must be {limit}, got {size}"):
        omniglot(size)


# Damage ---------------------------------------------------------------------------------------------------------------

DAMAGED = {
    "cut short": (png(drawn(0))[:-40], "cannot be decoded ("),
    "empty": (b"", "cannot be decoded: it is no image"),
    "text": (b"<!DOCTYPE html><title>404</title>", "cannot be decoded: it is no image"),
    "too small": (png(drawn(0)[:104]), "should have 105 x 105 pixels, but has 105 x 104"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("broken", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_drawing_that_cannot_be_decoded(small: Path, kind: str, broken: bytes, message: str) -> None:
    put(small, kind, **{BROKEN: broken})
    with pytest.raises(FormatError) as caught:
        omniglot()
    assert message in str(caught.value)
    assert f"{BROKEN} in {small}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cached(small)
    put(small, kind)
    assert same(omniglot(), 28)


def test_damage_to_one_part_leaves_the_other(small: Path) -> None:
    put(small)
    packed(files("evaluation", **{"ULOG/character01/0005_01.png": b""}), "zip", small, "evaluation")
    with pytest.raises(
        FormatError, match=r"ULOG/character01/0005_01.png in .*images_evaluation\.zip cannot be decoded"
    ):
        omniglot()
    assert cached(small) == ["28.safetensors"]


def without(folder: str) -> dict[str, None]:
    return {path: None for path in _files("background") if path.startswith(folder)}


LACKING = {
    "a drawing": ({BROKEN: None}, "Greek/character01 in .* should hold 20 drawings, but holds 19"),
    "a drawing too many": (
        {"Greek/character01/0003_21.png": png(drawn(0))},
        "Greek/character01 in .* should hold 20 drawings, but holds 21",
    ),
    "a character": (without("Greek/character01"), "should hold 3 characters, but holds 2"),
    "all": (without(""), "should hold 3 characters, but holds 0"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("changed", "message"), LACKING.values(), ids=LACKING.keys())
def test_what_is_missing_is_named(small: Path, kind: str, changed: dict[str, bytes | None], message: str) -> None:
    (small / "images_background").mkdir()
    if kind == "zip":
        (small / "images_background").rmdir()
    put(small, kind, **changed)
    with pytest.raises(FormatError, match=message) as caught:
        omniglot()
    assert str(small) in str(caught.value)
    assert not cached(small)


@pytest.mark.parametrize("cut", [0, 10, 0.5, -30, -1])
def test_an_archive_that_is_cut_short(small: Path, cut: float) -> None:
    put(small)
    source = small / "images_background.zip"
    whole = source.read_bytes()
    source.write_bytes(whole[: round(cut * len(whole)) if isinstance(cut, float) else cut])
    with pytest.raises(FormatError, match=r"images_background\.zip is cut short or damaged"):
        omniglot()
    assert not cached(small)


def test_an_archive_that_is_not_there(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a download names the file and what to do; nothing is downloaded here."""
    fetching = importlib.import_module("recollect.data.fetch")
    name = "omniglot/images_background.zip"
    monkeypatch.setattr(fetching, "FILES", {name: ("http://127.0.0.1:9/", fetching.FILES[name][1])})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(MissingExtraError, match=f"downloading {name} needs pooch"):
        omniglot()


def test_an_archive_that_cannot_be_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(small)
    place = small / "images_evaluation.zip"
    monkeypatch.setattr(module, "_find", lambda part: place.with_name("gone.zip") if part == "evaluation" else place)
    with pytest.raises(MissingDataError, match=r"gone\.zip cannot be read: No such file"):
        omniglot()


def test_without_pillow(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(small)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(MissingExtraError, match=r"recollect\[experiments\]"):
            omniglot()
    assert same(omniglot(), 28)


def _halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _saved(pixels: Tensor, names: str | None = "a\nb\nc") -> Callable[[Path], None]:
    metadata = None if names is None else {"names": names}
    return lambda path: save_file({"pixels": pixels}, path, metadata=metadata)


PIXELS = torch.zeros(3, 20, 28, 28, dtype=torch.uint8)
SPOILED = {
    "cut short": _halved,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"some text that is no tensor"),
    "of another size": _saved(PIXELS[..., :20].contiguous()),
    "of fewer characters": _saved(PIXELS[:2]),
    "without names": _saved(PIXELS, None),
    "with fewer names": _saved(PIXELS, "a\nb"),
    "of other tensors": lambda path: save_file({"more": PIXELS}, path, metadata={"names": "a\nb\nc"}),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_damaged_cache_is_made_anew(small: Path, spoil: Callable[[Path], object]) -> None:
    put(small)
    omniglot()
    source = small / "images_background.zip"
    file = module.cache_folder() / "omniglot" / module.fingerprint(source) / "28.safetensors"
    spoil(file)
    with pytest.raises(FormatError, match=r"28\.safetensors in the cache is damaged .* decoded anew") as caught:
        omniglot()
    assert str(file) in str(caught.value)
    assert same(omniglot(), 28)


def test_a_full_disk_leaves_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    put(small)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            omniglot()
    assert not cached(small)
    assert same(omniglot(), 28)


# The real one ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Characters:
    """Decoded once, in a cache of its own."""
    folder = data_folder()
    if folder is None or not all((folder / "omniglot" / f"images_{part}.zip").is_file() for part in NAMES):
        pytest.skip("Omniglot's zips are not in the data folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECOLLECT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return omniglot()


def test_the_real_one(real: Characters) -> None:
    assert real.pixels.shape == (1623, 20, 28, 28)
    assert len(set(real.names)) == 1623
    alphabets = [
        {real.names[row].split("/")[0] for row in part.tolist()} for part in (real.background, real.evaluation)
    ]
    assert [len(part) for part in alphabets] == [30, 20]
    assert not alphabets[0] & alphabets[1]
    assert torch.equal(torch.cat([real.background, real.evaluation]), torch.arange(1623))
    assert real.names[0] == "Alphabet_of_the_Magi/character01"
    assert real.names[-1] == "ULOG/character26"


def test_the_real_drawings_are_ink_on_an_empty_ground(real: Characters) -> None:
    share = real.pixels.float().mean((-1, -2)) / 255
    assert 0.05 < share.mean() < 0.12
    assert share.min() > 0, "none is empty"
    assert share.max() < 0.5
    assert len(real.pixels.flatten(0, 1).flatten(1).unique(dim=0)) > 32_000, "hardly two are alike"


def test_drawings_of_a_character_are_alike(real: Characters) -> None:
    """The nearest drawing of the first person is of the right one of 20 characters far more often than by chance."""
    images = avg_pool2d(real.pixels.float(), 4).flatten(2)
    right = 0
    for start in range(0, 800, 20):
        first, second = images[start : start + 20, 0], images[start : start + 20, 1]
        right += int((torch.cdist(second, first).argmin(1) == torch.arange(20)).sum())
    assert right / 800 > 0.25
