"""Two kinds of ready-made copies: folders that TensorFlow Datasets prepared, and the VTAB-1k folders of the
parameter-efficient fine-tuning repositories. Both already have the order of the splits, so nothing is recomputed.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from pipeline import storage
from pipeline.data.sources.tfrecord import parse_example, read_records
from pipeline.errors import UserError, plural
from pipeline.vtab.containers import png
from pipeline.vtab.datasets.base import ArchiveFile, Listing, Member, read_tree
from pipeline.vtab.datasets.clevr import clevr_count, clevr_distance
from pipeline.vtab.datasets.dsprites import dsprites_label
from pipeline.vtab.datasets.kitti import kitti_distance
from pipeline.vtab.tasks import Task

# ---------------------------------------------------------------- TFDS

CONFIGS = {"sun397": "tfds", "eurosat": "rgb", "diabetic_retinopathy_detection": "btgraham-300"}


def tfds_folder(raw: str, dataset: str) -> str | None:
    """RAW/<data set>/[config/]<version> with the newest version, if TFDS prepared the data set there."""
    parent = storage.join(raw, dataset, *([CONFIGS[dataset]] if dataset in CONFIGS else []))
    # dataset_info.json may be missing in a copy; the names of the shards suffice
    wanted = re.compile(rf"dataset_info\.json|{re.escape(dataset)}-.*-of-.*")
    versions = [
        version
        for version in storage.list_folders(parent)
        if any(
            wanted.fullmatch(file.path) for file in storage.list_files(storage.join(parent, version), recursive=False)
        )
    ]
    return storage.join(parent, max(versions, key=_numbers)) if versions else None


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")]


def tfds_label(task: Task, example: dict[str, Any]) -> int:
    """The label of one Example, computed from TFDS's features by the rules of task_adaptation."""
    if task.name == "clevr_count":
        return clevr_count(len(example["objects/size"]))
    if task.name == "clevr_distance":
        return clevr_distance(np.reshape(example["objects/pixel_coords"], (-1, 3))[:, 2])
    if task.name == "kitti_distance":
        z = np.reshape(example["objects/location"], (-1, 3))[:, 2]  # a frame without objects has neither list
        return kitti_distance(z[np.asarray(example["objects/type"]) < 3])  # Car, Van, Truck
    if task.name == "dsprites_location":
        return dsprites_label(int(example["label_x_position"][0]), 32)
    if task.name == "dsprites_orientation":
        return dsprites_label(int(example["label_orientation"][0]), 40)
    feature = {"smallnorb_azimuth": "label_azimuth", "smallnorb_elevation": "label_elevation"}.get(task.name, "label")
    return int(example[feature][0])


def list_tfds_split(folder: str, task: Task, split: str) -> list[Listing]:
    """The examples of one TFDS split in order, one listing per shard. A key consists of the split and the position."""
    names = [info.path for info in storage.list_files(folder, recursive=False)]
    shards = sorted(name for name in names if name.startswith(f"{task.dataset}-{split}.") and "-of-" in name)
    if not shards:
        raise UserError(f"{folder}: no {task.dataset}-{split}.tfrecord-* files; prepare this split with TFDS, too")
    total = int(shards[0].rpartition("-of-")[2])
    if len(shards) != total:
        raise UserError(f"{folder}: {len(shards)} of the {total} shards of '{split}' are present")
    position, listings = 0, []
    for shard in shards:
        if ".tfrecord" not in shard:
            raise UserError(f"{folder}: {shard} is not a TFRecord file; prepare with file_format=tfrecord")
        uri = storage.join(folder, shard)
        with storage.open_file(uri) as stream:
            try:
                records = read_records(stream, uri, check=False)
                labels = [tfds_label(task, parse_example(record, uri)) for record in records]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise UserError(f"{uri}: not the TFDS data set {task.dataset}: feature {error}") from error
        keys = [f"{split}_{position + i:06d}" for i in range(len(labels))]
        file = ArchiveFile(uri=uri, part=task.dataset, read=read_tfds)
        listings.append(
            Listing(split=split, file=file, keys=keys, members=range(len(keys)), labels={task.name: labels})
        )
        position += len(labels)
    return listings


def read_tfds(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    wanted = set(members)
    with storage.open_file(file.uri) as stream:
        for i, record in enumerate(read_records(stream, file.uri)):
            if i not in wanted:
                continue
            data = parse_example(record, file.uri)["image"][0]
            if file.part == "dsprites":  # stored as 0 and 1
                binary = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)
                data = png(binary * np.uint8(255))
            yield i, bytes(data)


# ---------------------------------------------------------------- lists


def lists_folder(raw: str, task: Task) -> str | None:
    """The folder with train800.txt, val200.txt and test.txt, if `raw` is a VTAB-1k copy."""
    folders = [storage.join(raw, *parts) for parts in ((task.folder,), (task.name,), ("vtab-1k", task.folder))]
    return next((folder for folder in folders if storage.exists(storage.join(folder, "train800.txt"))), None)


def list_split(folder: str, task: Task, split: str) -> Listing:
    """The examples of one VTAB split, from lines of the form "<path> <label>".
    Raises UserError for a missing or malformed list."""
    rows: list[tuple[str, int]] = []
    for part in ("train800", "val200") if split == "train800val200" else (split,):
        uri = storage.join(folder, f"{part}.txt")
        try:
            lines = storage.read_bytes(uri).decode("utf-8-sig").splitlines()
            pairs = (line.rsplit(maxsplit=1) for line in lines if line.strip())
            rows += [(path, int(label)) for path, label in pairs]
        except FileNotFoundError as error:
            raise UserError(f"{uri} is missing: a VTAB-1k folder needs this file for the split {split}") from error
        except ValueError as error:
            raise UserError(f"{uri}: expected lines of the form <path> <label> ({error})") from error
    wrong = next((label for _, label in rows if not 0 <= label < task.num_classes), None)
    if wrong is not None:
        raise UserError(f"{folder}/{split}: label {wrong}, but {task.name} has {plural(task.num_classes, 'class')}")
    bad = next((path for path, _ in rows if path.startswith("/") or ".." in path.split("/")), None)
    if bad is not None:
        raise UserError(f"{folder}/{split}: {bad} is outside the folder")
    paths = [path for path, _ in rows]
    file = ArchiveFile(uri=folder, read=read_tree, random_access=True)
    return Listing(split=split, file=file, keys=paths, members=paths, labels={task.name: [label for _, label in rows]})
