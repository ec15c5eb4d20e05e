"""Data sets and streams of tasks."""

from recollect.data.corpora import Corpus, penn_treebank, wikitext_2
from recollect.data.datasets import Dataset, digits, mnist
from recollect.data.fetch import data_folder, fetch
from recollect.data.streams import Scenario, Task, permuted, rotated, split

__all__ = [
    "Corpus",
    "Dataset",
    "Scenario",
    "Task",
    "data_folder",
    "digits",
    "fetch",
    "mnist",
    "penn_treebank",
    "permuted",
    "rotated",
    "split",
    "wikitext_2",
]
