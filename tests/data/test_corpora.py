"""The corpora are the known ones, and each file has an address of its own."""

import hashlib
import importlib
from pathlib import Path

import pytest

from recollect.data import Corpus, data_folder, fetch, penn_treebank, wikitext_2
from recollect.errors import MissingDataError

fetch_module = importlib.import_module("recollect.data.fetch")  # the package has the function under this name
FILES = {
    penn_treebank: ("ptb/ptb.train.txt", "ptb/ptb.valid.txt", "ptb/ptb.test.txt"),
    wikitext_2: ("wikitext-2/wiki.train.tokens", "wikitext-2/wiki.valid.tokens", "wikitext-2/wiki.test.tokens"),
}
each = pytest.mark.parametrize("corpus", FILES, ids=lambda corpus: corpus.__name__)


def require(corpus) -> None:
    """Skips a test where the files of a corpus are not at hand."""
    folder = data_folder()
    missing = [name for name in FILES[corpus] if folder is None or not (folder / name).is_file()]
    if missing:
        pytest.skip(f"{missing[0]} is not here: set RECOLLECT_DATA to a folder that holds it")


@each
def test_a_corpus_is_the_known_one(corpus) -> None:
    require(corpus)
    for name, path in zip(FILES[corpus], corpus(), strict=True):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if name != "wikitext-2/wiki.train.tokens":  # of which there are copies with the articles in another order
            assert digest == fetch_module.FILES[name][1]


@each
def test_a_corpus_has_three_parts_in_the_data_folder(corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FILES[corpus]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path))
    assert corpus() == Corpus(*(tmp_path / name for name in FILES[corpus]))


def test_the_remote_name_of_a_file_may_be_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"the words"
    asked = {}

    def retrieve(url: str, known_hash: str, path: Path, fname: str) -> None:
        asked[fname] = url
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes(content)
        assert len(known_hash) == len("sha256:") + 64

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("pooch.retrieve", retrieve)
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    for corpus, names in FILES.items():
        assert corpus() == Corpus(*(tmp_path / "cache" / name for name in names))
    assert fetch(FILES[wikitext_2][0]).read_bytes() == content
    assert {name: url.rpartition("/")[2] for name, url in asked.items()} == {
        "ptb.train.txt": "ptb.train.txt",
        "ptb.valid.txt": "ptb.valid.txt",
        "ptb.test.txt": "ptb.test.txt",
        "wiki.train.tokens": "train.txt",
        "wiki.valid.tokens": "valid.txt",
        "wiki.test.tokens": "test.txt",
    }


def test_a_download_that_fails_names_the_whole_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def retrieve(*_: object, **__: object) -> None:
        raise OSError("no network")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("pooch.retrieve", retrieve)
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingDataError, match=r"wikitext-2/train\.txt: no network.*holds wikitext-2/wiki\.train"):
        wikitext_2()
    with pytest.raises(MissingDataError, match=r"data/ptb\.train\.txt: no network.*holds ptb/ptb\.train\.txt"):
        penn_treebank()


def test_every_file_has_its_own_checksum() -> None:
    checksums = [sha256 for _, sha256 in fetch_module.FILES.values()]
    assert all(len(sha256) == 64 and set(sha256) <= set("0123456789abcdef") for sha256 in checksums)
    assert len(set(checksums)) == len(checksums)
