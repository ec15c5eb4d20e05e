"""Words by number: the counts that the literature has, a literal loop as the oracle, and files of every kind."""

import json
import os
import re
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recollect import checkpoint
from recollect.data import data_folder
from recollect.errors import DtypeError, FormatError, MissingDataError, SettingError, ShapeError
from recollect.language import vocabulary as module
from recollect.language.vocabulary import Vocabulary

# training, validation and test text -> how many words, how many different ones
CORPORA = {
    "Penn Treebank": (
        {"ptb/ptb.train.txt": 929_589, "ptb/ptb.valid.txt": 73_760, "ptb/ptb.test.txt": 82_430},
        10_000,
    ),
    "WikiText-2": (
        {
            "wikitext-2/wiki.train.tokens": 2_088_628,
            "wikitext-2/wiki.valid.tokens": 217_646,
            "wikitext-2/wiki.test.tokens": 245_569,
        },
        33_278,
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_known_corpora_have_their_known_counts(name: str) -> None:
    lengths, size = CORPORA[name]
    folder = data_folder()
    if folder is None or not all((folder / part).is_file() for part in lengths):
        pytest.skip(f"{name} is not here: set RECOLLECT_DATA to a folder that holds {', '.join(lengths)}")
    train, valid, test = (folder / part for part in lengths)
    vocabulary = Vocabulary.build(train)
    assert len(vocabulary) == size
    assert int(vocabulary.counts.sum()) == lengths[next(iter(lengths))]
    assert vocabulary.counts.tolist() == sorted(vocabulary.counts.tolist(), reverse=True)
    encoded = [vocabulary.encode(path) for path in (train, valid, test)]
    assert [len(tokens) for tokens in encoded] == list(lengths.values())
    assert torch.equal(encoded[0].bincount(), vocabulary.counts)
    blocks = list(vocabulary.encode_blocks(valid, 10_000))
    assert torch.equal(torch.cat(blocks), encoded[1])
    words, _ = oracle(test)
    assert [vocabulary.words[number] for number in encoded[2].tolist()] == words


def oracle(path: Path) -> tuple[list[str], list[int]]:
    """Returns the words of a text and the line of each, by the loop that everyone has written once."""
    words, lines = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            for word in [*line.split(), "<eos>"]:
                words.append(word)
                lines.append(number)
    return words, lines


def text(folder: Path, content: str | bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def of(*words: str) -> Vocabulary:
    return Vocabulary(words, torch.ones(len(words), dtype=torch.int64))


def read(vocabulary: Vocabulary, path: Path, **settings: str) -> str:
    return " ".join(vocabulary.words[number] for number in vocabulary.encode(path, **settings).tolist())


@given(
    content=st.text("ab\u00e9\n\r \t\x0b\x1c\u0085\u00a0\u2028\ufeff\U0001f600", min_size=1, max_size=40),
    piece=st.integers(1, 9),
    size=st.integers(1, 9),
)
def test_pieces_of_any_size_give_what_the_loop_gives(
    tmp_path_factory: pytest.TempPathFactory, content: str, piece: int, size: int
) -> None:
    path = text(tmp_path_factory.getbasetemp(), content)
    words, _ = oracle(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        if not words:
            with pytest.raises(FormatError, match="is empty"):
                Vocabulary.build(path)
            return
        vocabulary = Vocabulary.build(path)
        tokens = vocabulary.encode(path)
        blocks = list(vocabulary.encode_blocks(path, size))
    assert [vocabulary.words[number] for number in tokens.tolist()] == words
    assert list(zip(vocabulary.words, vocabulary.counts.tolist(), strict=True)) == Counter(words).most_common()
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert torch.equal(torch.cat(blocks), tokens)
    assert all(block.dtype == tokens.dtype == torch.int64 and len(block) <= size for block in blocks)


@given(
    content=st.text("abc \n", min_size=1, max_size=60),
    min_count=st.integers(1, 5),
    max_size=st.none() | st.integers(2, 6),
    unknown=st.booleans(),
    always=st.booleans(),
)
def test_rare_words_are_left_out_and_counted_as_unknown(
    tmp_path_factory: pytest.TempPathFactory,
    content: str,
    min_count: int,
    max_size: int | None,
    unknown: bool,
    always: bool,
) -> None:
    path = text(tmp_path_factory.getbasetemp(), content + " <unk>\n" * unknown)
    words, _ = oracle(path)
    vocabulary = Vocabulary.build(path, min_count=min_count, max_size=max_size, unknown=always)
    ranked = [word for word, count in Counter(words).most_common() if word not in {"<eos>", "<unk>"}]
    frequent = [word for word in ranked if words.count(word) >= min_count]
    has_unknown = always or "<unk>" in words or frequent != ranked
    if max_size is not None and len(frequent) + 1 + has_unknown > max_size:
        has_unknown, frequent = True, frequent[: max_size - 2]
    merged = [word if word in {*frequent, "<eos>"} else "<unk>" for word in words]
    expected = Counter(merged).most_common() + [("<unk>", 0)] * (has_unknown and "<unk>" not in merged)
    assert list(zip(vocabulary.words, vocabulary.counts.tolist(), strict=True)) == expected
    assert (vocabulary.unknown is not None) == has_unknown
    assert max_size is None or len(vocabulary) <= max_size
    assert read(vocabulary, path).split() == merged


def test_unknown_can_be_had_where_no_word_is_rare(tmp_path: Path) -> None:
    path = text(tmp_path, "a b b\nb a\n")
    assert Vocabulary.build(path, min_count=2).words == ("b", "a", "<eos>")
    vocabulary = Vocabulary.build(path, min_count=2, unknown=True)
    assert (vocabulary.words, vocabulary.counts.tolist()) == (("b", "a", "<eos>", "<unk>"), [3, 2, 2, 0])
    assert read(vocabulary, text(tmp_path, "a zebra\n")) == "a <unk> <eos>"


def test_words_are_numbered_by_frequency_and_then_by_first_appearance(tmp_path: Path) -> None:
    vocabulary = Vocabulary.build(text(tmp_path, "d c b a b\nc\n"))
    assert vocabulary.words == ("c", "b", "<eos>", "d", "a")
    assert vocabulary.counts.tolist() == [2, 2, 2, 1, 1]
    assert (vocabulary.end, vocabulary.unknown, len(vocabulary)) == (2, None, 5)
    assert [vocabulary.number(word) for word in vocabulary.words] == [0, 1, 2, 3, 4]


def test_the_largest_size_counts_the_special_words(tmp_path: Path) -> None:
    path = text(tmp_path, "a a a b b c\n")
    assert Vocabulary.build(path, max_size=4).words == ("a", "b", "c", "<eos>")
    assert Vocabulary.build(path, max_size=3).words == ("a", "<unk>", "<eos>")
    assert Vocabulary.build(path, max_size=2).words == ("<unk>", "<eos>")


def test_words_outside_the_vocabulary_become_unknown(tmp_path: Path) -> None:
    vocabulary = of("a", "<eos>", "<unk>")
    tokens = vocabulary.encode(text(tmp_path, "a b <unk>\nc a\n"))
    assert tokens.tolist() == [0, 2, 2, 1, 2, 0, 1]
    assert vocabulary.unknown == vocabulary.number("b") == 2


@given(content=st.text("ab\n\r ", min_size=1, max_size=30), piece=st.integers(1, 9))
def test_without_unknown_the_first_word_outside_is_named_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, content: str, piece: int
) -> None:
    path = text(tmp_path_factory.getbasetemp(), content + " <eos> odd\nodder odd")
    line = dict(zip(*oracle(path), strict=True))
    known = of(*sorted(line.keys() - {"odd", "odder"}))
    first = content.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        with pytest.raises(FormatError, match=rf"mismatch: .*text\.txt has the word 'odd' in line {first}, which"):
            known.encode(path)


def test_a_mismatch_says_what_to_do_and_cuts_long_words(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"'x{40}\.\.\.' in line 1.*the vocabulary's 1 words.*\(min_count=2\).*unknown=True"
    ):
        of("<eos>").encode(text(tmp_path, "x" * 1000))
    with pytest.raises(SettingError, match="'x' is not in the vocabulary, and neither is <unk>"):
        of("<eos>").number("x")


LINES = {
    "\\n": (b"a b\n\nc\n", "a b <eos> <eos> c <eos>"),
    "\\r\\n": (b"a b\r\n\r\nc\r\n", "a b <eos> <eos> c <eos>"),
    "\\r": (b"a b\r\rc\r", "a b <eos> <eos> c <eos>"),
    "a last line without an end": (b"a b\n\nc", "a b <eos> <eos> c <eos>"),
    "a last line of white space": (b"a\n ", "a <eos> <eos>"),
    "a blank line alone": (b"\n", "<eos>"),
    "white space alone": (b"  ", "<eos>"),
    "a byte order mark": ("\ufeffa b\n".encode(), "a b <eos>"),
    "<eos> in the file": (b"a <eos>\n", "a <eos> <eos>"),
}


@pytest.mark.parametrize(("content", "expected"), LINES.values(), ids=LINES.keys())
def test_lines(tmp_path: Path, content: bytes, expected: str) -> None:
    path = text(tmp_path, content)
    assert read(Vocabulary.build(path), path) == expected


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-8-sig", "shift_jis", "UTF8"])
def test_other_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    content = "日本 a" if encoding == "shift_jis" else "é à"
    path = text(tmp_path, (content + "\r\n").encode(encoding))
    monkeypatch.setattr(module, "_PIECE", 3)
    vocabulary = Vocabulary.build(path, encoding=encoding)
    assert read(vocabulary, path, encoding=encoding) == content + " <eos>"
    assert torch.equal(next(vocabulary.encode_blocks(path, 9, encoding=encoding)), torch.tensor([0, 1, 2]))


WRONG = {
    "latin-1": ("a\nbc\r\nca\u00e9 b\n".encode("latin-1"), "utf-8", "byte 0xe9 at offset 8, line 3: invalid cont"),
    "in the first byte": (b"\xff\xfd", "utf-8", "byte 0xff at offset 0, line 1: invalid start byte"),
    "cut at the end": (b"a\n\xe2\x82", "utf-8", "byte 0xe2 at offset 2, line 2: unexpected end of data"),
    "surrogates": (b"ab\n\xed\xa0\x80", "utf-8", "byte 0xed at offset 3, line 2"),
    "behind long characters": ("€€\n€".encode() + b"\xe2\x82a", "utf-8", "byte 0xe2 at offset 10, line 2"),
    "not ASCII": (b"a\n\nb\n\x80", "ascii", "byte 0x80 at offset 5, line 4"),
    "Shift JIS": ("日本\n".encode("shift_jis") + b"\x80\n", "shift_jis", "byte 0x80 at offset 5, line 2"),
    "UTF-16 cut": ("\u0a0a\na".encode("utf-16-le")[:-1], "utf-16-le", "offset 4, line 2: truncated data"),
    "UTF-16 without a mark": (b"a\0b\0", "utf-16", "[Ss]tream does not start with BOM"),
}


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize(("content", "encoding", "message"), WRONG.values(), ids=WRONG.keys())
def test_bytes_that_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str, message: str, piece: int
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    path = text(tmp_path, content)
    for use in (Vocabulary.build, of("<unk>", "<eos>").encode):
        with pytest.raises(FormatError, match=f"text.txt is no text in.*{message}") as caught:
            use(path, encoding=encoding)
        assert "iconv" in str(caught.value)
        assert "pass the encoding" in str(caught.value)


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_the_mark_of_utf_16_is_known(tmp_path: Path, mark: bytes) -> None:
    path = text(tmp_path, mark + "a b\n".encode("utf-16-le" if mark[0] == 0xFF else "utf-16-be"))
    with pytest.raises(FormatError, match=r"is no text in utf-8: byte .* It begins as UTF-16 does: pass .* utf-16\.$"):
        Vocabulary.build(path)
    assert Vocabulary.build(path, encoding="utf-16").words == ("a", "b", "<eos>")


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize(("content", "line"), [(b"a\0b\0", 1), (b"a\nb\n\nc \0 d\n\n", 4), (b"\0", 1)])
def test_zeros_are_no_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, line: int, piece: int
) -> None:
    """UTF-16 without a mark, or any other binary file, would be words that a model learns by heart."""
    monkeypatch.setattr(module, "_PIECE", piece)
    message = f"no text in utf-8: a zero character in line {line}. Is it in another encoding, such as utf-16?"
    for use in (Vocabulary.build, of("<unk>", "<eos>").encode):
        with pytest.raises(FormatError, match=re.escape(message)):
            use(text(tmp_path, content))


def test_an_encoding_that_python_does_not_know(tmp_path: Path) -> None:
    path = text(tmp_path, "a\n")
    for encoding in ("klingon", "hex", "a\0b", "undefined"):
        with pytest.raises(SettingError, match=r"encoding must be one that Python knows.*got"):
            Vocabulary.build(path, encoding=encoding)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"], ids=["no bytes", "a byte order mark"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    path = text(tmp_path, content)
    for use in (Vocabulary.build, of("<eos>").encode, lambda path: next(of("<eos>").encode_blocks(path, 3))):
        with pytest.raises(FormatError, match=r"text.txt is empty\. It must have at least one line"):
            use(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for use in (Vocabulary.build, of("<eos>").encode):
        with pytest.raises(MissingDataError, match=r"gone.txt cannot be read: No such file"):
            use(tmp_path / "gone.txt")
        with pytest.raises(MissingDataError, match="cannot be read: Is a directory"):
            use(tmp_path)


def test_a_path_may_be_a_string_or_a_pipe(tmp_path: Path) -> None:
    path = text(tmp_path, "a b\n" * 1000)
    expected = of("a", "b", "<eos>").encode(str(path))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),))
    writer.start()
    assert torch.equal(of("a", "b", "<eos>").encode(pipe), expected)
    writer.join()


def test_a_long_word_takes_time_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 16)  # joined anew with each piece, it would take minutes
    word = "x" * 1_500_000
    vocabulary = Vocabulary.build(text(tmp_path, f"a {word} b"))
    assert vocabulary.words == ("a", word, "b", "<eos>")


@pytest.mark.parametrize("end", ["\n", " "], ids=["lines", "one line"])
def test_blocks_are_read_when_asked_for_and_the_text_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(module, "_PIECE", 1 << 12)
    path = text(tmp_path, (f"word another{end}" * 30_000).encode() + b"\xff")
    vocabulary = of("word", "another", "<eos>")
    tracemalloc.start()
    try:
        blocks = vocabulary.encode_blocks(path, 1000)
        for _ in range(59):
            assert len(next(blocks)) == 1000
        with pytest.raises(FormatError, match="byte 0xff at offset 390000"):
            list(blocks)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "through", [lambda state: state, lambda state: json.loads(json.dumps(state))], ids=["as is", "JSON"]
)
def test_state_round_trip(tmp_path: Path, through: Callable[[dict], dict]) -> None:
    built = Vocabulary.build(text(tmp_path, "the cat é the\nend\n"), min_count=2)
    again = Vocabulary.from_state(through(built.to_state()))
    assert again.words == built.words
    assert torch.equal(again.counts, built.counts)
    assert again.counts.dtype == torch.int64
    assert (again.end, again.unknown) == (built.end, built.unknown)


def test_a_checkpoint_holds_a_vocabulary(tmp_path: Path) -> None:
    built = Vocabulary.build(text(tmp_path, "the cat é\x01 the\nend\n"))
    checkpoint.write(tmp_path / "model", {"vocabulary": built.to_state()}, run={})
    state = checkpoint.read(tmp_path / "model", run={})
    assert state is not None
    again = Vocabulary.from_state(state["vocabulary"])
    assert (again.words, again.counts.tolist()) == (built.words, built.counts.tolist())


FOREIGN = {
    "nothing": ({}, r"must have words and counts, got \[\]"),
    "no counts": ({"words": ["<eos>"]}, r"got \['words'\]"),
    "a word for words": ({"words": "<eos>", "counts": [1]}, "must have words and counts"),
    "fractions": ({"words": ["<eos>"], "counts": [1.5]}, "counts must be whole numbers"),
    "counts below 0": ({"words": ["<eos>"], "counts": [-1]}, "of at least 0"),
    "counts too large": ({"words": ["<eos>"], "counts": [2**63]}, "counts must be whole numbers"),
    "a count too few": ({"words": ["<eos>", "a"], "counts": [1]}, r"shape \(2,\), one for each word, got \(1,\)"),
    "a word twice": ({"words": ["<eos>", "a", "b", "a"], "counts": [1] * 4}, "got 'a' at 1 and at 3"),
    "white space": ({"words": ["<eos>", "a b"], "counts": [1, 1]}, "without white space, got 'a b' at 1"),
    "an empty word": ({"words": ["<eos>", ""], "counts": [1, 1]}, "got '' at 1"),
    "numbers for words": ({"words": ["<eos>", 3], "counts": [1, 1]}, "words must be strings"),
    "no <eos>": ({"words": ["a"], "counts": [1]}, "words must have <eos> among them"),
    "no words": ({"words": [], "counts": []}, "words must have <eos> among them"),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("state", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_state(state: dict, message: str) -> None:
    with pytest.raises(FormatError, match=f"this is no state of a vocabulary: .*{message}"):
        Vocabulary.from_state(state)


@pytest.mark.usefixtures("untyped")
def test_settings_are_checked(tmp_path: Path) -> None:
    path = text(tmp_path, "a\n")
    for value in (0, -1, True, 1.5):
        with pytest.raises(SettingError, match=f"min_count must be a whole number above 0, got {value}"):
            Vocabulary.build(path, min_count=value)
        with pytest.raises(SettingError, match=f"size must be a whole number above 0, got {value}"):
            of("<eos>").encode_blocks(path, value)
    with pytest.raises(SettingError, match="max_size must be a whole number of at least 2, got 1"):
        Vocabulary.build(path, max_size=1)
    for counts, error, message in (
        ([1], DtypeError, "counts must be a tensor, got list"),
        (torch.ones(1), DtypeError, r"counts must be whole numbers, got torch\.float32"),
        (torch.ones(1, dtype=torch.bool), DtypeError, r"whole numbers, got torch\.bool"),
        (torch.tensor(1), ShapeError, r"shape \(1,\), one for each word, got \(\)"),
        (torch.tensor([-3]), SettingError, "counts must be at least 0, got -3"),
    ):
        with pytest.raises(error, match=message):
            Vocabulary(["<eos>"], counts)


def test_counts_become_int64() -> None:
    vocabulary = Vocabulary(["<eos>", "a"], torch.tensor([3, 1], dtype=torch.int32))
    assert vocabulary.counts.dtype == torch.int64
    assert vocabulary.counts.tolist() == [3, 1]
