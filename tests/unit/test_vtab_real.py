"""Real files from VIT_REAL_DATA, if it is set."""

import csv
import json
import shutil
import tarfile

import pytest

from pipeline.data.sources.tfrecord import parse_example, read_records
from pipeline.vtab import prepare
from pipeline.vtab.containers import Tree
from pipeline.vtab.datasets.clevr import clevr_count, clevr_distance
from pipeline.vtab.datasets.kitti import kitti_label
from pipeline.vtab.parts import decode_pixels
from tests.vtab import rows

pytestmark = pytest.mark.usefixtures("without_ray")


def test_raw_samples(real_data, tmp_path):
    """A few files in the owners' own containers (pixels are synthetic)."""
    samples = str(real_data / "vtab-raw-samples")
    expected = {
        "cifar100": (9, 1, 2),
        "patch_camelyon": (5, 3, 4),
        "dmlab": (2, 2, 2),
        "smallnorb_azimuth": (5, 2, 3),
        "clevr_count": (4, 1, 5),
        "retinopathy": (12, 6, 6),
    }
    for task, sizes in expected.items():
        counts = prepare([task], samples, str(tmp_path), verify=False)[task]
        assert tuple(counts[split]["images"] for split in ("train800", "val200", "test")) == sizes


def test_real_kitti_frames_and_clevr_scenes(real_data):
    folder = real_data / "kitti-3frames" / "training"
    labels = [kitti_label((folder / f"label_2/{i:06d}.txt").read_text()) for i in range(3)]
    assert labels == [3, 2, 2]
    tree = Tree(str(folder / "image_2"), "training/image_2")
    for name, data in tree.read(tree.names()):
        assert decode_pixels(data).shape in {(370, 1224, 3), (375, 1242, 3)}, name
    scenes = json.loads((real_data / "clevr-generated" / "CLEVR_scenes.json").read_text())["scenes"]
    for scene_ in scenes:
        assert 0 <= clevr_count(len(scene_["objects"])) < 8
        assert 0 <= clevr_distance(o["pixel_coords"][2] for o in scene_["objects"]) < 6
    for file in (real_data / "clevr-generated" / "images").glob("*.png"):
        assert decode_pixels(file.read_bytes()).shape == (240, 320, 3)


def test_real_flowers(real_data, tmp_path):
    """605 of the 8,189 photographs with the official label files."""
    folder = tmp_path / "oxford_flowers102"
    folder.mkdir()
    with tarfile.open(real_data / "flowers102-partial.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    for name in ("imagelabels.mat", "setid.mat", "jpg"):
        shutil.move(tmp_path / "oxford_flowers102-partial" / name, folder / name)
    counts = prepare(
        ["flowers102"], str(tmp_path), str(tmp_path / "out"), splits=("train", "val", "test"), verify=False
    )
    assert {split: c["images"] + c["rejects"] for split, c in counts["flowers102"].items()} == {
        "train": 1020,
        "val": 1020,
        "test": 6149,
    }
    assert sum(c["images"] for c in counts["flowers102"].values()) == 605
    with open(tmp_path / "oxford_flowers102-partial/present.csv") as file:
        present = {row["file"].removeprefix("jpg/"): row for row in csv.DictReader(file)}
    for split, name in (("train", "train"), ("test", "test")):
        for row in rows(str(tmp_path / "out"), "flowers102", split):
            assert int(present[row["key"]]["label_1based"]) == row["label"] + 1
            assert present[row["key"]]["official_split"] == name


def test_the_dmlab_sample_is_read_with_checksums(real_data):
    for path in sorted((real_data / "vtab-raw-samples/dmlab").iterdir()):
        with open(path, "rb") as file:
            assert all(parse_example(record)["image"][0][:2] == b"\xff\xd8" for record in read_records(file, path.name))
