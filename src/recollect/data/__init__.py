"""Data sets and streams of tasks."""

from recollect.data.corpora import Corpus, penn_treebank, wikitext_2
from recollect.data.datasets import Dataset, digits, mnist
from recollect.data.episodes import (
    Episodes,
    Sequences,
    by_class,
    class_split,
    episodes,
    jittered,
    sequences,
)
from recollect.data.fetch import cache_folder, data_folder, fetch
from recollect.data.images import ImageClasses, Images, tiny_imagenet
from recollect.data.omniglot import Characters, omniglot
from recollect.data.streams import Scenario, Task, permuted, rotated, split

__all__ = [
    "Characters",
    "Corpus",
    "Dataset",
    "Episodes",
    "ImageClasses",
    "Images",
    "Scenario",
    "Sequences",
    "Task",
    "by_class",
    "cache_folder",
    "class_split",
    "data_folder",
    "digits",
    "episodes",
    "fetch",
    "jittered",
    "mnist",
    "omniglot",
    "penn_treebank",
    "permuted",
    "rotated",
    "sequences",
    "split",
    "tiny_imagenet",
    "wikitext_2",
]
