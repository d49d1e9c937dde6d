"""VTAB's nineteen tasks from their original archives, without TensorFlow.

TASKS, get(name)                             the table                    tasks.py
split_keys(task, split, keys)                who is in train800, ...      splits.py
prepare(tasks, raw, output)                  archives -> shards           build.py
open_split(uri, split)                       a prepared split             build.py
requirements(task)                           which files, from where      archives.py
"""

from pipeline.vtab.splits import split_keys
from pipeline.vtab.tasks import SPLITS, TASKS, Task, get

__all__ = ["SPLITS", "TASKS", "Task", "get", "split_keys"]
