"""Splits, labels and pixels of every data set, from miniature archives in the official layouts."""

import csv
import gzip
import io
import json
import re
import shutil
import struct
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from pipeline.data.codecs import decode
from pipeline.errors import UserError
from pipeline.vtab import TASKS, datasets, get, miniature, open_split, prepare, split_keys
from pipeline.vtab.tasks import TABLE, Task
from tests.vtab import list_raw, pixels, rows

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_splits_in_the_official_order(task, vtab_raw, vtab_prepared):
    output, results = vtab_prepared
    assert set(results[task]) == {"train800", "val200", "train800val200", "test"}
    keys: dict[str, list] = {}
    for listing in list_raw(vtab_raw, get(task).dataset):
        keys.setdefault(listing.split, []).extend(listing.keys)
    for split, counts in results[task].items():
        expected = [str(key) for key in split_keys(task, split, keys)]
        found = [row["key"] for row in rows(output, task, split)]
        if isinstance(next(iter(keys["train"])), int):  # "train_00012": the number and the TFDS split it counts in
            found = [str(int(key.rpartition("_")[2])) for key in found]
        if task == "sun397":
            expected = [key for key in expected if key != miniature.UNDECODABLE]
        assert counts["images"] == len(found) == len(expected)
        if split == "test":  # large splits are in archive order
            found, expected = sorted(found), sorted(expected)
        assert found == expected
        assert open_split(f"{output}/{task}", split).classes == get(task).classes


@pytest.mark.parametrize("task", TASKS)
def test_no_image_is_in_two_pools(task, vtab_prepared):
    output, _ = vtab_prepared
    train, val, test = ({row["key"] for row in rows(output, task, split)} for split in ("train800", "val200", "test"))
    assert not train & val
    assert not train & test
    assert not val & test


# Pixel distances cannot count discs; the labels of those tasks are compared exactly below.
@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("retinopathy", "clevr_count", "clevr_distance")])
def test_labels_can_be_seen_in_the_pictures(task, vtab_prepared):
    """A nearest-neighbour classifier on small pictures beats guessing: labels and images belong together."""
    output, _ = vtab_prepared

    def arrays(split):
        data = rows(output, task, split)
        small = [
            cv2.resize(cv2.imdecode(np.frombuffer(r["image"], np.uint8), 1), (12, 12)) for r in map(readable, data)
        ]
        return np.stack(small).reshape(len(small), -1).astype(float), np.array([r["label"] for r in data])

    x, y = arrays("train800")
    test_x, test_y = arrays("test")
    nearest = ((test_x[:, None] - x[None]) ** 2).sum(-1).argmin(1)
    guess = max(Counter(test_y.tolist()).values()) / len(test_y)
    assert (y[nearest] == test_y).mean() > guess + 0.15


def readable(row: dict) -> dict:
    """Decodes with the pipeline's decoder, because OpenCV does not read CMYK and GIF."""

    image = decode(row["image"], 10**8).pixels[:, :, ::-1]
    return {**row, "image": cv2.imencode(".png", image)[1].tobytes()}


def test_files_are_kept_bit_for_bit(vtab_raw, vtab_prepared):
    output, _ = vtab_prepared
    with tarfile.open(f"{vtab_raw}/dtd/dtd-r1.0.1.tar.gz") as archive:
        for row in rows(output, "dtd", "test"):
            assert row["image"] == archive.extractfile(f"dtd/images/{row['key']}").read()
            assert get("dtd").classes[row["label"]] == row["key"].split("/")[0]
    with zipfile.ZipFile(f"{vtab_raw}/clevr/CLEVR_v1.0.zip") as archive:
        for row in rows(output, "clevr_count", "test"):
            assert row["image"] == archive.read(f"CLEVR_v1.0/images/val/{row['key']}")
            assert (row["height"], row["width"]) == (80, 120)


def number(row: dict) -> int:
    return int(row["key"].rpartition("_")[2])


def test_manifests_have_the_mean_and_deviation_of_their_pixels(vtab_prepared):
    output, _ = vtab_prepared
    for task, split in (("svhn", "train800"), ("eurosat", "test")):
        images = [pixels(row["image"])[:, :, ::-1] for row in rows(output, task, split)]
        flat = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
        manifest = open_split(f"{output}/{task}", split).manifest
        assert manifest.mean == pytest.approx(flat.mean(0), abs=1e-3)
        assert manifest.std == pytest.approx(flat.std(0), abs=1e-3)


def test_arrays_become_png_without_loss(vtab_raw, vtab_prepared):
    output, _ = vtab_prepared
    with tarfile.open(f"{vtab_raw}/cifar100/cifar-100-binary.tar.gz") as archive:
        data = np.frombuffer(archive.extractfile("cifar-100-binary/test.bin").read(), np.uint8).reshape(-1, 3074)
    for row in rows(output, "cifar100", "test"):
        expected = data[number(row), 2:].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(pixels(row["image"])[:, :, ::-1], expected)
        assert row["label"] == data[number(row), 1]
    mat = loadmat(f"{vtab_raw}/svhn_cropped/test_32x32.mat")
    for row in rows(output, "svhn", "test"):
        assert np.array_equal(pixels(row["image"])[:, :, ::-1], mat["X"][:, :, :, number(row)])
        assert row["label"] == mat["y"][number(row), 0] % 10
    assert 10 in mat["y"]
    assert {row["label"] for row in rows(output, "svhn", "test")} == {0, 1, 2, 3}
    with h5py.File(f"{vtab_raw}/dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5") as file:
        images, latents = file["imgs"][:], file["latents/classes"][:]
    for task, column, width in (("dsprites_location", 4, 2), ("dsprites_orientation", 3, 2.5)):
        for row in rows(output, task, "train800"):
            assert np.array_equal(pixels(row["image"]), images[number(row)] * 255)
            assert row["label"] == latents[number(row), column] // width
    with gzip.open(f"{vtab_raw}/patch_camelyon/camelyonpatch_level_2_split_valid_x.h5.gz") as file:
        x = h5py.File(io.BytesIO(file.read()))["x"][:]
    for row in rows(output, "patch_camelyon", "val200"):
        assert row["key"].startswith("valid_")
        assert np.array_equal(pixels(row["image"])[:, :, ::-1], x[number(row)])


def test_smallnorb_is_the_left_picture(vtab_raw, vtab_prepared):
    output, _ = vtab_prepared
    name = f"{vtab_raw}/smallnorb/smallnorb-5x01235x9x18x6x2x96x96-testing-{{}}.mat.gz"
    with gzip.open(name.format("dat")) as file:
        pairs = np.frombuffer(file.read()[24:], np.uint8).reshape(-1, 2, 96, 96)
    with gzip.open(name.format("info")) as file:
        info = np.frombuffer(file.read()[20:], "<i4").reshape(-1, 4)
    for task, label in (("smallnorb_azimuth", info[:, 2] // 2), ("smallnorb_elevation", info[:, 1])):
        for row in rows(output, task, "test") + rows(output, task, "val200"):
            assert row["key"].startswith("test_")
            assert np.array_equal(pixels(row["image"]), pairs[number(row), 0])
            assert row["label"] == label[number(row)]


def test_clevr_and_retinopathy_labels(vtab_raw, vtab_prepared):
    output, _ = vtab_prepared
    with zipfile.ZipFile(f"{vtab_raw}/clevr/CLEVR_v1.0.zip") as archive:
        scenes = json.loads(archive.read("CLEVR_v1.0/scenes/CLEVR_train_scenes.json"))["scenes"]
    objects = {scene["image_filename"]: scene["objects"] for scene in scenes}
    near = {7.9: 0, 8.0: 0, 8.3: 1, 9.2: 3, 9.7: 4, 11.0: 5}
    for row in rows(output, "clevr_count", "train800"):
        assert row["label"] == len(objects[row["key"]]) - 3
    for row in rows(output, "clevr_distance", "train800"):
        assert row["label"] == near[min(o["pixel_coords"][2] for o in objects[row["key"]])]
    with open(f"{vtab_raw}/diabetic_retinopathy_detection/retinopathy_solution.csv") as file:
        solution = {line["image"]: line for line in csv.DictReader(file)}
    for split, usage in (("val200", "Public"), ("test", "Private")):
        for row in rows(output, "retinopathy", split):
            assert (str(row["label"]), usage) == (solution[row["key"]]["level"], solution[row["key"]]["Usage"])


def test_caltech_draws_thirty_of_each_class(vtab_prepared):
    output, _ = vtab_prepared
    keys = [row["key"] for split in ("train800", "val200") for row in rows(output, "caltech101", split)]
    counts = Counter(key.split("/")[0] for key in keys)
    assert counts.pop("BACKGROUND_Google") in (29, 30)  # its file `tmp` is included in the draw but is not an image
    assert set(counts.values()) == {30}


def test_quirks_of_sun397(vtab_prepared):
    output, results = vtab_prepared
    assert results["sun397"]["train800"]["rejects"] == 1
    manifest = open_split(f"{output}/sun397", "train800").manifest
    assert manifest.rejects == {"undecodable": 1}
    starts = {bytes(row["image"][:4]) for row in rows(output, "sun397", "train800")}
    assert {b"GIF8", b"\x89PNG"} < starts


def test_dsprites_npz(vtab_raw, vtab_prepared, tmp_path):
    output, _ = vtab_prepared
    with h5py.File(f"{vtab_raw}/dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5") as file:
        arrays = {"imgs": file["imgs"][:], "latents_classes": file["latents/classes"][:]}
    (tmp_path / "dsprites").mkdir()
    metadata = np.array({"author": "pickled, as in the official file"}, dtype=object)
    np.savez_compressed(
        tmp_path / "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", metadata=metadata, **arrays
    )
    prepare(["dsprites_location"], str(tmp_path), str(tmp_path / "out"), verify=False)
    ours = [(row["key"], row["label"], row["image"]) for row in rows(output, "dsprites_location", "train800")]
    assert ours == [
        (r["key"], r["label"], r["image"]) for r in rows(str(tmp_path / "out"), "dsprites_location", "train800")
    ]


@pytest.mark.parametrize(("task", "name"), [("eurosat", "EuroSAT.zip"), ("clevr_count", "CLEVR_v1.0.zip")])
def test_files_that_macos_adds_to_archives_are_ignored(task, name, vtab_raw, vtab_prepared, tmp_path):
    output, _ = vtab_prepared
    dataset = get(task).dataset
    shutil.copytree(f"{vtab_raw}/{dataset}", tmp_path / dataset)
    with zipfile.ZipFile(tmp_path / dataset / name, "a") as archive:
        for member in archive.namelist():
            folder, _, file = member.rpartition("/")
            archive.writestr(f"__MACOSX/{folder}/._{file}", b"\0\5\x16\7")
            archive.writestr(f"{folder}/._{file}", b"\0\5\x16\7")
    prepare([task], str(tmp_path), str(tmp_path / "out"), verify=False)
    for split in ("train800", "val200", "test"):
        assert rows(str(tmp_path / "out"), task, split) == rows(output, task, split)


def other_arrays(folder: Path) -> dict[str, str]:
    """{task: the error for its pixels}, for valid containers with wrong contents."""
    with gzip.open(folder / "patch_camelyon/camelyonpatch_level_2_split_valid_x.h5.gz", "wb") as file:
        sink = io.BytesIO()
        with h5py.File(sink, "w") as h5:
            h5["x"] = np.zeros((12, 32, 32, 3), np.float32)
        file.write(sink.getvalue())
    savemat(folder / "svhn_cropped/train_32x32.mat", {"X": np.zeros((64, 64, 3, 24), np.uint8), "y": np.ones((24, 1))})
    norb = "smallnorb/smallnorb-5x46789x9x18x6x2x96x96-training-{}.mat.gz"
    with gzip.open(folder / norb.format("info"), "wb") as file:
        file.write(struct.pack("<5I", 0x1E3D4C54, 2, 4_000_000_000, 4_000_000_000, 1))
    with h5py.File(folder / "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5", "a") as h5:
        count = len(h5["imgs"])
        del h5["imgs"]
        h5["imgs"] = np.zeros((count, 64, 64), np.float64)
    archive = folder / "eurosat/EuroSAT.zip"
    data = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        for match in re.finditer(re.escape(mark), bytes(data)):
            data[match.start() + offset] |= 1  # "encrypted"
    archive.write_bytes(data)
    return {
        "patch_camelyon": r"valid_x.h5.gz: x is 12 x 32 x 32 x 3 float32, not N x 96 x 96 x 3 uint8",
        "svhn": r"train_32x32.mat: X is 64 x 64 x 3 x 24 uint8, not 32 x 32 x 3 x N uint8",
        "smallnorb_azimuth": r"training-info.mat.gz: .*not the info matrix of smallNORB",
        "dsprites_location": r"64x64.hdf5: imgs is .* float64, not N x 64 x 64 uint8",
        "eurosat": r"EuroSAT.zip: .*encrypted",
    }


def test_archives_with_other_contents_are_named(vtab_raw, tmp_path):
    shutil.copytree(vtab_raw, tmp_path / "raw")
    for task, message in other_arrays(tmp_path / "raw").items():
        with pytest.raises(UserError, match=message):
            prepare([task], str(tmp_path / "raw"), str(tmp_path / "out"), verify=False)


def test_an_empty_folder_of_dtd_is_not_dtd(tmp_path):
    """Its archive unpacks to a folder of the same name."""
    (tmp_path / "dtd").mkdir()
    with pytest.raises(UserError, match="1 file is missing"):
        prepare(["dtd"], str(tmp_path), str(tmp_path / "out"))


def test_a_new_data_set_is_one_file_and_one_row(tmp_path, monkeypatch):
    """The file is found by the name that the row gives."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "two_colours.py").write_text(TWO_COLOURS)
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path / "code")])
    pools = ("train", 0, 60), ("train", 60, 80), ("train", 80, 100)
    row = Task(
        name="colours", title="Colours", group="natural", dataset="two_colours", folder="colours", num_classes=2,
        train=pools[0], val=pools[1], test=pools[2], counts=(12, 4, 4),
    )  # fmt: skip
    monkeypatch.setitem(TABLE, "colours", row)
    for name, value in (("red", 250), ("grey", 100)):
        folder = tmp_path / "raw" / "two_colours" / "colours" / name
        folder.mkdir(parents=True)
        for i in range(10):
            image = np.full((8, 8, 3), (100, 100, value), np.uint8)
            (folder / f"{i}.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
    counts = prepare(["colours"], str(tmp_path / "raw"), str(tmp_path / "out"))["colours"]
    assert {split: made["images"] for split, made in counts.items()} == {
        "train800": 12, "val200": 4, "train800val200": 16, "test": 4,
    }  # fmt: skip
    for row in rows(str(tmp_path / "out"), "colours", "train800val200"):
        assert (pixels(row["image"])[0, 0, 2] > 200) == (row["label"] == 0)
    with pytest.raises(UserError, match=r"1 file is missing.*\n.*colours: from nowhere"):
        prepare(["colours"], str(tmp_path), str(tmp_path / "other"))


TWO_COLOURS = """
from pipeline.vtab.datasets.base import DataSet, OfficialFile, list_class_folders

CLASSES = ["red", "grey"]
DATASET = DataSet(
    name="two_colours",
    files=(OfficialFile(name="colours", manual="nowhere"),),
    classes={"colours": CLASSES},
    index=lambda files: list_class_folders(files["colours"], "colours", CLASSES, lambda folder, file: folder),
)
"""
