"""One module per data set, under its TFDS name: the official archives, their contents, the labels, and how images are
read. To add a data set, write a module that defines DATASET (a `DataSet`, see base.py), and add a row for each of its
tasks to pipeline/vtab/tasks.py. Image files are copied unchanged; arrays of pixels are encoded as PNG, which is
lossless.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.vtab.datasets.base import DataSet


def get_dataset(name: str) -> "DataSet":
    """The data set with the TFDS name `name`. Its module is imported on first use,
    because a task needs only one of sixteen."""
    return importlib.import_module(f"{__name__}.{name}").DATASET
