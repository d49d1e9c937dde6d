"""Corrections of scores: ImageNet-ReaL labels, and test images that occur in the pre-training data."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import UserError
from pipeline.transfer.protocols import Split, TransferTask

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

DUPLICATES = "duplicates.parquet"


def read_real_labels(uri: str) -> list[list[int]]:
    """Reads ImageNet-ReaL's real.json: the labels of each of the 50,000 validation images, in order (arXiv 2006.07159).

    Raises UserError for other content.
    """
    labels = storage.read_json(uri)
    if not isinstance(labels, list) or not all(
        isinstance(entry, list) and all(type(label) is int and 0 <= label < 1000 for label in entry) for entry in labels
    ):
        raise UserError(f"{uri}: not ImageNet-ReaL's real.json (a list of label lists)")
    return labels


def real_labels(keys: Sequence[str], real: Sequence[Sequence[int]]) -> np.ndarray:
    """Labels (N,M) of validation images, padded with -1: ILSVRC2012_val_00000001 is entry 0 of `real`.

    Images with an empty list do not count for the accuracy. Raises UserError for a key without such a number.
    """
    width = max(1, max(map(len, real)))
    labels = np.full((len(keys), width), -1, np.int64)
    for row, key in zip(labels, keys, strict=True):
        match = re.search(r"ILSVRC2012_val_(\d{8})", key)
        if not match or not 1 <= int(match[1]) <= len(real):
            raise UserError(f'"{key}" is not an image of the ImageNet validation set; ReaL labels need these images')
        entry = real[int(match[1]) - 1]
        row[: len(entry)] = entry
    return labels


def check_real_labels(tasks: Sequence[TransferTask], datasets: Mapping[Split, "Dataset"]) -> None:
    """Raises UserError if a task uses ReaL labels but its test images have none."""
    for task in tasks:
        if task.real_labels:
            keys = datasets[task.test].table(["key"])["key"].to_pylist()
            real_labels(keys, read_real_labels(task.real_labels))


def read_seen_images(uri: str, tasks: Sequence[TransferTask]) -> dict[str, frozenset[str]]:
    """{task: keys of test images that also occur in the pre-training data}, for tasks with such images.

    uri: the duplicates.parquet that `jobs/prepare.py --decontaminate` writes with the pre-training data (or the folder
    of that data), with the evaluation set and key of every match; or JSON {task: [keys]}. Raises UserError for other
    content.
    """
    uri = storage.normalise(uri)
    if uri.endswith(".json"):
        content = storage.read_json(uri) if storage.exists(uri) else None
        if not isinstance(content, dict) or not all(
            isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in content.values()
        ):
            raise UserError(f"{uri}: not a decontamination report ({{task: [keys]}})")
        by_task = {task.name: content.get(task.name, []) for task in tasks}
        return {name: frozenset(keys) for name, keys in by_task.items() if keys}
    uri = uri if uri.endswith(".parquet") else storage.join(uri, DUPLICATES)
    if not storage.exists(uri):
        raise UserError(f"{uri}: no decontamination report; `jobs/prepare.py --decontaminate` writes one")
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    except pa.ArrowException as error:
        raise UserError(f"{uri}: not a decontamination report ({error})") from error
    if not {"set", "match"} <= set(table.column_names):
        raise UserError(f"{uri}: not a decontamination report (columns set and match)")
    pairs = list(zip(table["set"].to_pylist(), table["match"].to_pylist(), strict=True))
    by_task = {
        task.name: [key for place, key in pairs if place and storage.normalise(place) == task.test.uri]
        for task in tasks
    }
    return {name: frozenset(keys) for name, keys in by_task.items() if keys}
