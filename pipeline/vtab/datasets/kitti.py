"""KITTI: frames from a car's camera. The task: the distance of the closest vehicle ahead, in four bins."""

from collections.abc import Iterable, Mapping

import numpy as np

from pipeline.errors import UserError
from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, image_files

VEHICLES = ("Car", "Van", "Truck")


def kitti_distance(vehicle_distances: Iterable[float]) -> int:
    """The bin of the distance to the closest car, van or truck: up to 8 m, up to 20
    m, farther, none. A bin includes its upper edge."""
    closest = np.float32(min(vehicle_distances, default=1000))
    return int(np.sum(np.array([-100, 8, 20, 999], np.float32) < closest)) - 1


def kitti_label(text: str) -> int:
    """The label of one frame from its label_2 file: the type is column 0, z of the location column 13."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return kitti_distance(float(row[13]) for row in rows if row[0] in VEHICLES)


def kitti_videos(permutation: str, mapping: str) -> dict[str, list[int]]:
    """{TFDS split: image numbers}: 10 % of the videos for test, 10 % for validation, drawn with NumPy's seed 123.

    `permutation` is mapping/train_rand.txt (image i is line permutation[i] of the mapping, counted from 1), `mapping` is
    mapping/train_mapping.txt (date, drive, frame).
    """
    lines = mapping.splitlines()
    drives: dict[str, list[int]] = {}
    for image, line in enumerate(permutation.split(",")):
        drives.setdefault(lines[int(line) - 1].split(" ")[1], []).append(image)
    share = max(1, len(drives) // 10)
    generator = np.random.RandomState(123)
    test = set(generator.choice(sorted(drives), share, replace=False).tolist())
    validation = set(generator.choice(sorted(set(drives) - test), share, replace=False).tolist())
    splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for drive, images in drives.items():
        splits["test" if drive in test else "validation" if drive in validation else "train"] += images
    return splits


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    labels = _read_labels(files["data_object_label_2.zip"])
    found, devkit = files["data_object_image_2.zip"], files["devkit_object.zip"].tree
    members = {
        int(name[-10:-4]): name
        for name in found.tree.names()
        if name.startswith("training/image_2/") and name.endswith(".png")
    }
    try:
        videos = kitti_videos(*devkit.texts("mapping/train_rand.txt", "mapping/train_mapping.txt"))
    except (ValueError, IndexError) as error:
        raise UserError(f"{devkit.uri}: mapping/train_rand.txt does not match train_mapping.txt ({error})") from error
    listings = []
    for split, numbers in videos.items():
        unlabelled = [number for number in numbers if number not in labels]
        if unlabelled:
            uri = files["data_object_label_2.zip"].uri
            raise UserError(f"{uri}: no label file for image {unlabelled[0]:06d}")
        paths = [members.get(number, f"training/image_2/{number:06d}.png") for number in numbers]
        listings.append(
            Listing(
                split=split,
                file=image_files(found),
                keys=[path.rpartition("/")[2] for path in paths],
                members=paths,
                labels={"kitti_distance": [labels[number] for number in numbers]},
            )
        )
    return listings


def _read_labels(found: FoundFile) -> dict[int, int]:
    """{image number: label}"""
    tree = found.tree
    labels = {}
    names = [name for name in tree.names() if name.startswith("training/") and name.endswith(".txt")]
    for name, data in tree.read(names):
        try:
            labels[int(name[-10:-4])] = kitti_label(data.decode())
        except (ValueError, IndexError) as error:
            raise UserError(f"{tree.uri}: {name}: not a KITTI label file ({error})") from error
    return labels


DATASET = DataSet(
    name="kitti",
    files=(
        OfficialFile(
            name="data_object_image_2.zip",
            bytes=12_569_945_557,
            sha256="351c5a2aa0cd9238b50174a3a62b846bc5855da256b82a196431d60ff8d43617",
            url="https://s3.eu-central-1.amazonaws.com/avg-kitti/data_object_image_2.zip",
            instead=("training/image_2",),
        ),
        OfficialFile(
            name="data_object_label_2.zip",
            bytes=5_601_213,
            sha256="4efc76220d867e1c31bb980bbf8cbc02599f02a9cb4350effa98dbb04aaed880",
            url="https://s3.eu-central-1.amazonaws.com/avg-kitti/data_object_label_2.zip",
            instead=("training/label_2",),
        ),
        OfficialFile(
            name="devkit_object.zip",
            bytes=63_778,
            sha256="cfde67e531832618ea0fd4844f91e34a45068025e2bef79e278cb812dc2537d0",
            url="https://s3.eu-central-1.amazonaws.com/avg-kitti/devkit_object.zip",
            instead=("mapping",),
        ),
    ),
    classes={"kitti_distance": ["within 8 m", "8 to 20 m", "over 20 m", "no vehicle"]},
    index=index,
)
