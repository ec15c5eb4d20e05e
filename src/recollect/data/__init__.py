"""Data sets and streams of tasks."""

from recollect.data.datasets import Dataset, digits, mnist
from recollect.data.fetch import data_folder, fetch
from recollect.data.streams import Scenario, Task, permuted, rotated, split

__all__ = ["Dataset", "Scenario", "Task", "data_folder", "digits", "fetch", "mnist", "permuted", "rotated", "split"]
