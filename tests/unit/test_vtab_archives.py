"""All nineteen tasks from miniature archives in the official layouts, with Ray Data's map replaced by Python's."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import struct
import tarfile
import urllib.error
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from pipeline.data import open_dataset
from pipeline.data.sources.tfrecord import encode_example, parse_example, read_records, write_record
from pipeline.errors import UserError
from pipeline.vtab import (
    TASKS,
    archives,
    build,
    get,
    miniature,
    open_split,
    prepare,
    requirements,
    split_keys,
    table,
)
from pipeline.vtab import datasets as readers
from pipeline.vtab.splits import tfds_order

DATASETS = sorted({get(name).dataset for name in TASKS})


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(build, "_ray_map", map)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> str:
    return miniature.write("all", str(tmp_path_factory.mktemp("vtab") / "raw"), per_class=6)


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory) -> tuple[str, dict]:
    output = str(tmp_path_factory.mktemp("vtab-out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_ray_map", map)
        return output, prepare(TASKS, raw, output, quiet=True)


def listings(raw: str, dataset: str) -> list[readers.Listing]:
    return readers.index(dataset, archives.locate(raw, dataset)[0])


def rows(output: str, task: str, split: str) -> list[dict]:
    dataset = open_split(f"{output}/{task}", split)
    return dataset.read(range(len(dataset)))


def pixels(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_splits_in_the_official_order(task, raw, prepared):
    output, results = prepared
    assert set(results[task]) == {"train800", "val200", "train800val200", "test"}
    keys: dict[str, list] = {}
    for listing in listings(raw, get(task).dataset):
        keys.setdefault(listing.split, []).extend(listing.keys)
    for split, counts in results[task].items():
        expected = [str(key) for key in split_keys(task, split, keys)]
        found = [row["key"] for row in rows(output, task, split)]
        if isinstance(next(iter(keys["train"])), int):  # "train_00012": the number and the TFDS split it counts in
            found = [str(int(key.rpartition("_")[2])) for key in found]
        if task == "sun397":
            expected = [key for key in expected if key != miniature.UNDECODABLE]
        assert counts["images"] == len(found) == len(expected)
        if split == "test":  # large splits lie in the order of the archive
            found, expected = sorted(found), sorted(expected)
        assert found == expected
        assert open_split(f"{output}/{task}", split).classes == get(task).classes


@pytest.mark.parametrize("task", TASKS)
def test_no_image_is_in_two_pools(task, prepared):
    output, _ = prepared
    train, val, test = ({row["key"] for row in rows(output, task, split)} for split in ("train800", "val200", "test"))
    assert not train & val
    assert not train & test
    assert not val & test


# Counting discs is beyond pixel distances: the labels of those tasks are compared exactly further down.
@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("retinopathy", "clevr_count", "clevr_distance")])
def test_labels_can_be_seen_in_the_pictures(task, prepared):
    """A nearest-neighbour classifier on small pictures beats guessing: labels and images belong together."""
    output, _ = prepared

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
    """OpenCV alone may not read CMYK or GIF: through the decoder of the pipeline."""
    from pipeline.data.images import decode

    image = decode(row["image"], 10**8).pixels[:, :, ::-1]
    return {**row, "image": cv2.imencode(".png", image)[1].tobytes()}


def test_files_are_kept_bit_for_bit(raw, prepared):
    output, _ = prepared
    with tarfile.open(f"{raw}/dtd/dtd-r1.0.1.tar.gz") as archive:
        for row in rows(output, "dtd", "test"):
            assert row["image"] == archive.extractfile(f"dtd/images/{row['key']}").read()
            assert get("dtd").classes[row["label"]] == row["key"].split("/")[0]
    with zipfile.ZipFile(f"{raw}/clevr/CLEVR_v1.0.zip") as archive:
        for row in rows(output, "clevr_count", "test"):
            assert row["image"] == archive.read(f"CLEVR_v1.0/images/val/{row['key']}")
            assert (row["height"], row["width"]) == (80, 120)


def number(row: dict) -> int:
    return int(row["key"].rpartition("_")[2])


def test_manifests_know_the_mean_and_deviation_of_their_pixels(prepared):
    output, _ = prepared
    for task, split in (("svhn", "train800"), ("eurosat", "test")):
        images = [pixels(row["image"])[:, :, ::-1] for row in rows(output, task, split)]
        flat = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
        manifest = open_split(f"{output}/{task}", split).manifest
        assert manifest.mean == pytest.approx(flat.mean(0), abs=1e-3)
        assert manifest.std == pytest.approx(flat.std(0), abs=1e-3)


def test_arrays_become_png_without_loss(raw, prepared):
    output, _ = prepared
    with tarfile.open(f"{raw}/cifar100/cifar-100-binary.tar.gz") as archive:
        data = np.frombuffer(archive.extractfile("cifar-100-binary/test.bin").read(), np.uint8).reshape(-1, 3074)
    for row in rows(output, "cifar100", "test"):
        expected = data[number(row), 2:].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(pixels(row["image"])[:, :, ::-1], expected)
        assert row["label"] == data[number(row), 1]
    mat = loadmat(f"{raw}/svhn_cropped/test_32x32.mat")
    for row in rows(output, "svhn", "test"):
        assert np.array_equal(pixels(row["image"])[:, :, ::-1], mat["X"][:, :, :, number(row)])
        assert row["label"] == mat["y"][number(row), 0] % 10
    assert 10 in mat["y"]
    assert {row["label"] for row in rows(output, "svhn", "test")} == {0, 1, 2, 3}
    with h5py.File(f"{raw}/dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5") as file:
        images, latents = file["imgs"][:], file["latents/classes"][:]
    for task, column, width in (("dsprites_location", 4, 2), ("dsprites_orientation", 3, 2.5)):
        for row in rows(output, task, "train800"):
            assert np.array_equal(pixels(row["image"]), images[number(row)] * 255)
            assert row["label"] == latents[number(row), column] // width
    with gzip.open(f"{raw}/patch_camelyon/camelyonpatch_level_2_split_valid_x.h5.gz") as file:
        x = h5py.File(io.BytesIO(file.read()))["x"][:]
    for row in rows(output, "patch_camelyon", "val200"):
        assert row["key"].startswith("valid_")
        assert np.array_equal(pixels(row["image"])[:, :, ::-1], x[number(row)])


def test_smallnorb_is_the_left_picture(raw, prepared):
    output, _ = prepared
    name = f"{raw}/smallnorb/smallnorb-5x01235x9x18x6x2x96x96-testing-{{}}.mat.gz"
    with gzip.open(name.format("dat")) as file:
        pairs = np.frombuffer(file.read()[24:], np.uint8).reshape(-1, 2, 96, 96)
    with gzip.open(name.format("info")) as file:
        info = np.frombuffer(file.read()[20:], "<i4").reshape(-1, 4)
    for task, label in (("smallnorb_azimuth", info[:, 2] // 2), ("smallnorb_elevation", info[:, 1])):
        for row in rows(output, task, "test") + rows(output, task, "val200"):
            assert row["key"].startswith("test_")
            assert np.array_equal(pixels(row["image"]), pairs[number(row), 0])
            assert row["label"] == label[number(row)]


def test_clevr_and_retinopathy_labels(raw, prepared):
    output, _ = prepared
    with zipfile.ZipFile(f"{raw}/clevr/CLEVR_v1.0.zip") as archive:
        scenes = json.loads(archive.read("CLEVR_v1.0/scenes/CLEVR_train_scenes.json"))["scenes"]
    objects = {scene["image_filename"]: scene["objects"] for scene in scenes}
    near = {7.9: 0, 8.0: 0, 8.3: 1, 9.2: 3, 9.7: 4, 11.0: 5}
    for row in rows(output, "clevr_count", "train800"):
        assert row["label"] == len(objects[row["key"]]) - 3
    for row in rows(output, "clevr_distance", "train800"):
        assert row["label"] == near[min(o["pixel_coords"][2] for o in objects[row["key"]])]
    with open(f"{raw}/diabetic_retinopathy_detection/retinopathy_solution.csv") as file:
        solution = {line["image"]: line for line in csv.DictReader(file)}
    for split, usage in (("val200", "Public"), ("test", "Private")):
        for row in rows(output, "retinopathy", split):
            assert (str(row["label"]), usage) == (solution[row["key"]]["level"], solution[row["key"]]["Usage"])


def test_caltech_draws_thirty_of_each_class(prepared):
    output, _ = prepared
    keys = [row["key"] for split in ("train800", "val200") for row in rows(output, "caltech101", split)]
    counts = Counter(key.split("/")[0] for key in keys)
    assert counts.pop("BACKGROUND_Google") in (29, 30)  # its file `tmp` takes part in the draw and is no picture
    assert set(counts.values()) == {30}


def test_quirks_of_sun397(prepared):
    output, results = prepared
    assert results["sun397"]["train800"]["rejects"] == 1
    manifest = open_split(f"{output}/sun397", "train800").manifest
    assert manifest.rejects == {"undecodable": 1}
    starts = {bytes(row["image"][:4]) for row in rows(output, "sun397", "train800")}
    assert {b"GIF8", b"\x89PNG"} < starts


def test_the_counts_are_printed_beside_the_official_ones(prepared):
    lines = table(prepared[1]).splitlines()
    assert len(lines) == 1 + 19 * 4
    assert any(
        line.split()[:2] == ["cifar100", "test"] and "10,000" in line and "(miniature)" in line for line in lines
    )


def test_the_loader_takes_every_split(prepared):
    from pipeline.data import Loader
    from pipeline.data.loading.augment import Augment

    output, _ = prepared
    for task in ("sun397", "smallnorb_azimuth"):
        dataset = open_split(f"{output}/{task}", "train800val200")
        with Loader(dataset, batch_size=8, train=False, augment=Augment(size=32, crop="squash", flip=False)) as loader:
            batches = list(loader)
        assert sum(len(batch["label"]) for batch in batches) == len(dataset)
        assert batches[0]["image"].shape[1:] == (32, 32, 3)


# ---------------------------------------------------------------- other layouts


def write_tfds(raw: str, folder: Path, task: str, features) -> None:
    """A data set as TFDS stores it: TFDS order, two shards per split."""
    dataset = get(task).dataset
    config = {"sun397": "tfds", "eurosat": "rgb"}.get(dataset, "")
    target = folder / dataset / config / "3.0.0"
    target.mkdir(parents=True)
    if dataset != "clevr":  # one without: it gets lost when people copy the shards only
        (target / "dataset_info.json").write_text("{}")
    for split in {listing.split for listing in listings(raw, dataset)}:
        examples = {}
        for listing in listings(raw, dataset):
            if listing.split == split:
                images = dict(readers.read(listing.source, listing.members))
                for i, (key, member) in enumerate(zip(listing.keys, listing.members, strict=True)):
                    examples[key] = features(listing, i, images[member])
        ordered = [examples[key] for key in tfds_order(split, examples)]
        half = len(ordered) // 2
        for number, part in enumerate((ordered[:half], ordered[half:])):
            with open(target / f"{dataset}-{split}.tfrecord-{number:05d}-of-00002", "wb") as file:
                for example in part:
                    write_record(file, encode_example(example))


def plain(listing, i, image):
    (labels,) = listing.labels.values()
    return {"image": image, "label": int(labels[i])}


def norb(listing, i, image):
    names = {"label_azimuth": "smallnorb_azimuth", "label_elevation": "smallnorb_elevation"}
    return {"image": image, **{feature: int(listing.labels[name][i]) for feature, name in names.items()}}


def sprites(listing, i, image):
    binary = cv2.imencode(".png", pixels(image) // 255)[1].tobytes()
    orientation = [0, 3, 5, 8][int(listing.labels["dsprites_orientation"][i])]
    x = 2 * int(listing.labels["dsprites_location"][i])
    return {"image": binary, "label_orientation": orientation, "label_x_position": x}


def road(listing, i, image):
    label = listing.labels["kitti_distance"][i]
    z = [8.0, 20.0, 35.0, 2.0][label]  # class 3: only a pedestrian, type 3
    kind = [0, 1, 2, 3][label]
    return {"image": image, "objects/type": [3, kind], "objects/location": [1.0, 1.5, 2.5, -3.0, 1.0, z]}


def scene(listing, i, image):
    count = int(listing.labels["clevr_count"][i]) + 3
    near = [7.9, 8.3, 8.7, 9.2, 9.7, 11.0][int(listing.labels["clevr_distance"][i])]
    coords = [v for j in range(count) for v in (1.0, 2.0, near + j)]
    return {"image": image, "objects/size": [1] * count, "objects/pixel_coords": coords}


@pytest.mark.parametrize(
    ("task", "features"),
    [
        ("cifar100", plain), ("caltech101", plain), ("eurosat", plain), ("smallnorb_elevation", norb), ("dsprites_orientation", sprites),
        ("dsprites_location", sprites), ("kitti_distance", road), ("clevr_distance", scene), ("clevr_count", scene),
    ],
)  # fmt: skip
def test_tfds_folders_give_the_same_dataset(task, features, raw, prepared, tmp_path):
    output, _ = prepared
    write_tfds(raw, tmp_path / "tfds", task, features)
    prepare([task], str(tmp_path / "tfds"), str(tmp_path / "out"), verify=False, quiet=True)
    for split in ("train800", "val200", "test"):
        ours = [(row["label"], row["image"]) for row in rows(output, task, split)]
        theirs = [(row["label"], row["image"]) for row in rows(str(tmp_path / "out"), task, split)]
        if split == "test":
            ours, theirs = sorted(ours), sorted(theirs)
        if task.startswith("dsprites"):  # the same pixels in another PNG
            ours, theirs = ([(k, pixels(image).tobytes()) for k, image in part] for part in (ours, theirs))
        assert ours == theirs


def test_tfds_folder_with_a_missing_shard(raw, tmp_path):
    write_tfds(raw, tmp_path, "cifar100", plain)
    next(tmp_path.rglob("cifar100-test.tfrecord-00001*")).unlink()
    with pytest.raises(UserError, match="1 of the 2 shards of 'test'"):
        prepare(["cifar100"], str(tmp_path), str(tmp_path / "out"), verify=False, quiet=True)


def test_lists_of_the_fine_tuning_repositories(prepared, tmp_path):
    output, _ = prepared
    folder = tmp_path / "raw" / "dtd"
    for split in ("train800", "val200", "test"):
        lines = []
        for i, row in enumerate(rows(output, "dtd", split)):
            name = f"images/{split}/{i:06d}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(row["image"])
            lines.append(f"{name} {row['label']}")
        (folder / f"{split}.txt").write_text("\r\n".join(lines) + "\r\n\r\n", encoding="utf-8-sig")  # an editor's
    prepare(["dtd"], str(tmp_path / "raw"), str(tmp_path / "out"), quiet=True)
    for split in ("train800", "val200", "train800val200", "test"):
        ours = [(row["label"], row["image"]) for row in rows(output, "dtd", split)]
        assert ours == [(row["label"], row["image"]) for row in rows(str(tmp_path / "out"), "dtd", split)]
    (folder / "val200.txt").write_text("../../secret.jpg 0\n")
    with pytest.raises(UserError, match="lies outside the folder"):
        prepare(["dtd"], str(tmp_path / "raw"), str(tmp_path / "out2"), quiet=True)


@pytest.mark.parametrize(
    "task",
    [
        "caltech101",
        "cifar100",
        "eurosat",
        "clevr_count",
        "kitti_distance",
        "dmlab",
        "svhn",
        "pets",
        "smallnorb_azimuth",
        "patch_camelyon",
    ],
)
def test_unpacked_archives(task, raw, prepared, tmp_path):
    """The same archives, unpacked, under one folder without a sub-folder per data set."""
    output, _ = prepared
    for file in Path(raw, get(task).dataset).iterdir():
        if zipfile.is_zipfile(file):
            zipfile.ZipFile(file).extractall(tmp_path / "raw")
        elif file.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(file) as archive:
                archive.extractall(tmp_path / "raw", filter="data")
        elif file.suffix == ".gz":
            (tmp_path / "raw").mkdir(exist_ok=True)
            (tmp_path / "raw" / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            (tmp_path / "raw").mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / "raw")
    prepare([task], str(tmp_path / "raw"), str(tmp_path / "out"), verify=False, quiet=True)
    for split in ("train800", "val200", "test"):
        ours = sorted((row["key"], row["label"], row["image"]) for row in rows(output, task, split))
        theirs = sorted((row["key"], row["label"], row["image"]) for row in rows(str(tmp_path / "out"), task, split))
        assert ours == theirs


def test_dsprites_npz(raw, prepared, tmp_path):
    output, _ = prepared
    with h5py.File(f"{raw}/dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5") as file:
        arrays = {"imgs": file["imgs"][:], "latents_classes": file["latents/classes"][:]}
    (tmp_path / "dsprites").mkdir()
    metadata = np.array({"author": "pickled, as in the official file"}, dtype=object)
    np.savez_compressed(
        tmp_path / "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", metadata=metadata, **arrays
    )
    prepare(["dsprites_location"], str(tmp_path), str(tmp_path / "out"), verify=False, quiet=True)
    ours = [(row["key"], row["label"], row["image"]) for row in rows(output, "dsprites_location", "train800")]
    assert ours == [
        (r["key"], r["label"], r["image"]) for r in rows(str(tmp_path / "out"), "dsprites_location", "train800")
    ]


# ---------------------------------------------------------------- what goes wrong


def packed_files(raw: str, dataset: str) -> list[str]:
    return [
        place.file.name
        for place in archives.locate(raw, dataset)[0]
        if place.packed and not place.file.name.endswith(".csv")
    ]


@pytest.mark.parametrize(
    "dataset", [name for name in DATASETS if name not in ("resisc45", "diabetic_retinopathy_detection")]
)
def test_a_truncated_archive_is_named(dataset, raw, tmp_path):
    """With verification by its size; without by what the format itself tells. Nothing complete is left behind."""
    task = next(name for name in TASKS if get(name).dataset == dataset)
    for name in packed_files(raw, dataset):
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        shutil.copytree(f"{raw}/{dataset}", tmp_path / "raw" / dataset)
        shutil.copy(f"{raw}/{archives.MINIATURE}", tmp_path / "raw")
        path = tmp_path / "raw" / dataset / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 5])
        for verify in (True, False):
            with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
                prepare([task], str(tmp_path / "raw"), str(tmp_path / "out"), verify=verify, quiet=True)
            assert verify is False or "truncated" in str(error.value)
            assert not list(tmp_path.glob("out/*/test/manifest.json"))


def test_a_changed_archive_is_named(raw, tmp_path):
    shutil.copytree(f"{raw}/cifar100", tmp_path / "cifar100")
    shutil.copy(f"{raw}/{archives.MINIATURE}", tmp_path)
    path = tmp_path / "cifar100/cifar-100-binary.tar.gz"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"cifar-100-binary\.tar\.gz: damaged or another version"):
        prepare(["cifar100"], str(tmp_path), str(tmp_path / "out"), quiet=True)


def test_an_official_name_with_other_contents_is_refused(raw, tmp_path):
    """Without the miniature's marker the official sizes and checksums hold."""
    shutil.copytree(f"{raw}/eurosat", tmp_path / "eurosat")
    with pytest.raises(UserError, match=r"EuroSAT.zip: truncated: .* bytes, the official file has 94,280,567"):
        prepare(["eurosat"], str(tmp_path), str(tmp_path / "out"), quiet=True)


def test_files_may_lie_under_the_name_of_the_task(raw, tmp_path):
    shutil.copytree(f"{raw}/oxford_iiit_pet", tmp_path / "raw" / "pets")
    counts = prepare(["pets"], str(tmp_path / "raw"), str(tmp_path / "out"), verify=False, quiet=True)
    assert counts["pets"]["test"]["images"] == 24


@pytest.mark.parametrize(("task", "name"), [("eurosat", "EuroSAT.zip"), ("clevr_count", "CLEVR_v1.0.zip")])
def test_what_macos_adds_to_archives_is_no_image(task, name, raw, prepared, tmp_path):
    output, _ = prepared
    dataset = get(task).dataset
    shutil.copytree(f"{raw}/{dataset}", tmp_path / dataset)
    with zipfile.ZipFile(tmp_path / dataset / name, "a") as archive:
        for member in archive.namelist():
            folder, _, file = member.rpartition("/")
            archive.writestr(f"__MACOSX/{folder}/._{file}", b"\0\5\x16\7")
            archive.writestr(f"{folder}/._{file}", b"\0\5\x16\7")
    prepare([task], str(tmp_path), str(tmp_path / "out"), verify=False, quiet=True)
    for split in ("train800", "val200", "test"):
        assert rows(str(tmp_path / "out"), task, split) == rows(output, task, split)


def other_arrays(folder: Path) -> dict[str, str]:
    """{task: what is wrong with its pixels}: right containers, other contents."""
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


def test_archives_with_other_contents_are_named(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    for task, message in other_arrays(tmp_path / "raw").items():
        with pytest.raises(UserError, match=message):
            prepare([task], str(tmp_path / "raw"), str(tmp_path / "out"), verify=False, quiet=True)


def test_an_empty_folder_of_dtd_is_not_dtd(tmp_path):
    """Its archive unpacks to a folder of the same name."""
    (tmp_path / "dtd").mkdir()
    with pytest.raises(UserError, match="1 files are missing"):
        prepare(["dtd"], str(tmp_path), str(tmp_path / "out"), quiet=True)


def test_an_incomplete_unpacked_folder_is_refused(raw, tmp_path):
    shutil.copytree(f"{raw}/resisc45", tmp_path / "resisc45")
    with pytest.raises(UserError, match="officially 18,900"):
        prepare(["resisc45"], str(tmp_path), str(tmp_path / "out"), quiet=True)


def test_missing_images_are_errors_or_rejects(raw, tmp_path):
    folder = tmp_path / "raw" / "oxford_flowers102"
    folder.mkdir(parents=True)
    for name in ("imagelabels.mat", "setid.mat"):
        shutil.copy(f"{raw}/oxford_flowers102/{name}", folder)
    with tarfile.open(f"{raw}/oxford_flowers102/102flowers.tgz") as archive:
        archive.extractall(folder, filter="data")
    missing = sorted((folder / "jpg").iterdir())[0]
    missing.unlink()
    (tmp_path / "raw" / archives.MINIATURE).write_text('{"files": {}}')
    splits = ("train", "val", "test")
    with pytest.raises(UserError, match=f"1 or more of the listed images are not in there, such as jpg/{missing.name}"):
        prepare(["flowers102"], str(tmp_path / "raw"), str(tmp_path / "out"), splits=splits, quiet=True)
    counts = prepare(
        ["flowers102"], str(tmp_path / "raw"), str(tmp_path / "out2"), splits=splits, verify=False, quiet=True
    )
    assert sum(counts["flowers102"][split]["rejects"] for split in splits) == 1


def test_missing_files_are_listed_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        prepare(["cifar100", "resisc45", "pets"], str(tmp_path), str(tmp_path / "out"), quiet=True)
    text = str(error.value)
    for part in (
        "4 files are missing",
        "168,513,733 bytes",
        "58a81ae192c23a4b",
        "NWPU-RESISC45.rar",
        "annotations.tar.gz",
    ):
        assert part in text


def test_one_broken_data_set_does_not_stop_the_others(raw, tmp_path, capsys):
    for name in ("cifar100", "dtd"):
        shutil.copytree(f"{raw}/{name}", tmp_path / "raw" / name)
    shutil.copy(f"{raw}/{archives.MINIATURE}", tmp_path / "raw")
    path = tmp_path / "raw/cifar100/cifar-100-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"cifar100: .*truncated"):
        prepare(["cifar100", "dtd"], str(tmp_path / "raw"), str(tmp_path / "out"))
    assert re.search(r"dtd +test +24", capsys.readouterr().out)  # what was finished is told all the same
    assert len(open_split(str(tmp_path / "out/dtd"), "test")) == 24
    assert not (tmp_path / "out/cifar100/test/manifest.json").exists()


def test_what_is_done_is_not_done_again(raw, tmp_path, monkeypatch):
    output = str(tmp_path)
    built = []
    original = build.build
    monkeypatch.setattr(build, "build", lambda unit: built.append(unit.number) or original(unit))

    def dies_after_one(function, items):
        for i, item in enumerate(items):
            if function is build._process and i == 1:
                raise KeyboardInterrupt
            yield function(item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_ray_map", dies_after_one)
        with pytest.raises(KeyboardInterrupt):
            prepare(["patch_camelyon"], raw, output, quiet=True)
    assert built == [0]
    assert not list(tmp_path.rglob("manifest.json"))
    first = prepare(["patch_camelyon"], raw, output, quiet=True)
    assert built == [0, 1, 2]
    assert prepare(["patch_camelyon"], raw, output, quiet=True) == first
    assert built == [0, 1, 2]
    assert sorted(p.name for p in (tmp_path / "patch_camelyon").iterdir()) == [
        "test",
        "train800",
        "train800val200",
        "val200",
    ]
    again = prepare(["patch_camelyon"], raw, str(tmp_path / "b"), quiet=True)
    assert [c["fingerprint"] for c in again["patch_camelyon"].values()] == [
        c["fingerprint"] for c in first["patch_camelyon"].values()
    ]


def test_what_is_finished_no_longer_needs_its_archives(raw, tmp_path):
    shutil.copytree(f"{raw}/dtd", tmp_path / "raw" / "dtd")
    shutil.copy(f"{raw}/{archives.MINIATURE}", tmp_path / "raw")
    arguments = str(tmp_path / "raw"), str(tmp_path / "out")
    first = prepare(["dtd"], *arguments, quiet=True)
    shutil.rmtree(tmp_path / "raw")
    assert prepare(["dtd"], *arguments, quiet=True) == first
    with pytest.raises(UserError, match=r"dtd-r1\.0\.1\.tar\.gz"):  # another split needs them again
        prepare(["dtd"], *arguments, splits=("train800", "trainval"), quiet=True)
    (tmp_path / "out" / "dtd").rename(tmp_path / "out" / "pets")
    with pytest.raises(UserError, match="already holds another dataset"):
        prepare(["pets"], *arguments, quiet=True)


def test_another_dataset_in_the_way_is_refused(raw, tmp_path):
    prepare(["dtd"], raw, str(tmp_path), splits=("val200",), quiet=True)
    with pytest.raises(UserError, match="already holds another dataset"):
        prepare(["dtd"], raw, str(tmp_path), splits=("val200",), verify=False, quiet=True)


def test_full_pools(raw, tmp_path):
    counts = prepare(["eurosat"], raw, str(tmp_path), splits=("train", "val", "trainval", "test"), quiet=True)[
        "eurosat"
    ]
    assert {split: c["images"] for split, c in counts.items()} == {"train": 72, "val": 24, "trainval": 96, "test": 24}
    assert counts["trainval"]["official"] == 21600
    assert len(open_dataset(tmp_path / "eurosat" / "trainval")) == 96


def test_wrong_names_and_missing_splits(tmp_path):
    with pytest.raises(UserError, match='did you mean "dmlab"'):
        prepare(["dmlabs"], str(tmp_path), str(tmp_path), quiet=True)
    with pytest.raises(UserError, match='did you mean "trainval"'):
        prepare(["dmlab"], str(tmp_path), str(tmp_path), splits=("trainvl",), quiet=True)
    with pytest.raises(UserError, match="--vtab dmlab --raw FOLDER --vtab-splits val200"):
        open_split(str(tmp_path / "dmlab"), "val200")


def test_every_data_set_states_its_files():
    for name in TASKS:
        files = requirements(name)
        assert files
        for file in files:
            assert file.by_hand or (
                file.url.startswith("http") and file.bytes and len(bytes.fromhex(file.sha256)) == 32
            )


# ---------------------------------------------------------------- downloading


class Server:
    """Stands in for the owners' servers: hands out a body in pieces, and cuts the first connection short."""

    def __init__(self, body: bytes, ranges: bool = True) -> None:
        self.body, self.ranges, self.requests = body, ranges, []

    def __call__(self, request, timeout):
        start = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.requests.append(start)
        response = io.BytesIO(self.body[start if self.ranges else 0 :])
        response.status = 206 if self.ranges else 200
        if len(self.requests) == 1:
            pieces = [self.body[:1000]]

            def read(_):
                if pieces:
                    return pieces.pop()
                raise ConnectionResetError("connection reset")

            response.read = read
        return response


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_broke_off(ranges, tmp_path, monkeypatch):
    body = os.urandom(5000)
    server = Server(body, ranges)
    monkeypatch.setattr(archives.urllib.request, "urlopen", server)
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    file = archives.File(
        name="a.bin", bytes=5000, sha256=hashlib.sha256(body).hexdigest(), url="http://example.org/a.bin"
    )
    archives.download(str(tmp_path), "dtd", file, say=lambda text: None)
    assert (tmp_path / "dtd/a.bin").read_bytes() == body
    assert server.requests == [0, 1000]


def test_a_download_of_another_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.urllib.request, "urlopen", Server(os.urandom(5000)))
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    file = archives.File(name="a.bin", bytes=5000, sha256="0" * 64, url="http://example.org/a.bin")
    with pytest.raises(UserError, match="not the official"):
        archives.download(str(tmp_path), "dtd", file, say=lambda text: None)
    assert not list((tmp_path / "dtd").iterdir())


@pytest.mark.parametrize(
    ("code", "message", "tries"), [(404, "fetch it by hand", 1), (503, "run the command again", 5)]
)
def test_a_server_that_refuses(code, message, tries, tmp_path, monkeypatch):
    calls = []

    def refuse(request, timeout):
        calls.append(request)
        raise urllib.error.HTTPError(request.full_url, code, "no", {}, None)

    monkeypatch.setattr(archives.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    file = archives.File(name="a.bin", bytes=5, sha256="0" * 64, url="http://example.org/a.bin")
    with pytest.raises(UserError, match=message):
        archives.download(str(tmp_path), "dtd", file, say=lambda text: None)
    assert len(calls) == tries


# ---------------------------------------------------------------- real files


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
        counts = prepare([task], samples, str(tmp_path), verify=False, quiet=True)[task]
        assert tuple(counts[split]["images"] for split in ("train800", "val200", "test")) == sizes


def test_real_kitti_frames_and_clevr_scenes(real_data):
    folder = real_data / "kitti-3frames" / "training"
    labels = [readers.kitti_label((folder / f"label_2/{i:06d}.txt").read_text()) for i in range(3)]
    assert labels == [3, 2, 2]
    tree = archives.Tree(str(folder / "image_2"), "training/image_2")
    for name, data in tree.read(tree.names()):
        assert build.pixels(data).shape in {(370, 1224, 3), (375, 1242, 3)}, name
    scenes = json.loads((real_data / "clevr-generated" / "CLEVR_scenes.json").read_text())["scenes"]
    for scene_ in scenes:
        assert 0 <= readers.clevr_count(len(scene_["objects"])) < 8
        assert 0 <= readers.clevr_distance(o["pixel_coords"][2] for o in scene_["objects"]) < 6
    for file in (real_data / "clevr-generated" / "images").glob("*.png"):
        assert build.pixels(file.read_bytes()).shape == (240, 320, 3)


def test_real_flowers(real_data, tmp_path):
    """605 of the 8,189 photographs with the official label files."""
    folder = tmp_path / "oxford_flowers102"
    folder.mkdir()
    with tarfile.open(real_data / "flowers102-partial.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    for name in ("imagelabels.mat", "setid.mat", "jpg"):
        shutil.move(tmp_path / "oxford_flowers102-partial" / name, folder / name)
    counts = prepare(
        ["flowers102"], str(tmp_path), str(tmp_path / "out"), splits=("train", "val", "test"), verify=False, quiet=True
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
