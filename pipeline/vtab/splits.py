"""Computes the splits of VTAB-1k from the keys alone.

TensorFlow Datasets writes the examples of a split in the order of md5(split name + key) and slices such as train[:800]
use that order. So the keys of a data set determine every split of task_adaptation:

    train800  train pool[:800]     val200  val pool[:200]     train800val200  both, 1,000 in all
    train, val, test  the pools    trainval  train + val
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from pipeline.errors import UserError, nearest
from pipeline.vtab import tasks
from pipeline.vtab.tasks import SPLITS, Pool, Task

Key = int | str | bytes
K = TypeVar("K", int, str, bytes)
T = TypeVar("T")

# {split: (pool, number of its first examples; None: all)}
PARTS: dict[str, tuple[tuple[str, int | None], ...]] = {
    "train800": (("train", 800),),
    "val200": (("val", 200),),
    "train800val200": (("train", 800), ("val", 200)),
    "train": (("train", None),),
    "val": (("val", None),),
    "trainval": (("train", None), ("val", None)),
    "test": (("test", None),),
}


def tfds_order(split: str, keys: Iterable[K]) -> list[K]:
    """The keys of one TFDS split in the order in which TFDS stores them. An integer
    key is converted to decimal digits."""
    salt = hashlib.md5(split.encode(), usedforsecurity=False)

    def position(key: Key) -> bytes:
        digest = salt.copy()
        digest.update(key if isinstance(key, bytes) else str(key).encode())
        return digest.digest()

    return sorted(keys, key=position)


def check_split(split: str) -> None:
    """Raises UserError with the most similar name for an unknown split."""
    if split not in PARTS:
        raise UserError(f'no split is called "{split}"{nearest(split, SPLITS)}; the splits are {", ".join(SPLITS)}')


def needed(task: Task, split: str) -> list[str]:
    """The TFDS splits that contain the examples of `split`."""
    pools: list[Pool] = [getattr(task, pool) for pool, _ in PARTS[split]]
    return list(dict.fromkeys(name for name, _, _ in pools))


def take(task: Task, split: str, ordered: Mapping[str, Sequence[T]]) -> list[T]:
    """Selects the examples of `split`, in order, from the examples of each TFDS split in TFDS order."""
    chosen: list[T] = []
    for pool, first in PARTS[split]:
        name, start, stop = getattr(task, pool)
        examples = ordered[name]
        # percentages are rounded to the closest example, as in TFDS
        bounds = slice(round(len(examples) * start / 100), round(len(examples) * stop / 100))
        chosen += examples[bounds][:first]
    return chosen


def split_keys(task: str, split: str, keys: Mapping[str, Iterable[K]] | Iterable[K]) -> list[K]:
    """The keys of one VTAB split, in its official order.

    `keys` maps the names of the TFDS splits to all of their keys, in any order: {"train": ..., "validation": ..., "test": ...};
    splits that are not needed may be missing. An iterable is allowed if `split` needs only one TFDS split (for most
    tasks and splits 'train'). Keys have TFDS's form for the data set (docs/vtab.md lists them). Raises UserError for an
    unknown task or split, and if keys of a needed TFDS split are missing.
    """
    entry = tasks.get(task)
    check_split(split)
    wanted = needed(entry, split)
    if not isinstance(keys, Mapping):
        if len(wanted) > 1:
            raise UserError(
                f"{task} {split} needs the TFDS splits {' and '.join(wanted)}: pass a mapping {{name: keys}}"
            )
        keys = {wanted[0]: keys}
    missing = [name for name in wanted if name not in keys]
    if missing:
        raise UserError(f"{task} {split} needs the TFDS split {', '.join(missing)}; keys were given for {list(keys)}")
    return take(entry, split, {name: tfds_order(name, keys[name]) for name in wanted})
