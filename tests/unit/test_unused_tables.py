"""Folders that are no classes: parts of a collection, and folders beside a table that gives other labels."""

import json
import logging

import pytest

from pipeline import workqueue
from pipeline.data import sources
from pipeline.errors import UserError
from tests.images import jpeg

JPEG = jpeg()
CAMERAS = {f"cam_{camera}/{camera}{i}.jpg": "xy"[i % 2] for camera in "ab" for i in range(6)}
PARTS = {f"HAM_images_part_{part}/{part}{i}.jpg": "xy"[i % 2] for part in (1, 2) for i in range(6)}
NESTED = {f"images_00{part}/images/{part}{i}.png": "xy"[i % 2] for part in (1, 2) for i in range(6)}


def lines(images, head="file,label", name=lambda path: path.rpartition("/")[2]):
    return "\n".join([head, *(f"{name(path)},{label}" for path, label in images.items())])


def scan(root, images, **tables):
    for path, data in {**dict.fromkeys(images, JPEG), **tables}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data if isinstance(data, bytes) else data.encode())
    with workqueue.without_ray():
        (source,) = sources.discover([str(root)])
    return source


ASKED = {
    "Caffe's list": (CAMERAS, "labels.txt", "\n".join(f"{path} {'xy'.index(k)}" for path, k in CAMERAS.items())),
    "JSON": (CAMERAS, "labels.json", json.dumps(CAMERAS)),
    "annotations": (CAMERAS, "annotations.csv", lines(CAMERAS)),
    "metadata of a name": (CAMERAS, "HAM10000_metadata.csv", lines(CAMERAS)),
    "splits": (CAMERAS, "list_eval_partition.csv", lines(dict.fromkeys(CAMERAS, "train") | {"cam_a/a0.jpg": "test"}, "file,split")),
    "parts": (PARTS, "HAM10000_metadata.csv", lines(PARTS, "image_id,dx")),
    "numbered images": (NESTED, "Data_Entry_2017.csv", lines(NESTED, "Image Index,Finding Labels")),
}  # fmt: skip


@pytest.mark.parametrize("kind", ASKED)
def test_folders_beside_a_table_of_the_images_are_not_taken_for_classes(tmp_path, kind):
    images, name, content = ASKED[kind]
    with pytest.raises(UserError, match=r"--labels .*--class-level 1 ") as error:
        scan(tmp_path, images, **{name: content})
    assert name in str(error.value)


def test_parts_without_a_table_are_asked_about_unless_classes_are_below(tmp_path):
    with pytest.raises(UserError, match=r"part_1, part_2 look like parts of one collection"):
        scan(tmp_path / "parts", {f"part_{part}/{i}.jpg": "" for part in (1, 2) for i in range(2)})
    classes = {f"part_{part}/{name}/{part}.jpg": "" for part in (1, 2) for name in ("ant", "bee")}
    assert scan(tmp_path / "below", classes).names == {"ant", "bee"}
    assert scan(tmp_path / "faces", {f"s{i}/{i}.jpg": "" for i in range(3)}).names == {"s0", "s1", "s2"}


def test_tables_that_say_nothing_else_leave_the_folders_as_classes(tmp_path, caplog):
    """A list of files and class numbers, a list of classes, and a table of other properties, which is mentioned."""
    images = {f"{name}/{i}.jpg": name for name in ("ant", "bee") for i in range(6)}
    numbers = "\n".join(f"{path} {'ab'.index(path[0])}" for path in images)
    logging.getLogger("pipeline").propagate = True
    with caplog.at_level(logging.WARNING, "pipeline"):
        source = scan(tmp_path, images, **{"list.txt": numbers, "classes.txt": "ant\nbee"})
        assert source.names == {"ant", "bee"}
        assert not caplog.text
        source = scan(tmp_path, {}, **{"sizes.csv": lines(dict.fromkeys(images, "60"), "file,width", str)})
    assert source.names == {"ant", "bee"}
    assert "sizes.csv lists the images, but the classes are the folders" in caplog.text
