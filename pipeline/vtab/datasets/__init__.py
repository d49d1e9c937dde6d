"""One file a data set, under TFDS's name: the archives of its owners, what is in them, its labels, and how images are read.

A data set belongs to VTAB by a row in pipeline/vtab/tasks.py, which names the file here. So a new one is a file that defines
DATASET (a `DataSet`, see base.py) and a row for each of its tasks. Image files are passed on byte for byte; arrays of pixels
become PNG, which loses nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.vtab.datasets.base import DataSet


def get_dataset(name: str) -> "DataSet":
    """The data set of TFDS's name `name`. Its file is imported when it is needed: a task needs one of sixteen."""
    return importlib.import_module(f"{__name__}.{name}").DATASET
