"""CLEVR: rendered scenes of simple solids. Two tasks: the number of objects, and the distance of the closest one."""

import json
from collections.abc import Iterable, Mapping

import numpy as np

from pipeline.errors import UserError
from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, image_files

MAX_SCENES_BYTES = 1 << 30


def clevr_count(objects: int) -> int:
    """The label of a scene of 3 to 10 objects."""
    return objects - 3


def clevr_distance(distances: Iterable[float]) -> int:
    """The bin of the closest object, -1 without objects. A bin includes its upper edge; float32, as in TFDS."""
    edges = np.array([0, 8, 8.5, 9, 9.5, 10, 100], np.float32)
    return int(np.sum(edges < np.float32(min(distances, default=0)))) - 1


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    """Scene i describes the i-th image in name order. The official test images have no scenes and are not used."""
    tree, images = files["CLEVR_v1.0.zip"].tree, image_files(files["CLEVR_v1.0.zip"])
    names = sorted(name for name in tree.names() if name.endswith(".png"))
    listings = []
    for split, folder in (("train", "train"), ("validation", "val")):
        members = [name for name in names if f"/images/{folder}/" in f"/{name}"]
        (text,) = tree.texts(f"CLEVR_v1.0/scenes/CLEVR_{folder}_scenes.json", limit=MAX_SCENES_BYTES)
        scenes = json.loads(text)["scenes"]
        if len(scenes) != len(members):
            raise UserError(f"{tree.uri}: {len(members):,} {folder} images, but {len(scenes):,} scenes")
        keys = [member.rpartition("/")[2] for member in members]
        for key, scene in zip(keys, scenes, strict=True):
            if scene.get("image_filename", key) != key:
                raise UserError(f"{tree.uri}: expected the scene of {key}, found that of {scene['image_filename']}")
        objects = [scene["objects"] for scene in scenes]
        labels = {
            "clevr_count": [clevr_count(len(scene)) for scene in objects],
            "clevr_distance": [clevr_distance(o["pixel_coords"][2] for o in scene) for scene in objects],
        }
        listings.append(Listing(split=split, file=images, keys=keys, members=members, labels=labels))
    return listings


DATASET = DataSet(
    name="clevr",
    files=(
        OfficialFile(
            name="CLEVR_v1.0.zip",
            bytes=19_021_600_724,
            sha256="5cd61cf1096ed20944df93c9adb31e74d189b8459a94f54ba00090e5c59936d1",
            url="https://dl.fbaipublicfiles.com/clevr/CLEVR_v1.0.zip",
            instead=("CLEVR_v1.0",),
        ),
    ),
    classes={
        "clevr_count": [f"{count} objects" for count in range(3, 11)],
        "clevr_distance": ["up to 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "over 10"],
    },
    index=index,
)
