"""Builds the nineteen tasks of VTAB from the original archives, without TensorFlow.

TASKS, get(name)                   the table                          tasks.py
split_keys(task, split, keys)      keys of train800, val200, ...      splits.py
requirements(task)                 required files and their sources   archives.py
prepare(tasks, raw, output)        archives -> datasets               build.py
open_split(uri, split)             a prepared split                   finish.py
"""

from typing import TYPE_CHECKING

from pipeline import lazy

if TYPE_CHECKING:
    from pipeline.vtab.archives import requirements
    from pipeline.vtab.build import Incomplete, build_datasets, check_requests, lock_output, prepare
    from pipeline.vtab.finish import counts_table, open_split
    from pipeline.vtab.splits import split_keys
    from pipeline.vtab.tasks import SPLITS, TASKS, Task, get

__all__ = [
    "SPLITS",
    "TASKS",
    "Incomplete",
    "Task",
    "build_datasets",
    "check_requests",
    "counts_table",
    "get",
    "lock_output",
    "open_split",
    "prepare",
    "requirements",
    "split_keys",
]

# Imported on first use: building needs image libraries, which --help should not import.
__getattr__ = lazy.exports(
    __name__,
    {
        "archives": ("requirements",),
        "build": ("Incomplete", "build_datasets", "check_requests", "lock_output", "prepare"),
        "finish": ("counts_table", "open_split"),
        "splits": ("split_keys",),
        "tasks": ("SPLITS", "TASKS", "Task", "get"),
    },
)
