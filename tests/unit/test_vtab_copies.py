"""Ready-made copies give the same datasets: TFDS folders, VTAB-1k folders, unpacked archives."""

import gzip
import shutil
import tarfile
import zipfile
from pathlib import Path

import cv2
import pytest

from pipeline.data.sources.tfrecord import encode_example, write_record
from pipeline.errors import UserError
from pipeline.vtab import get, prepare
from pipeline.vtab.examples import read_images
from pipeline.vtab.splits import tfds_order
from tests.vtab import list_raw, pixels, rows

pytestmark = pytest.mark.usefixtures("without_ray")


def write_tfds(vtab_raw: str, folder: Path, task: str, features) -> None:
    """A data set as TFDS stores it: TFDS order, two shards per split."""
    dataset = get(task).dataset
    config = {"sun397": "tfds", "eurosat": "rgb"}.get(dataset, "")
    target = folder / dataset / config / "3.0.0"
    target.mkdir(parents=True)
    if dataset != "clevr":  # one without: it gets lost when people copy the shards only
        (target / "dataset_info.json").write_text("{}")
    for split in {listing.split for listing in list_raw(vtab_raw, dataset)}:
        examples = {}
        for listing in list_raw(vtab_raw, dataset):
            if listing.split == split:
                images = dict(read_images(listing.file, listing.members))
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
def test_tfds_folders_give_the_same_dataset(task, features, vtab_raw, vtab_prepared, tmp_path):
    output, _ = vtab_prepared
    write_tfds(vtab_raw, tmp_path / "tfds", task, features)
    prepare([task], str(tmp_path / "tfds"), str(tmp_path / "out"), verify=False)
    for split in ("train800", "val200", "test"):
        ours = [(row["label"], row["image"]) for row in rows(output, task, split)]
        theirs = [(row["label"], row["image"]) for row in rows(str(tmp_path / "out"), task, split)]
        if split == "test":
            ours, theirs = sorted(ours), sorted(theirs)
        if task.startswith("dsprites"):  # the same pixels in another PNG
            ours, theirs = ([(k, pixels(image).tobytes()) for k, image in part] for part in (ours, theirs))
        assert ours == theirs


def test_tfds_folder_with_a_missing_shard(vtab_raw, tmp_path):
    write_tfds(vtab_raw, tmp_path, "cifar100", plain)
    next(tmp_path.rglob("cifar100-test.tfrecord-00001*")).unlink()
    with pytest.raises(UserError, match="1 of the 2 shards of 'test'"):
        prepare(["cifar100"], str(tmp_path), str(tmp_path / "out"), verify=False)


def test_lists_of_the_fine_tuning_repositories(vtab_prepared, tmp_path):
    output, _ = vtab_prepared
    folder = tmp_path / "raw" / "dtd"
    for split in ("train800", "val200", "test"):
        lines = []
        for i, row in enumerate(rows(output, "dtd", split)):
            name = f"images/{split}/{i:06d}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(row["image"])
            lines.append(f"{name} {row['label']}")
        (folder / f"{split}.txt").write_text("\r\n".join(lines) + "\r\n\r\n", encoding="utf-8-sig")  # an editor's
    prepare(["dtd"], str(tmp_path / "raw"), str(tmp_path / "out"))
    for split in ("train800", "val200", "train800val200", "test"):
        ours = [(row["label"], row["image"]) for row in rows(output, "dtd", split)]
        assert ours == [(row["label"], row["image"]) for row in rows(str(tmp_path / "out"), "dtd", split)]
    (folder / "val200.txt").write_text("../../secret.jpg 0\n")
    with pytest.raises(UserError, match="is outside the folder"):
        prepare(["dtd"], str(tmp_path / "raw"), str(tmp_path / "out2"))


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
def test_unpacked_archives(task, vtab_raw, vtab_prepared, tmp_path):
    """The same archives, unpacked, under one folder without a sub-folder per data set."""
    output, _ = vtab_prepared
    for file in Path(vtab_raw, get(task).dataset).iterdir():
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
    prepare([task], str(tmp_path / "raw"), str(tmp_path / "out"), verify=False)
    for split in ("train800", "val200", "test"):
        ours = sorted((row["key"], row["label"], row["image"]) for row in rows(output, task, split))
        theirs = sorted((row["key"], row["label"], row["image"]) for row in rows(str(tmp_path / "out"), task, split))
        assert ours == theirs
