"""What corrects a score: ImageNet-ReaL's labels, and test images that the pre-training has seen."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import UserError
from pipeline.transfer.suites import Split, TransferTask

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

DUPLICATES = "duplicates.parquet"


def read_real_labels(uri: str) -> list[list[int]]:
    """ImageNet-ReaL's real.json: for each of the 50,000 validation images, in order, its labels (arXiv 2006.07159)."""
    labels = storage.read_json(uri)
    if not isinstance(labels, list) or not all(
        isinstance(entry, list) and all(type(label) is int and 0 <= label < 1000 for label in entry) for entry in labels
    ):
        raise UserError(f"{uri}: not ImageNet-ReaL's real.json (a list of label lists)")
    return labels


def real_labels(keys: Sequence[str], real: Sequence[Sequence[int]]) -> np.ndarray:
    """Labels (N,M), padded with -1, of validation images: ILSVRC2012_val_00000001 has entry 0.

    Images with an empty list are left out of the accuracy. Raises UserError for a key without such a number.
    """
    width = max(1, max(map(len, real)))
    labels = np.full((len(keys), width), -1, np.int64)
    for row, key in zip(labels, keys, strict=True):
        match = re.search(r"ILSVRC2012_val_(\d{8})", key)
        if not match or not 1 <= int(match[1]) <= len(real):
            raise UserError(f'"{key}" is no image of the ImageNet validation set, which ReaL labels are for')
        entry = real[int(match[1]) - 1]
        row[: len(entry)] = entry
    return labels


def check_real_labels(tasks: Sequence[TransferTask], datasets: Mapping[Split, "Dataset"]) -> None:
    """Raises UserError when a task's test images have no ReaL labels though the task asks for them."""
    for task in tasks:
        if task.real_labels:
            keys = datasets[task.test].table(["key"])["key"].to_pylist()
            real_labels(keys, read_real_labels(task.real_labels))


def read_seen_images(uri: str, tasks: Sequence[TransferTask]) -> dict[str, frozenset[str]]:
    """{task: keys of test images that are also in the pre-training data}; tasks without any have no entry.

    uri: the duplicates.parquet that `jobs/prepare.py --decontaminate` left beside the pre-training data (or that folder),
    which names the evaluation set and the key of every match; or JSON {task: [keys]}. Raises UserError for anything else.
    """
    uri = storage.normalise(uri)
    if uri.endswith(".json"):
        content = storage.read_json(uri) if storage.exists(uri) else None
        if not isinstance(content, dict) or not all(
            isinstance(keys, list) and all(isinstance(key, str) for key in keys) for keys in content.values()
        ):
            raise UserError(f"{uri}: no decontamination report ({{task: [keys]}})")
        by_task = {task.name: content.get(task.name, []) for task in tasks}
        return {name: frozenset(keys) for name, keys in by_task.items() if keys}
    uri = uri if uri.endswith(".parquet") else storage.join(uri, DUPLICATES)
    if not storage.exists(uri):
        raise UserError(f"{uri}: no decontamination report; `jobs/prepare.py --decontaminate` writes one")
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    except pa.ArrowException as error:
        raise UserError(f"{uri}: no decontamination report ({error})") from error
    if not {"set", "match"} <= set(table.column_names):
        raise UserError(f"{uri}: not a decontamination report (columns set and match)")
    pairs = list(zip(table["set"].to_pylist(), table["match"].to_pylist(), strict=True))
    by_task = {
        task.name: [key for place, key in pairs if place and storage.normalise(place) == task.test.uri]
        for task in tasks
    }
    return {name: frozenset(keys) for name, keys in by_task.items() if keys}
