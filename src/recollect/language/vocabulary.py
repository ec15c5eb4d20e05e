"""Words by number: how a text file becomes the numbers that a language model reads.

The conventions are those of Penn Treebank and WikiText-2: words are what lies between white space, every line, a blank
one too, ends with one ``<eos>``, and what is not in the vocabulary is ``<unk>``. Files are read piece by piece, so that
neither their length nor that of a line matters.
"""

import codecs
import io
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from recollect.errors import (
    DtypeError,
    FormatError,
    MissingDataError,
    SettingError,
    ShapeError,
    require_tensor,
    require_whole,
)

UNKNOWN = "<unk>"
END = "<eos>"

_BYTE_ORDER_MARK = "\ufeff"
_NUL = "\0"  # what UTF-16 without a mark is full of, read as something else
_PIECE = 1 << 20  # bytes read at a time: their words, as strings, take some 15 MB


class Vocabulary:
    """The words that a language model knows, by number.

    Args:
        words: The words in the order of their numbers, all different, without white space, and ``<eos>`` among them.
            With ``<unk>`` among them, words that are not in the vocabulary can be read: as that.
        counts: How often each of them was in the training text.

    Attributes:
        words: The same.
        counts: The same, as int64.
        end: The number of ``<eos>``.
        unknown: The number of ``<unk>``, or None where there is none.

    Raises:
        SettingError: If ``words`` are not as described, or a count is below 0.
        ShapeError: If there is not one count for each word.
        DtypeError: If the counts are no whole numbers.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "text.txt")
        ...     _ = file.write_text("the cat and the dog\\nthe end\\n")
        ...     vocabulary = Vocabulary.build(file, min_count=2)
        ...     tokens = vocabulary.encode(file)
        >>> vocabulary.words, vocabulary.counts
        (('<unk>', 'the', '<eos>'), tensor([4, 3, 2]))
        >>> tokens
        tensor([1, 0, 0, 1, 0, 2, 1, 0, 2])
    """

    def __init__(self, words: Sequence[str], counts: Int[Tensor, " c"]) -> None:
        self._numbers = {word: number for number, word in enumerate(words)}
        for number, word in enumerate(words):
            if not isinstance(word, str) or word.split() != [word]:
                raise SettingError(f"words must be strings without white space, got {word!r} at {number}.")
            if self._numbers[word] != number:
                raise SettingError(
                    f"words must be different, got {_short(word)} at {number} and at {self._numbers[word]}."
                )
        if END not in self._numbers:
            raise SettingError(f"words must have {END} among them: every line ends with it.")
        require_tensor("counts", counts)
        if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
            raise DtypeError(f"counts must be whole numbers, got {counts.dtype}.")
        if counts.shape != (len(words),):
            raise ShapeError(f"counts must have shape ({len(words)},), one for each word, got {tuple(counts.shape)}.")
        if int(counts.min()) < 0:
            raise SettingError(f"counts must be at least 0, got {int(counts.min())}.")
        self.words = tuple(words)
        self.counts = counts.long()
        self.end = self._numbers[END]
        self.unknown = self._numbers.get(UNKNOWN)

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        *,
        min_count: int = 1,
        max_size: int | None = None,
        unknown: bool = False,
        encoding: str = "utf-8",
    ) -> "Vocabulary":
        """Returns the words of a text, the most frequent first; of equally frequent ones the first in the text.

        Words that are left out are counted as ``<unk>``, which joins the vocabulary with the first of them. Where none
        is left out and the text has no ``<unk>`` itself, as by default, the vocabulary has none either, and no text
        with other words can be read: a model would have seen no example of it. ``unknown`` adds it all the same.

        Takes memory for all different words of the text, but not for the text.

        Args:
            path: The training text; see ``encode`` for what a file may be.
            min_count: Words that are in the text less often are left out.
            max_size: How many words there may be at most, ``<unk>`` and ``<eos>`` among them: the rarest others are
                left out, and of equally rare ones the last in the text. No limit when None.
            unknown: Whether there is an ``<unk>`` in any case: with a count of 0 where no word is left out, and then
                the last.
            encoding: The encoding of the file.

        Raises:
            SettingError: If ``min_count`` is below 1, ``max_size`` below 2, or ``encoding`` none that Python knows.
            MissingDataError, FormatError: See ``encode``.
        """
        require_whole("min_count", min_count)
        if max_size is not None:
            require_whole("max_size", max_size, low=2)
        counts: Counter[str] = Counter()
        for _, text in _pieces(path, encoding):
            counts.update(_split(text))  # keeps the order of first appearance, on which the ties depend
        special = {END, UNKNOWN} if unknown else {END, UNKNOWN} & counts.keys()
        others = [word for word in counts if word not in special]
        kept = [word for word in others if counts[word] >= min_count]
        if max_size is not None:
            if len(kept) < len(others) or len(special) + len(kept) > max_size:
                special.add(UNKNOWN)
            kept = sorted(kept, key=counts.__getitem__, reverse=True)[: max_size - len(special)]
        known = special.union(kept)
        totals: Counter[str] = Counter()
        for word, count in counts.items():
            totals[word if word in known else UNKNOWN] += count
        if unknown:
            totals[UNKNOWN] += 0  # makes the entry
        ranked = totals.most_common()  # stable: so are the ties
        return cls([word for word, _ in ranked], torch.tensor([count for _, count in ranked]))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Vocabulary":
        """Returns the vocabulary that ``to_state`` described.

        Raises:
            FormatError: If ``state`` is something else.
        """
        words, counts = state.get("words"), state.get("counts")
        if not isinstance(words, list) or not isinstance(counts, list):
            raise FormatError(f"this is no state of a vocabulary: it must have words and counts, got {list(state)}.")
        if not all(isinstance(word, str) for word in words):
            raise FormatError("this is no state of a vocabulary: words must be strings.")
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise FormatError("this is no state of a vocabulary: counts must be whole numbers of at least 0.")
        try:
            return cls(words, torch.tensor(counts, dtype=torch.int64))
        except (SettingError, ShapeError) as error:
            raise FormatError(f"this is no state of a vocabulary: {error}") from error

    def to_state(self) -> dict[str, Any]:
        """Returns the vocabulary as lists of words and counts, such as a checkpoint or JSON can hold."""
        return {"words": list(self.words), "counts": self.counts.tolist()}

    def __len__(self) -> int:
        """Returns how many words there are."""
        return len(self.words)

    def number(self, word: str) -> int:
        """Returns the number of a word: that of ``<unk>`` if it is not in the vocabulary.

        Raises:
            SettingError: If it is not, and neither is ``<unk>``.
        """
        number = self._numbers.get(word, self.unknown)
        if number is None:
            raise SettingError(f"{_short(word)} is not in the vocabulary, and neither is {UNKNOWN}.")
        return number

    def encode(self, path: str | os.PathLike[str], *, encoding: str = "utf-8") -> Int[Tensor, " n"]:
        """Returns a text file as word numbers, on the CPU, as int64.

        Takes 8 bytes per word, and 12 for a moment at the end; the text itself is never held. If that is too much,
        see ``encode_blocks``. Words that are not in the vocabulary become ``<unk>``, and so ``(tokens ==
        vocabulary.unknown).sum()`` is how many there are, besides those that the file itself has as ``<unk>``. An
        ``<eos>`` that stands in the file is one like those at the ends of lines.

        Lines end with ``\\n``, ``\\r\\n`` or ``\\r``, the last one perhaps with the file. White space is what it is to
        ``str.split``: no-break spaces and the like are. A byte order mark at the beginning is skipped. All other
        characters belong to words.

        Args:
            path: The file, or anything that can be read like one (``/dev/stdin``).
            encoding: Its encoding.

        Raises:
            MissingDataError: If there is no such file, or it cannot be read.
            FormatError: If the file is empty, its bytes are not text in this encoding, or it has a word that is not in
                the vocabulary while there is no ``<unk>``.
            SettingError: If ``encoding`` is none that Python knows.
        """
        (tokens,) = self._blocks(path, sys.maxsize, encoding)
        return tokens

    def encode_blocks(
        self, path: str | os.PathLike[str], size: int, *, encoding: str = "utf-8"
    ) -> Iterator[Int[Tensor, " m"]]:
        """Returns an iterator over what ``encode`` returns, in blocks, for a text that is longer than memory.

        The file is opened when the first block is asked for, and each block is read when it is. Takes 4 bytes per word
        of a block besides the block, and some 20 MB.

        Args:
            path: See ``encode``.
            size: How many words a block has; the last may have fewer.
            encoding: See ``encode``.

        Raises:
            SettingError: If ``size`` is below 1, at the call.
            MissingDataError, FormatError, SettingError: See ``encode``; at the block where it is found.
        """
        require_whole("size", size)
        return self._blocks(path, size, encoding)

    def _blocks(self, path: str | os.PathLike[str], size: int, encoding: str) -> Iterator[Tensor]:
        waiting = array("i")
        for line, text in _pieces(path, encoding):
            words = _split(text)
            if self.unknown is not None:
                waiting.extend(map(self._numbers.get, words, repeat(self.unknown)))
            else:
                try:
                    waiting.extend(map(self._numbers.__getitem__, words))
                except KeyError:
                    raise self._mismatch(path, line, text) from None
            del words
            start = 0
            while len(waiting) - start >= size:
                yield _as_tensor(waiting[start : start + size])
                start += size
            del waiting[:start]
        if waiting:
            yield _as_tensor(waiting)

    def _mismatch(self, path: str | os.PathLike[str], first: int, text: str) -> FormatError:
        line, word = next(
            (number, word)
            for number, line in enumerate(text.split("\n"), first)
            for word in line.split()
            if word not in self._numbers
        )
        return FormatError(
            f"vocabulary mismatch: {path} has the word {_short(word)} in line {line}, which is not among the "
            f"vocabulary's {len(self)} words, and neither is {UNKNOWN}, which could stand for it. Use the vocabulary "
            f"of this text, or build one that leaves out rare words (min_count=2) or has {UNKNOWN} in any case "
            "(unknown=True)."
        )


def _pieces(path: str | os.PathLike[str], encoding: str) -> Iterator[tuple[int, str]]:
    """Yields a text in pieces that end where a word does, each with the number of its first line, counted from 1.

    All lines end with ``\\n``, the last one too.
    """
    line, last = 1, ""
    parts: list[str] = []  # of a word that may go on in the next chunk: joined once, however long it gets
    for chunk in _chunks(path, encoding):
        last = chunk[-1]
        cut = len(chunk) if last.isspace() else len(chunk) - len(chunk.rsplit(None, 1)[-1])
        if cut:
            text = "".join((*parts, chunk[:cut]))
            parts.clear()
            yield line, text
            line += text.count("\n")
        if cut < len(chunk):
            parts.append(chunk[cut:])
    if not last:
        raise FormatError(f"{path} is empty. It must have at least one line.")
    if last != "\n":
        yield line, "".join((*parts, "\n"))


def _chunks(path: str | os.PathLike[str], encoding: str) -> Iterator[str]:
    """Yields the characters of a file, with lines that end in ``\\n``."""
    try:
        "a".encode(encoding)  # refuses codecs that are not of text, such as "hex"
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    except (LookupError, ValueError) as error:
        raise SettingError(
            f"encoding must be one that Python knows, such as 'utf-8' or 'latin-1', got {encoding!r}."
        ) from error
    offset, lines, begun = 0, 0, False
    try:
        with Path(path).open("rb") as file:
            for data in chain(iter(partial(file.read, _PIECE), b""), (b"",)):
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeError as error:
                    where = ""
                    if isinstance(error, UnicodeDecodeError):
                        start = error.start - (len(error.object) - len(data))  # the object begins with held-back bytes
                        lines += decoder.decode(data[: max(start, 0)]).count("\n")
                        byte = error.object[error.start]
                        where = f" byte 0x{byte:02x} at offset {offset + start}, line {lines + 1}:"
                    hint = "Convert it (iconv -f latin1 -t utf-8, say), or pass the encoding that it has."
                    begins = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                    if offset == 0 and begins and not encoding.lower().startswith("utf-16"):
                        hint = "It begins as UTF-16 does: pass that encoding, utf-16."
                    raise FormatError(
                        f"{path} is no text in {encoding}:{where} {getattr(error, 'reason', error)}. {hint}"
                    ) from error
                offset += len(data)
                lines += text.count("\n")
                if _NUL in text:
                    line = lines + 1 - text[text.index(_NUL) :].count("\n")
                    raise FormatError(
                        f"{path} is no text in {encoding}: a zero character in line {line}. Is it in another encoding, "
                        "such as utf-16?"
                    )
                chunk = text if begun else text.removeprefix(_BYTE_ORDER_MARK)
                begun = begun or bool(text)
                if chunk:
                    yield chunk
    except OSError as error:
        raise MissingDataError(f"{path} cannot be read: {error.strerror}.") from error


def _split(text: str) -> list[str]:
    return text.replace("\n", f" {END} ").split()


def _as_tensor(numbers: array) -> Int[Tensor, " m"]:
    return torch.frombuffer(numbers, dtype=torch.int32).long()


def _short(word: str) -> str:
    return repr(word if len(word) <= 40 else word[:40] + "...")
