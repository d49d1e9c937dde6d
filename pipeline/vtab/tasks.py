"""The nineteen tasks of VTAB (arXiv 1910.04867) in one table, in the order of ViT's Table 9.

Pools follow google-research/task_adaptation: each is a slice, in percent, of a split that TensorFlow Datasets (TFDS) defines.
A row names its data set, a module in pipeline/vtab/datasets.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError, nearest
from pipeline.vtab.datasets import get_dataset

Group = Literal["natural", "specialized", "structured"]
Pool = tuple[str, int, int]  # TFDS split, first percent, last percent

SPLITS = ("train800", "val200", "train800val200", "train", "val", "trainval", "test")
ALL = 0, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task. `counts` are the official sizes of the train, val and test pools. `flip` and `random_crop`: whether the
    augmentation is allowed. BiT (arXiv 1912.11370, appendix F) disables it where it would change the label."""

    name: str
    title: str
    group: Group
    dataset: str  # TFDS name of the data set and of its module in datasets/; several tasks may share a data set
    folder: str  # folder in the VTAB-1k copies of the parameter-efficient fine-tuning repositories
    num_classes: int
    train: Pool
    val: Pool
    test: Pool
    counts: tuple[int, int, int]
    flip: bool = True
    random_crop: bool = True

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return list(get_dataset(self.dataset).classes[self.name])


def _task(
    name: str, title: str, group: Group, dataset: str, folder: str, num_classes: int, pools: tuple[Pool, Pool, Pool],
    counts: tuple[int, int, int], **exempt: bool,
) -> Task:  # fmt: skip
    train, val, test = pools
    return Task(
        name=name, title=title, group=group, dataset=dataset, folder=folder, num_classes=num_classes,
        train=train, val=val, test=test, counts=counts, **exempt,
    )  # fmt: skip


def _of_train(percent: int) -> tuple[Pool, Pool, Pool]:
    """A validation pool from the end of 'train', and the test split of the data set."""
    return ("train", 0, percent), ("train", percent, 100), ("test", *ALL)


OWN = ("train", *ALL), ("validation", *ALL), ("test", *ALL)
THREE = ("train", 0, 60), ("train", 60, 80), ("train", 80, 100)
CLEVR = ("train", 0, 90), ("train", 90, 100), ("validation", *ALL)
DSPRITES = ("train", 0, 80), ("train", 80, 90), ("train", 90, 100)
NORB = ("train", *ALL), ("test", 0, 50), ("test", 50, 100)  # val comes from the official test half

TABLE = {
    task.name: task
    for task in (
        _task("caltech101", "Caltech101", "natural", "caltech101", "caltech101", 102, _of_train(90), (2754, 306, 6084)),
        _task("cifar100", "CIFAR-100", "natural", "cifar100", "cifar", 100, _of_train(90), (45000, 5000, 10000)),
        _task("dtd", "DTD", "natural", "dtd", "dtd", 47, OWN, (1880, 1880, 1880)),
        _task("flowers102", "Flowers102", "natural", "oxford_flowers102", "oxford_flowers102", 102, OWN, (1020, 1020, 6149)),
        _task("pets", "Pets", "natural", "oxford_iiit_pet", "oxford_iiit_pet", 37, _of_train(80), (2944, 736, 3669)),
        _task("sun397", "Sun397", "natural", "sun397", "sun397", 397, OWN, (76128, 10875, 21750)),
        _task("svhn", "SVHN", "natural", "svhn_cropped", "svhn", 10, _of_train(90), (65931, 7326, 26032)),
        _task("patch_camelyon", "Camelyon", "specialized", "patch_camelyon", "patch_camelyon", 2, OWN, (262144, 32768, 32768)),
        _task("eurosat", "EuroSAT", "specialized", "eurosat", "eurosat", 10, THREE, (16200, 5400, 5400)),
        _task("resisc45", "Resisc45", "specialized", "resisc45", "resisc45", 45, THREE, (18900, 6300, 6300)),
        _task("retinopathy", "Retinopathy", "specialized", "diabetic_retinopathy_detection", "diabetic_retinopathy", 5, OWN,
              (35126, 10906, 42670)),
        _task("clevr_count", "Clevr-Count", "structured", "clevr", "clevr_count", 8, CLEVR, (63000, 7000, 15000),
              random_crop=False),
        _task("clevr_distance", "Clevr-Dist", "structured", "clevr", "clevr_dist", 6, CLEVR, (63000, 7000, 15000),
              random_crop=False),
        _task("dmlab", "DMLab", "structured", "dmlab", "dmlab", 6, OWN, (65550, 22628, 22735), random_crop=False),
        _task("dsprites_location", "dSpr-Loc", "structured", "dsprites", "dsprites_loc", 16, DSPRITES,
              (589824, 73728, 73728), flip=False, random_crop=False),
        _task("dsprites_orientation", "dSpr-Ori", "structured", "dsprites", "dsprites_ori", 16, DSPRITES,
              (589824, 73728, 73728), flip=False),
        _task("kitti_distance", "KITTI-Dist", "structured", "kitti", "kitti", 4, OWN, (6347, 423, 711), random_crop=False),
        _task("smallnorb_azimuth", "sNORB-Azim", "structured", "smallnorb", "smallnorb_azi", 18, NORB,
              (24300, 12150, 12150), flip=False),
        _task("smallnorb_elevation", "sNORB-Elev", "structured", "smallnorb", "smallnorb_ele", 9, NORB,
              (24300, 12150, 12150)),
    )
}  # fmt: skip

TASKS: tuple[str, ...] = tuple(TABLE)


def get(name: str) -> Task:
    """The task with this name. Raises UserError with the most similar name for an unknown task."""
    if name not in TABLE:
        raise UserError(f'no VTAB task is called "{name}"{nearest(name, TASKS)}; the tasks are {", ".join(TASKS)}')
    return TABLE[name]
