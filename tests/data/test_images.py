"""A tiny Tiny-ImageNet as folder, zip and tar.xz, in every kind of damage; kills, a damaged cache, and the real one."""

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache as once
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from recollect.data import ImageClasses, data_folder, images, tiny_imagenet
from recollect.data.images import decoded
from recollect.errors import FormatError, MissingDataError, MissingExtraError

Files = dict[str, bytes]
Parts = dict[str, tuple[Tensor, Tensor, str]]

KINDS = ("folder", "zip", "tar.xz")
WNIDS = ("n02", "n00", "n10")  # as wnids.txt lists them
NUMBERS = (0, 1, 2, 10, 11)  # file names order them 0, 1, 10, 11, 2
NAMES = {"n00": "goldfish, Carassius auratus", "n02": "crème brûlée", "n10": "n10"}  # words.txt lacks the last
ROOT = "tiny-imagenet-200"
TRAIN, TEST = "train/n02/images/n02_10.JPEG", "val/images/val_3.JPEG"


def jpeg(seed: int, *, gray: bool = False, size: tuple[int, int] = (64, 64)) -> bytes:
    """Returns an image of colored blocks."""
    from PIL import Image

    pixels = torch.randint(256, (8, 8, 1 if gray else 3), generator=torch.Generator().manual_seed(seed))
    content = pixels.to(torch.uint8).numpy().tobytes()
    file = io.BytesIO()
    Image.frombytes("L" if gray else "RGB", (8, 8), content).resize(size).save(file, "JPEG")
    return file.getvalue()


@once
def _files() -> Files:
    files = {"words.txt": "".join(f"{w}\t{NAMES[w]}\n" for w in ("n01", "n00", "n02") if w in NAMES).encode()}
    seeds = itertools.count()
    for wnid in WNIDS:
        for number in NUMBERS:
            files[f"train/{wnid}/images/{wnid}_{number}.JPEG"] = jpeg(next(seeds), gray=number == 10)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"n02_0.JPEG\t0\t0\t62\t62\n"
    lines = []
    for number in range(2 * len(WNIDS)):
        files[f"val/images/val_{number}.JPEG"] = jpeg(next(seeds), gray=number == 1)
        lines.append(f"val_{number}.JPEG\t{WNIDS[number % 3]}\t0\t0\t62\t62\n")
    files["val/val_annotations.txt"] = "".join(reversed(lines)).encode()
    files["test/images/test_0.JPEG"] = jpeg(next(seeds))
    return files | {"wnids.txt": "\n".join(WNIDS).encode()}


def files(**changed: bytes | None) -> Files:
    """Returns the content of the fake data set by path; ``changed`` by path, without the files that it maps to None."""
    return {path: content for path, content in (_files() | changed).items() if content is not None}


def packed(content: Files, kind: str, place: Path, *, more: Files | None = None) -> Path:
    """Returns a folder, zip or tar.xz of these files; ``more`` are members by their names in the archive."""
    place.mkdir(parents=True, exist_ok=True)
    members = {f"{ROOT}/{name}": data for name, data in content.items()} | (more or {})
    source = place / (ROOT if kind == "folder" else f"{ROOT}.{kind}")
    if kind == "folder":
        for name, data in members.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(source, "w:xz", preset=0) as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return source


def looked_at(content: bytes) -> Tensor:
    """Returns the pixels of an image, each asked for by its place."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        rows = [[image.getpixel((x, y)) for x in range(width)] for y in range(height)]
    pixels = torch.tensor(rows, dtype=torch.uint8)
    return pixels if pixels.dim() == 3 else pixels[:, :, None].expand(-1, -1, 3)


@once
def wanted() -> Parts:
    content = files()
    named = {wnid: [f"train/{wnid}/images/{wnid}_{n}.JPEG" for n in sorted(NUMBERS, key=str)] for wnid in WNIDS}
    tests = {wnid: [f"val/images/val_{place + step}.JPEG" for step in (0, 3)] for place, wnid in enumerate(WNIDS)}
    return {
        wnid: (*(torch.stack([looked_at(content[path]) for path in paths[wnid]]) for paths in (named, tests)), name)
        for wnid, name in NAMES.items()
    }


def same(found: Parts) -> bool:
    """Whether it is what there is to decode, in the right order."""
    return list(found) == list(wanted()) and all(
        part[2] == mine[2] and all(torch.equal(a, b) for a, b in zip(part[:2], mine[:2], strict=True))
        for part, mine in zip(found.values(), wanted().values(), strict=True)
    )


def content(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "of classes"


def refused(source: Path, cache: Path) -> str:
    """Returns what the error says, having checked that it names the source and leaves nothing in the cache."""
    with pytest.raises(FormatError) as caught:
        decoded(source, cache)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cache.exists()
    return str(caught.value)


# What is decoded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_sources_give_the_pixels(
    tmp_path: Path, cache: Path, kind: str, rng_untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    source = packed(files(), kind, tmp_path / "a place with spaces, ü")
    parts: list[float] = []
    with rng_untouched():
        found = decoded(source, cache, watch=parts.append)
    assert same(found)
    assert {p.dtype for part in found.values() for p in part[:2]} == {torch.uint8}
    assert len(parts) == 3
    assert math.isclose(sum(parts), 1)
    assert sorted(content(cache)) == ["classes.txt", "n00.safetensors", "n02.safetensors", "n10.safetensors"]


def test_all_sources_give_the_same_cache(tmp_path: Path) -> None:
    for kind in KINDS:
        decoded(packed(files(), kind, tmp_path), tmp_path / f"cache of {kind}")
    assert content(tmp_path / "cache of folder") == content(tmp_path / "cache of zip")
    assert content(tmp_path / "cache of folder") == content(tmp_path / "cache of tar.xz")


def test_a_second_call_decodes_nothing(tmp_path: Path, cache: Path) -> None:
    source = packed(files(), "zip", tmp_path)
    decoded(source, cache)
    source.unlink()
    parts: list[float] = []
    assert same(decoded(source, cache, watch=parts.append))
    assert not parts


def test_a_grayscale_image_has_three_equal_channels(tmp_path: Path, cache: Path) -> None:
    train = decoded(packed(files(), "zip", tmp_path), cache)["n02"][0]
    gray = (train == train[..., :1]).all(-1).all(-1).all(-1)
    assert gray.tolist() == [False, False, True, False, False]


def test_images_may_be_taken_by_row() -> None:
    some = images.Images(torch.arange(24, dtype=torch.uint8).view(2, 2, 2, 3), torch.tensor([5, 7]))
    assert some.take(torch.tensor([1, 0, 1])).labels.tolist() == [7, 5, 7]
    assert torch.equal(some.take(slice(1, None)).pixels, some.pixels[1:])


@pytest.mark.parametrize("kind", ["zip", "tar.xz"])
def test_nothing_is_extracted(tmp_path: Path, kind: str) -> None:
    """Names that lead out of the folder are names of members, not of files."""
    place = tmp_path / "a" / "b"
    more = {
        "../evil.txt": b"evil",
        "../../evil.txt": b"evil",
        f"{tmp_path}/evil.txt": b"evil",
        f"{ROOT}/../../evil.txt": b"evil",
        f"{ROOT}/train/../images/evil.txt": b"evil",
    }
    source = packed(files(), kind, place, more=more)
    assert same(decoded(source, place / "cache"))
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {source.name, *content(place / "cache")}


def test_links_in_an_archive_are_not_followed(tmp_path: Path, cache: Path) -> None:
    """A missing image whose name is a link to a file outside is still missing."""
    (tmp_path / "outside.JPEG").write_bytes(jpeg(0))
    source = packed(files(**{TRAIN: None}), "tar.xz", tmp_path)
    with tarfile.open(source, "r") as archive:
        members = [(member, archive.extractfile(member)) for member in archive.getmembers()]
        with tarfile.open(tmp_path / "linked.tar.xz", "w:xz", preset=0) as other:
            link = tarfile.TarInfo(f"{ROOT}/{TRAIN}")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside.JPEG")
            other.addfile(link)
            for member, data in members:
                other.addfile(member, data)
    assert "train/n02/images" in refused(tmp_path / "linked.tar.xz", cache)


# Damage ---------------------------------------------------------------------------------------------------------------


def enormous() -> bytes:
    """Returns a JPEG whose header speaks of 65,500 x 65,500 pixels."""
    data = bytearray(jpeg(0))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = (65_500).to_bytes(2, "big") * 2
    return bytes(data)


BROKEN = {
    "cut short": (jpeg(0)[:-40], "cannot be decoded ("),
    "cut in its header": (jpeg(0)[:20], "cannot be decoded"),
    "empty": (b"", "cannot be decoded: it is no image"),
    "zeros": (bytes(1000), "cannot be decoded: it is no image"),
    "text": (b"<!DOCTYPE html><title>404</title>", "cannot be decoded: it is no image"),
    "too small": (jpeg(0, size=(64, 63)), "should have 64 x 64 pixels, but has 64 x 63"),
    "too large": (jpeg(0, size=(128, 64)), "should have 64 x 64 pixels, but has 128 x 64"),
    "enormous": (enormous(), "cannot be decoded ("),
}


@pytest.mark.parametrize(("kind", "path"), [("folder", TRAIN), ("zip", TEST)])
@pytest.mark.parametrize(("broken", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_an_image_that_cannot_be_decoded(
    tmp_path: Path, cache: Path, kind: str, path: str, broken: bytes, message: str
) -> None:
    source = packed(files(**{path: broken}), kind, tmp_path)
    text = refused(source, cache)
    assert message in text
    assert f"{path} in {source}" in text
    assert "BytesIO" not in text


def test_a_repaired_folder_is_decoded_as_a_whole(tmp_path: Path, cache: Path) -> None:
    source = packed(files(**{TEST: jpeg(0)[:-40]}), "folder", tmp_path)
    refused(source, cache)
    (source / TEST).write_bytes(files()[TEST])
    assert same(decoded(source, cache))


def without(folder: str) -> dict[str, None]:
    return {path: None for path in _files() if path.startswith(folder)}


ANNOTATIONS = _files()["val/val_annotations.txt"]
LACKING = {
    "a class folder": (without("train/n02"), "train/n02/images in .* holds 0 images of class n02, of other classes 5"),
    "an image for training": ({TRAIN: None}, "train/n02/images in .* holds 4 images of class n02, of other classes 5"),
    "an image too many": (
        {"train/n00/images/n00_7.JPEG": jpeg(0)},
        "train/n02/images in .* holds 5 images of class n02, of other classes 6",
    ),
    "all training images": (without("train"), "train/n00/images in .* holds 0 images"),
    "an image for the test": ({TEST: None}, f"lacks {TEST}, which val/val_annotations.txt names"),
    "a line of the annotations": (
        {"val/val_annotations.txt": ANNOTATIONS.partition(b"\n")[2]},
        "val_annotations.txt holds 1 images of class n10, of other classes 2",
    ),
    "all annotations": ({"val/val_annotations.txt": b""}, "val_annotations.txt holds 0 images of class n00"),
    "the annotations": ({"val/val_annotations.txt": None}, "holds no val/val_annotations.txt"),
    "the list of classes": ({"wnids.txt": None}, "holds no wnids.txt"),
    "all classes": ({"wnids.txt": b" \n"}, r"wnids.txt in .* names no class"),
    "a class that has no images": ({"wnids.txt": b"n00\nn02\nn03\nn10\n"}, "holds 0 images of class n03"),
    "everything": (without(""), "holds no wnids.txt"),
}


@pytest.mark.parametrize("kind", ["folder", "tar.xz"])
@pytest.mark.parametrize(("changed", "message"), LACKING.values(), ids=LACKING.keys())
def test_what_is_missing_is_named(
    tmp_path: Path, cache: Path, kind: str, changed: dict[str, bytes | None], message: str
) -> None:
    (tmp_path / ROOT).mkdir()
    source = packed(files(**changed), kind, tmp_path)
    if message.startswith("holds no"):
        message = f"{source} {message}".replace("\\", "\\\\")
    with pytest.raises(FormatError, match=message):
        decoded(source, cache)
    assert "Fetch it again" in refused(source, cache)


def test_other_folders_beside_the_images_are_no_matter(tmp_path: Path, cache: Path) -> None:
    source = packed(files(), "zip", tmp_path, more={f"__MACOSX/{ROOT}/train/n02/images/._n02_0.JPEG": b"junk"})
    assert same(decoded(source, cache))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_files_beside_the_images_are_no_images(tmp_path: Path, cache: Path, kind: str) -> None:
    """Some systems leave one beside each file, in the folder itself."""
    hidden = {str(Path(path).with_name(f"._{Path(path).name}")): b"junk" for path in files() if path.endswith(".JPEG")}
    assert len(hidden) > 15
    hidden |= {"._wnids.txt": b"junk", "val/._val_annotations.txt": b"junk", "train/n02/images/.x.JPEG": jpeg(0)}
    source = packed(files(**hidden), kind, tmp_path)
    assert same(decoded(source, cache))


CUTS = (0, 1, 10, 0.1, 0.3, 0.5, 0.7, 0.9, -500, -200, -100, -90, -80, -70, -60, -50, -40, -30, -21, -12, -4, -1)


@pytest.mark.parametrize("kind", ["zip", "tar.xz"])
def test_an_archive_that_is_cut_short(tmp_path: Path, cache: Path, kind: str) -> None:
    """Wherever it is cut: in its head, in an image, behind all images, in its checksum."""
    last = files()
    last["words.txt"] = last.pop("words.txt")  # a cut through these alone leaves all images
    source = packed(last, kind, tmp_path)
    whole = source.read_bytes()
    for cut in CUTS:
        source.write_bytes(whole[: round(cut * len(whole)) if isinstance(cut, float) else cut])
        assert "cut short or damaged" in refused(source, cache)
    source.write_bytes(whole)
    assert same(decoded(source, cache))


def patched(data: bytes, offset: int, value: int) -> bytes:
    """Returns a zip with one byte changed in each entry of its directory."""
    entry = b"PK\x01\x02"
    parts = data.split(entry)
    return entry.join([parts[0], *(p[: offset - 4] + bytes([value]) + p[offset - 3 :] for p in parts[1:])])


@pytest.mark.parametrize("kind", ["zip", "tar.xz"])
def test_what_is_no_archive(tmp_path: Path, cache: Path, kind: str) -> None:
    source = packed(files(), kind, tmp_path)
    whole = source.read_bytes()
    other = packed(files(), "tar.xz" if kind == "zip" else "zip", tmp_path).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for data in (b"<!DOCTYPE html><title>404</title>", bytes(1000), other, bytes(flipped)):
        source.write_bytes(data)
        assert "cut short or damaged" in refused(source, cache)


@pytest.mark.parametrize(
    ("offset", "value", "message"), [(8, 1, "encrypted"), (10, 99, "not supported"), (8, 32, "patched")]
)
def test_a_zip_of_a_kind_that_nobody_reads(tmp_path: Path, cache: Path, offset: int, value: int, message: str) -> None:
    source = packed(files(), "zip", tmp_path)
    source.write_bytes(patched(source.read_bytes(), offset, value))
    assert message in refused(source, cache)


# What stops it --------------------------------------------------------------------------------------------------------


def marks(cache: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.glob("n*.safetensors")}


def test_a_stop_goes_on_where_it_was(tmp_path: Path, cache: Path) -> None:
    source = packed(files(), "zip", tmp_path)

    def stop(_: float) -> None:
        if len(marks(cache)) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoded(source, cache, watch=stop)
    before, parts = marks(cache), []
    assert sorted(content(cache)) == ["n00.safetensors", "n02.safetensors"]
    assert same(decoded(source, cache, watch=parts.append))
    assert math.isclose(sum(parts), 1)
    assert before.items() < marks(cache).items()
    decoded(source, tmp_path / "whole")
    assert content(cache) == content(tmp_path / "whole")


def _die_at(moment: str) -> Callable[[float], None]:
    """In a child: a kill -9 with one class decoded, in the middle of writing one, or before the list of classes."""
    fsync, left = os.fsync, [{"told": 2, "flush": 2, "list": 4}[moment]]

    def die(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def flushed(number: int) -> None:
        die()
        fsync(number)

    if moment == "told":
        return die
    os.fsync = flushed
    return lambda part: None


def _forked(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _meet(folder: Path, number: int) -> Callable[[float], None]:
    """Waits after each class until the other process has come as far."""
    count = itertools.count()

    def watch(_: float) -> None:
        place = next(count)
        (folder / f"{number} at {place}").touch()
        for _ in range(2000):
            if (folder / f"{1 - number} at {place}").exists():
                return
            time.sleep(0.01)
        raise TimeoutError

    return watch


def _in_children(folder: Path) -> None:
    """In a process of its own: three killed and two at the same time."""
    source, signals = packed(files(), "zip", folder), {}
    for moment in ("told", "flush", "list"):
        pid = _forked(lambda moment=moment: decoded(source, folder / moment, watch=_die_at(moment)))
        signals[moment] = os.WTERMSIG(os.waitpid(pid, 0)[1])
    (folder / "meeting").mkdir()
    two = [
        _forked(lambda number=number: decoded(source, folder / "both", watch=_meet(folder / "meeting", number)))
        for number in (0, 1)
    ]
    signals["both"] = [os.waitpid(pid, 0)[1] for pid in two]
    (folder / "signals.json").write_text(json.dumps(signals))


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("children")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=300, env=environment)
    return folder


@pytest.mark.parametrize(("moment", "there"), [("told", 2), ("flush", 1), ("list", 3)])
def test_a_kill_loses_nothing_that_was_decoded(children: Path, moment: str, there: int) -> None:
    source, cache = children / f"{ROOT}.zip", children / moment
    assert json.loads((children / "signals.json").read_text())[moment] == signal.SIGKILL
    before = marks(cache)
    assert len(before) == there
    assert same(decoded(source, cache))
    assert before.items() <= marks(cache).items()
    decoded(source, children / "whole")
    whole, found = content(children / "whole"), content(cache)
    assert {name: found[name] for name in whole} == whole


@pytest.mark.parametrize("suffix", [".zip", ".tar.xz"])
def test_an_archive_that_is_not_there(tmp_path: Path, cache: Path, suffix: str) -> None:
    with pytest.raises(MissingDataError, match=rf"{ROOT}{suffix} cannot be read: No such file"):
        decoded(tmp_path / f"{ROOT}{suffix}", cache)
    assert not cache.exists()


def test_two_processes_at_the_same_time(children: Path) -> None:
    assert json.loads((children / "signals.json").read_text())["both"] == [0, 0]
    decoded(children / f"{ROOT}.zip", children / "whole")
    assert content(children / "both") == content(children / "whole")


def test_a_folder_without_permission(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    source = packed(files(), "folder", tmp_path)
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(MissingDataError, match=rf"{ROOT}/.+ cannot be read: Permission denied"):
        decoded(source, cache)
    assert not cache.exists()


def test_a_cache_without_permission(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *rest: str, **more: str) -> object:
        if self.parent == cache:
            raise PermissionError(13, "Permission denied", str(self))
        return path_open(self, *rest, **more)

    path_open = Path.open
    source = packed(files(), "zip", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbidden)
        with pytest.raises(PermissionError, match=r"Permission denied.*n00.safetensors"):
            decoded(source, cache)
    assert not content(cache)
    assert same(decoded(source, cache))


def test_a_full_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that does not fit leaves nothing; those before it stay."""

    def full(number: int) -> None:
        if next(flushes) == 1:
            raise OSError(28, "No space left on device")
        fsync(number)

    fsync, flushes = os.fsync, itertools.count()
    source = packed(files(), "zip", tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        decoded(source, cache)
    assert list(content(cache)) == ["n00.safetensors"]
    before = marks(cache)
    assert same(decoded(source, cache))
    assert before.items() < marks(cache).items()


def test_a_cached_class_without_permission_is_not_taken_for_damaged(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(file: Path) -> object:
        raise PermissionError(13, "Permission denied", str(file))

    source = packed(files(), "zip", tmp_path)
    decoded(source, cache)
    before = marks(cache)
    monkeypatch.setattr(images, "load_file", forbidden)
    with pytest.raises(PermissionError, match=r"n00\.safetensors"):
        decoded(source, cache)
    assert marks(cache) == before


def test_without_pillow(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = packed(files(), "zip", tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(MissingExtraError, match=r"recollect\[experiments\]"):
            decoded(source, cache)
    assert same(decoded(source, cache))


# A damaged cache ------------------------------------------------------------------------------------------------------


def _halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _of_other_tensors(path: Path) -> None:
    save_file({"train": torch.zeros(5, 64, 64, 3, dtype=torch.uint8)}, path)


DAMAGE = {
    "cut short": _halved,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"some text that is no tensor"),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "gone": Path.unlink,
    "other tensors": _of_other_tensors,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_class_is_decoded_anew(tmp_path: Path, cache: Path, damage: Callable[[Path], object]) -> None:
    source = packed(files(), "zip", tmp_path)
    decoded(source, cache)
    damage(cache / "n02.safetensors")
    with pytest.raises(FormatError, match=r"n02\.safetensors in the cache is damaged .* decoded anew") as caught:
        decoded(source, cache)
    assert str(cache) in str(caught.value)
    assert not cache.exists()
    assert same(decoded(source, cache))


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00\n", b"n0", b"n00\tgoldfish\nn0"])
def test_a_damaged_list_of_classes_is_made_anew(tmp_path: Path, cache: Path, damage: bytes) -> None:
    source = packed(files(), "zip", tmp_path)
    decoded(source, cache)
    (cache / "classes.txt").write_bytes(damage)
    with pytest.raises(FormatError, match="in the cache is"):
        decoded(source, cache)
    assert not cache.exists()
    assert same(decoded(source, cache))


def test_what_others_keep_in_the_folder_stays(tmp_path: Path, cache: Path) -> None:
    source = packed(files(), "zip", tmp_path)
    decoded(source, cache)
    (cache / "notes").mkdir()
    for name in ("notes.txt", "notes/more.safetensors", ".hidden"):
        (cache / name).write_text("mine")
    _halved(cache / "n02.safetensors")
    with pytest.raises(FormatError, match=r"n02\.safetensors in the cache is damaged"):
        decoded(source, cache)
    assert sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*")) == [
        *(".hidden", "notes", "notes.txt", "notes/more.safetensors")
    ]
    assert same(decoded(source, cache))


# As users call it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the data is looked for; the size of the data set is that of the fake one."""
    for name, value in (("_CLASSES", 3), ("_TRAIN", 5), ("_TEST", 2)):
        monkeypatch.setattr(images, name, value)
    (tmp_path / "data" / "tiny-imagenet").mkdir(parents=True)
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "kept"))
    return tmp_path / "data" / "tiny-imagenet"


def is_all(data: ImageClasses) -> bool:
    return all(
        torch.equal(found.pixels, torch.cat([part[place] for part in wanted().values()]))
        and found.labels.tolist() == [label for label in range(3) for _ in range(count)]
        for place, (found, count) in enumerate(((data.train, 5), (data.test, 2)))
    ) and data.names == tuple(NAMES.values())


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_imagenet(small: Path, tmp_path: Path, kind: str) -> None:
    packed(files(), kind, small)
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    parts: list[float] = []
    assert is_all(tiny_imagenet(watch=parts.append))
    assert math.isclose(sum(parts), 1)
    assert is_all(tiny_imagenet(watch=parts.append))
    assert len(parts) == 3, "the second call decodes nothing"
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before, "the data folder is not written"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["tiny-imagenet"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_content_is_another_folder_of_the_cache(small: Path, tmp_path: Path, kind: str) -> None:
    packed(files(), kind, small)
    tiny_imagenet()
    packed(files(**{TRAIN: jpeg(99)}), kind, small)
    assert not torch.equal(tiny_imagenet().train.pixels, torch.cat([part[0] for part in wanted().values()]))
    assert len(list((tmp_path / "kept" / "tiny-imagenet").iterdir())) == 2


def test_where_it_is_looked_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder comes before a zip, a zip before a tar.xz, and all before a download."""
    asked: list[str] = []

    def fetched(name: str) -> Path:
        asked.append(name)
        return packed(files(), "zip", small.parent / "elsewhere")

    monkeypatch.setattr(images, "fetch", fetched)
    assert is_all(tiny_imagenet())
    assert asked == ["tiny-imagenet/tiny-imagenet-200.zip"]
    for kind in ("tar.xz", "zip", "folder"):
        changed = files(**{TRAIN: jpeg(len(kind))})
        packed(changed, kind, small)
        assert torch.equal(tiny_imagenet().train.pixels[7], looked_at(changed[TRAIN]))
    assert len(asked) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_images_is_refused(
    small: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_TRAIN", 6)
    source = packed(files(), kind, small)
    for _ in range(2):
        with pytest.raises(FormatError, match=r"should hold 3 classes of 6 \+ 2 images, but holds 3 classes of 5 \+ 2"):
            tiny_imagenet()
        assert not list((tmp_path / "kept" / "tiny-imagenet").iterdir())
    assert source.exists()


def test_the_cache_may_be_any_folder(small: Path, tmp_path: Path) -> None:
    """A broken image removes what was decoded, not what lies beside it."""
    mine = [tmp_path / "kept" / name for name in ("classes.txt", "a.safetensors", "tiny-imagenet/a.safetensors")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    packed(files(**{TEST: b""}), "zip", small)
    with pytest.raises(FormatError, match=f"{TEST} in .*{ROOT}.zip cannot be decoded"):
        tiny_imagenet()
    assert sorted(path for path in (tmp_path / "kept").rglob("*") if path.is_file()) == sorted(mine)
    packed(files(), "zip", small)
    assert is_all(tiny_imagenet())
    assert all(path.read_text() == "mine" for path in mine)


def test_an_archive_without_permission(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied", str(self))

    packed(files(), "zip", small)
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(MissingDataError, match=rf"{ROOT}\.zip cannot be read: Permission denied"):
        tiny_imagenet()
    assert not (tmp_path / "kept").exists()


# The real one ---------------------------------------------------------------------------------------------------------

_folder = data_folder()
REAL = None if _folder is None else _folder.absolute() / "tiny-imagenet"
needs_real = pytest.mark.skipif(
    REAL is None or not any(REAL.glob(f"{ROOT}*")),
    reason="Tiny-ImageNet is not here: set RECOLLECT_DATA to a folder that holds tiny-imagenet/",
)
needs_tar = pytest.mark.skipif(
    REAL is None or not (REAL / f"{ROOT}.tar.xz").is_file(), reason=f"there is no tiny-imagenet/{ROOT}.tar.xz"
)


@pytest.fixture(scope="module")
def real() -> ImageClasses:
    """Decoded into the user's cache, since it takes a while."""
    return tiny_imagenet()


@needs_real
def test_shapes_and_classes(real: ImageClasses) -> None:
    for part, count in ((real.train, 500), (real.test, 50)):
        assert part.pixels.shape == (200 * count, 64, 64, 3)
        assert part.pixels.dtype == torch.uint8
        assert torch.equal(part.labels, torch.arange(200).repeat_interleave(count))
    assert len(set(real.names)) == 200
    assert real.names[0] == "goldfish, Carassius auratus"
    assert real.names[-1] == "acorn"


@needs_real
def test_colors(real: ImageClasses) -> None:
    some = real.train.pixels[::40].double()
    assert some.mean((0, 1, 2)).tolist() == pytest.approx([122.5, 114.3, 101.4], abs=2)
    assert some.std((0, 1, 2)).tolist() == pytest.approx([70.5, 68.6, 71.8], abs=2)
    gray = (some == some[..., :1]).all(-1).all(-1).all(-1)
    assert 0.01 < gray.double().mean() < 0.03


@needs_tar
def test_pixels_of_the_first_images(real: ImageClasses) -> None:
    """Against what Pillow says of the head of the archive, read as a stream."""
    assert REAL is not None
    rows = {name: row for row, name in enumerate(sorted(f"n01443537_{number}.JPEG" for number in range(500)))}
    gray = 0
    with tarfile.open(REAL / f"{ROOT}.tar.xz", "r|xz") as archive:
        members = (member for member in archive if member.name.endswith(".JPEG"))
        for member in itertools.islice(members, 60):
            file = archive.extractfile(member)
            assert file is not None
            pixels = looked_at(file.read())
            gray += bool((pixels == pixels[..., :1]).all())
            assert torch.equal(real.train.pixels[rows[Path(member.name).name]], pixels), member.name
    assert gray < 60


if __name__ == "__main__":
    _in_children(Path(sys.argv[1]))
