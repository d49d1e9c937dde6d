"""Helpers for tests of VTAB's data; the fixtures vtab_raw and vtab_prepared are in conftest.py."""

import cv2
import numpy as np

from pipeline.vtab import archives, open_split
from pipeline.vtab.datasets.base import Listing
from pipeline.vtab.examples import list_examples


def list_raw(raw: str, dataset: str) -> list[Listing]:
    """Every example of a data set in a folder of archives."""
    return list_examples(dataset, archives.locate(raw, dataset)[0])


def rows(output: str, task: str, split: str) -> list[dict]:
    """All rows of a prepared split."""
    dataset = open_split(f"{output}/{task}", split)
    return dataset.read(range(len(dataset)))


def pixels(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
