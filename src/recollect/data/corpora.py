"""The texts that language models are judged on, as files."""

from pathlib import Path
from typing import NamedTuple

from recollect.data.fetch import fetch


class Corpus(NamedTuple):
    """The files of a text: words with white space between them, to be read with one ``<eos>`` after every line."""

    train: Path
    """What to learn from."""
    valid: Path
    """What to choose settings by."""
    test: Path
    """What to report."""


def penn_treebank() -> Corpus:
    """Returns the Penn Treebank as Mikolov et al. (2010) prepared it: in lower case, numbers as ``N``, few words.

    929,589, 73,760 and 82,430 words, of 10,000 different ones; with ``<eos>``, and ``<unk>`` for all rare words.

    Raises:
        MissingDataError, MissingExtraError: See ``fetch``.
    """
    return Corpus(*(fetch(f"ptb/ptb.{part}.txt") for part in Corpus._fields))


def wikitext_2() -> Corpus:
    """Returns WikiText-2 (Merity et al., 2016, arXiv:1609.07843): articles of Wikipedia, whole and in turn.

    2,088,628, 217,646 and 245,569 words, of 33,278 different ones; with ``<eos>``, and ``<unk>`` for all rare words.

    Raises:
        MissingDataError, MissingExtraError: See ``fetch``.
    """
    return Corpus(*(fetch(f"wikitext-2/wiki.{part}.tokens") for part in Corpus._fields))
