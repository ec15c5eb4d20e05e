"""Data sets and streams of tasks."""

from recollect.data.corpora import Corpus, penn_treebank, wikitext_2
from recollect.data.datasets import Dataset, digits, mnist
from recollect.data.fetch import cache_folder, data_folder, fetch
from recollect.data.images import ImageClasses, Images, tiny_imagenet
from recollect.data.streams import Scenario, Task, permuted, rotated, split

__all__ = [
    "Corpus",
    "Dataset",
    "ImageClasses",
    "Images",
    "Scenario",
    "Task",
    "cache_folder",
    "data_folder",
    "digits",
    "fetch",
    "mnist",
    "penn_treebank",
    "permuted",
    "rotated",
    "split",
    "tiny_imagenet",
    "wikitext_2",
]
