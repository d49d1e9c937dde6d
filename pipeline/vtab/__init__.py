"""VTAB's nineteen tasks from their original archives, without TensorFlow.

TASKS, get(name)                   the table                          tasks.py
split_keys(task, split, keys)      who is in train800, val200, ...    splits.py
requirements(task)                 which files, from where            archives.py
prepare(tasks, raw, output)        archives -> datasets               build.py
open_split(uri, split)             a prepared split                   finish.py
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.vtab.archives import requirements
    from pipeline.vtab.build import Incomplete, build_datasets, check_requests, prepare
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
    "open_split",
    "prepare",
    "requirements",
    "split_keys",
]

_HOMES = {
    **dict.fromkeys(("Incomplete", "build_datasets", "check_requests", "prepare"), "build"),
    **dict.fromkeys(("counts_table", "open_split"), "finish"),
    **dict.fromkeys(("SPLITS", "TASKS", "Task", "get"), "tasks"),
    "requirements": "archives",
    "split_keys": "splits",
}


def __getattr__(name: str) -> Any:
    # On first use: building needs image libraries, which --help of a job that only names tasks does not wait for.
    if name in _HOMES:
        return getattr(importlib.import_module(f"pipeline.vtab.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
