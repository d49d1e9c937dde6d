"""Synthetic archives in the official layouts of all nineteen tasks, for tests.

Each class has a different image (hue, stripe direction and pitch), so that models can learn the tasks; images of
geometric tasks show the geometry. The archives reproduce quirks of the official files: JPEGs that are GIF or PNG files,
greyscale and CMYK, an undecodable image, label 10 for digit 0, DontCare objects, a file named tmp, tar.gz files that
are plain tar."""

import csv
import gzip
import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.data.sources.tfrecord import encode_example, write_record
from pipeline.vtab import tasks
from pipeline.vtab.archives import MINIATURE

UNDECODABLE = "/t/track/outdoor/sun_aophkoiosslinihb.jpg"  # in SUN397's train split, as in the official archive


def write(names: Sequence[str] | str, raw: str, per_class: int = 8, num_classes: int = 4) -> str:
    """Writes miniature archives of the tasks (or "all") under `raw`, a local folder; returns it.

    `per_class` images of the first `num_classes` classes in every official split. Writes MINIATURE.json with sizes and
    checksums, which replace the official ones.
    """
    names = tasks.TASKS if names == "all" else [names] if isinstance(names, str) else names
    files: dict[str, dict[str, dict]] = {}
    marker = os.path.join(raw, MINIATURE)
    if os.path.exists(marker):
        files = storage.read_record(marker, ["files"])["files"]
    for dataset in dict.fromkeys(tasks.get(name).dataset for name in names):
        folder = os.path.join(raw, dataset)
        os.makedirs(folder, exist_ok=True)
        WRITERS[dataset](folder, np.random.default_rng(len(dataset)), per_class, num_classes)
        files[dataset] = {}
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, "rb") as source:
                    digest = hashlib.file_digest(source, "sha256").hexdigest()
                files[dataset][name] = {"bytes": os.path.getsize(path), "sha256": digest}
    with open(marker, "w") as file:
        json.dump({"files": files}, file, indent=1)
    return raw


# ---------------------------------------------------------------- pictures and containers


def picture(label: int, rng: np.random.Generator, height: int = 48, width: int = 64) -> np.ndarray:
    """An RGB picture of a class: stripes of the class's hue, direction and pitch, with noise."""
    y, x = np.mgrid[:height, :width]
    angle = label * 2.399963  # the golden angle: neighbours in the label list look different
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (0.25 + 0.15 * (label % 3)) + rng.uniform(0, 6.3))
    hue = np.full((height, width), int(label * 67) % 180, np.uint8)
    value = (150 + 80 * wave).astype(np.uint8)
    image = cv2.cvtColor(np.dstack([hue, np.full_like(hue, 170), value]), cv2.COLOR_HSV2RGB)
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def encode(image: np.ndarray, extension: str = ".jpg") -> bytes:
    return cv2.imencode(extension, image if image.ndim == 2 else image[:, :, ::-1])[1].tobytes()


def disguised(image: np.ndarray, number: int) -> bytes:
    """A file that will be named .jpg: every eighth one is grey, CMYK, PNG or GIF instead of an ordinary JPEG."""
    kind = {1: "grey", 3: "cmyk", 5: "png", 7: "gif"}.get(number % 8)
    if kind == "grey":
        return encode(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    if kind is None:
        return encode(image)
    sink = io.BytesIO()
    mode, name = {"cmyk": ("CMYK", "JPEG"), "png": ("RGB", "PNG"), "gif": ("P", "GIF")}[kind]
    Image.fromarray(image).convert(mode).save(sink, name)
    return sink.getvalue()


def tar(path: str, members: dict[str, bytes], compressed: bool = True) -> None:
    with open(path, "wb") as file:
        # without time stamps, so that the same call always writes the same bytes
        stream = gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") if compressed else file
        with stream, tarfile.open(fileobj=stream, mode="w") as archive:  # type: ignore[arg-type]
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def zip_(path: str, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)


def save(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def gz(path: str, data: bytes) -> None:
    save(path, gzip.compress(data, mtime=0))


def _labels(per_class: int, num_classes: int) -> Iterator[int]:
    for _ in range(per_class):
        yield from range(num_classes)


# ---------------------------------------------------------------- the data sets


def caltech101(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """30 pictures of every class are for training, so there are 30 more than `per_class`."""
    members = {}
    for label, name in enumerate(["BACKGROUND_Google", "Faces", "accordion", "airplanes", "anchor"][: num_classes + 1]):
        for i in range(30 + per_class):
            image = disguised(picture(label, rng, 20, 30), 1 if i == 1 else 0)  # the official set has grey JPEGs, too
            members[f"101_ObjectCategories/{name}/image_{i + 1:04d}.jpg"] = image
    members["101_ObjectCategories/BACKGROUND_Google/tmp"] = b"not a picture"
    tar(f"{folder}/101_ObjectCategories.tar.gz", members)


def cifar100(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    members = {"cifar-100-binary/fine_label_names.txt": "\n".join(tasks.get("cifar100").classes).encode()}
    for part in ("train", "test"):
        rows = [
            bytes([label // 5, label]) + picture(label, rng, 32, 32).transpose(2, 0, 1).tobytes()
            for label in _labels(per_class, num_classes)
        ]
        members[f"cifar-100-binary/{part}.bin"] = b"".join(rows)
    tar(f"{folder}/cifar-100-binary.tar.gz", members)


def clevr(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """One disc per object; nearer objects are larger."""
    members = {}
    for split in ("train", "val", "test"):
        scenes = []
        for i, extra in enumerate(_labels(per_class, min(num_classes, 8))):
            image = np.full((80, 120, 4), (90, 90, 90, 255), np.uint8)
            near = (7.9, 8.0, 8.3, 9.2, 9.7, 11.0)[i % 6]  # 8.0 is an edge
            depths = near + np.arange(3 + extra) * 0.75
            for depth in depths[::-1].tolist():
                centre = tuple(int(v) for v in rng.integers((15, 15), (105, 65)))
                colour = (*(int(v) for v in rng.integers(0, 256, 3)), 255)
                cv2.circle(image, centre, int(90 / depth), colour, -1)
            name = f"CLEVR_{split}_{i:06d}.png"
            members[f"CLEVR_v1.0/images/{split}/{name}"] = cv2.imencode(".png", image)[1].tobytes()
            objects = [
                {"pixel_coords": [60, 40, depth], "shape": "sphere", "size": "large"} for depth in depths.tolist()
            ]
            scenes.append({"image_index": i, "image_filename": name, "split": split, "objects": objects})
        if split != "test":  # the official test images are published without scenes
            members[f"CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json"] = json.dumps({"scenes": scenes}).encode()
    zip_(f"{folder}/CLEVR_v1.0.zip", members)


def diabetic_retinopathy(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """Round eyes on black; higher grades have more spots."""
    tables: dict[str, list[list]] = {"train": [], "test": []}
    patient = 0
    for usage in ("", "Public", "Private"):
        part = "test" if usage else "train"
        for grade in _labels(per_class, min(num_classes, 5)):
            patient += 1
            image = np.zeros((120, 160, 3), np.uint8)
            cv2.circle(image, (80, 60), 55, (200, 110, 60), -1)
            for _ in range(4 * grade):
                centre = tuple(int(v) for v in rng.integers((55, 35), (105, 85)))
                cv2.circle(image, centre, 3, (90, 10, 10), -1)
            image = np.clip(image + rng.normal(0, 2, image.shape) * (image > 0), 0, 255).astype(np.uint8)
            if patient == 2:
                image = np.zeros_like(image)  # the official set has black frames without an eye
            name = f"{patient}_{('left', 'right')[patient % 2]}"
            save(f"{folder}/{part}/{name}.jpeg", encode(image, ".jpeg"))
            tables[part].append([name, grade, usage])
    for name, rows, columns in (("trainLabels", tables["train"], 2), ("retinopathy_solution", tables["test"], 3)):
        with open(f"{folder}/{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["image", "level", "Usage"][:columns], *(row[:columns] for row in rows)])


def dmlab(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    members = {}
    for split in ("train", "validation", "test"):
        shards = [io.BytesIO(), io.BytesIO()]
        for i, label in enumerate(_labels(per_class, min(num_classes, 6))):
            image = encode(picture(label, rng, 72, 96))
            example = encode_example({"filename": f"video_{split}_{i}.jpg", "image": image, "label": label})
            write_record(shards[i % 2], example)
        for number, shard in enumerate(shards):
            members[f"dmlab-{split}.tfrecord-{number:05d}-of-00002"] = shard.getvalue()
    tar(f"{folder}/dmlab.tar.gz", members)


def dsprites(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """A bar at a position (x of 32) and an angle (40 steps of 9 degrees); the three splits come from one file."""
    import h5py

    count = 3 * per_class * num_classes
    classes = np.zeros((count, 6), np.int64)
    images = np.zeros((count, 64, 64), np.uint8)
    for i, bin_ in enumerate(_labels(3 * per_class, num_classes)):
        x, orientation, y = 2 * bin_ + i % 2, (5 * bin_ + i % 2) // 2, int(rng.integers(32))
        classes[i] = 0, 0, 5, orientation, x, y
        centre, angle = (8 + 1.5 * x, 8 + 1.5 * y), np.deg2rad(9.0 * orientation)
        tip = 7 * np.array([np.cos(angle), np.sin(angle)])
        ends = [tuple(int(v) for v in np.round(np.array(centre) + sign * tip)) for sign in (-1, 1)]
        cv2.line(images[i], ends[0], ends[1], 1, 3)
    with h5py.File(f"{folder}/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5", "w") as file:
        file.create_dataset("imgs", data=images, compression="gzip")
        file.create_dataset("latents/classes", data=classes)


def dtd(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    members: dict[str, bytes] = {}
    lists: dict[str, list[str]] = {"train1": [], "val1": [], "test1": []}
    for label, name in enumerate(tasks.get("dtd").classes[:num_classes]):
        for i in range(3 * per_class):
            key = f"{name}/{name}_{i + 1:04d}.jpg"
            lists[("train1", "val1", "test1")[i % 3]].append(key)
            members[f"dtd/images/{key}"] = encode(picture(label, rng))
    members |= {f"dtd/labels/{name}.txt": "\n".join(keys).encode() for name, keys in lists.items()}
    tar(f"{folder}/dtd-r1.0.1.tar.gz", members, compressed=False)


def eurosat(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """One split; 60, 20 and 20 % of it are the pools."""
    members = {
        f"2750/{name}/{name}_{i + 1}.jpg": encode(picture(label, rng, 64, 64))
        for label, name in enumerate(tasks.get("eurosat").classes[:num_classes])
        for i in range(5 * per_class)
    }
    zip_(f"{folder}/EuroSAT.zip", members)


def kitti(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """A box on a road, larger if nearer; ten drives, one each for validation and test. Class 3 has no vehicle."""
    lines, images, labels, permutation = [], {}, {}, []
    count = 10 * per_class * 4
    for i in range(count):
        label = i // 10 % 4
        z = (8.0, 5.0, 20.0, 14.0, 35.0, 60.0)[label * 2 + i % 2] if label < 3 else None  # 8.0 and 20.0 are edges
        image = np.full((48, 156, 3), (110, 140, 170), np.uint8)
        image[24:] = 90
        rows = ["DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10"]
        rows.append("Pedestrian 0.00 0 0.1 10.0 20.0 30.0 40.0 1.8 0.5 0.9 1.0 1.5 2.5 0.1")  # not a vehicle
        if z is not None:
            half, centre = int(110 / z) + 2, int(rng.integers(40, 116))
            cv2.rectangle(image, (centre - half, 40 - half), (centre + half, 40), (200, 30, 30), -1)
            vehicle = ("Car", "Van", "Truck")[i % 3]
            rows.append(f"{vehicle} 0.00 0 1.85 387.63 181.54 423.81 203.12 1.67 1.87 3.69 -16.53 2.39 {z} 1.57")
        lines.append(f"2011_09_26 2011_09_26_drive_{i % 10:04d}_sync {i:010d}")
        permutation.append(count - i)  # image i is a line of the mapping counted from 1
        images[count - 1 - i], labels[count - 1 - i] = image, "\n".join(rows) + "\n"
    training = {f"training/image_2/{i:06d}.png": encode(images[i], ".png") for i in range(count)}
    testing = {"testing/image_2/000000.png": encode(images[0], ".png")}  # unlabelled, so not part of the task
    zip_(f"{folder}/data_object_image_2.zip", training | testing)
    zip_(
        f"{folder}/data_object_label_2.zip", {f"training/label_2/{i:06d}.txt": labels[i].encode() for i in range(count)}
    )
    mapping = {"mapping/train_rand.txt": ",".join(map(str, permutation)), "mapping/train_mapping.txt": "\n".join(lines)}
    zip_(f"{folder}/devkit_object.zip", {name: text.encode() for name, text in mapping.items()})


def flowers102(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    from scipy.io import savemat

    labels = [label + 1 for label in _labels(3 * per_class, num_classes)]
    ids = rng.permutation(len(labels)) + 1
    third = len(labels) // 3
    sets = {"trnid": ids[:third], "valid": ids[third : 2 * third], "tstid": ids[2 * third :]}
    savemat(f"{folder}/imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(f"{folder}/setid.mat", {name: part[None].astype(np.uint16) for name, part in sets.items()})
    members = {f"jpg/image_{i + 1:05d}.jpg": encode(picture(label - 1, rng)) for i, label in enumerate(labels)}
    tar(f"{folder}/102flowers.tgz", members)


def pets(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    images, lists = {}, {}
    for name, start in (("trainval", 1), ("test", 100)):
        rows = []
        for i, label in enumerate(_labels(per_class, num_classes)):
            breed = tasks.get("pets").classes[label]
            key = f"{breed}_{start + i // num_classes}"
            rows.append(f"{key} {label + 1} 1 {label + 1}")
            images[f"images/{key}.jpg"] = disguised(picture(label, rng), i)
        lists[f"annotations/{name}.txt"] = "\n".join(rows).encode()
    lists["annotations/list.txt"] = b"#Image CLASS-ID SPECIES BREED ID"
    tar(f"{folder}/images.tar.gz", images, compressed=False)
    tar(f"{folder}/annotations.tar.gz", lists, compressed=False)


def patch_camelyon(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    import h5py

    def h5(name: str, values: np.ndarray) -> bytes:
        sink = io.BytesIO()
        with h5py.File(sink, "w", track_order=False) as file:
            file.create_dataset(name, data=values, track_times=False)
        return sink.getvalue()

    for split in ("train", "valid", "test"):
        labels = list(_labels(per_class, 2))
        pixels = np.stack([picture(label, rng, 96, 96) for label in labels])
        gz(f"{folder}/camelyonpatch_level_2_split_{split}_x.h5.gz", h5("x", pixels))
        targets = np.array(labels, np.uint32).reshape(-1, 1, 1, 1)
        gz(f"{folder}/camelyonpatch_level_2_split_{split}_y.h5.gz", h5("y", targets))


def resisc45(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """The unpacked rar archive."""
    for label, name in enumerate(tasks.get("resisc45").classes[:num_classes]):
        for i in range(5 * per_class):
            save(f"{folder}/NWPU-RESISC45/{name}/{name}_{i + 1:03d}.jpg", encode(picture(label, rng, 64, 64)))


def smallnorb(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """A bar whose angle shows the azimuth and whose length shows the elevation. The
    right picture of each pair is black."""

    def matrix(values: np.ndarray) -> bytes:
        magic = 0x1E3D4C55 if values.dtype == np.uint8 else 0x1E3D4C54
        sizes = [*values.shape, 1, 1][: max(3, values.ndim)]
        return struct.pack(f"<II{len(sizes)}I", magic, values.ndim, *sizes) + values.tobytes()

    for half in ("5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing"):
        count = 2 * per_class * num_classes
        info, pairs = np.zeros((count, 4), "<i4"), np.zeros((count, 2, 96, 96), np.uint8)
        for i, label in enumerate(_labels(2 * per_class, num_classes)):
            azimuth, elevation = 2 * (label % 18), (i // num_classes) % 9
            info[i] = 4, elevation, azimuth, i % 6
            angle = np.deg2rad(10.0 * azimuth)
            tip = (16 + 3 * elevation) * np.array([np.cos(angle), np.sin(angle)])
            end = tuple(int(v) for v in np.round(48 + tip))
            pairs[i, 0] = rng.integers(90, 110, (96, 96))
            cv2.arrowedLine(pairs[i, 0], (48, 48), end, 240, 4)
        gz(f"{folder}/smallnorb-{half}-dat.mat.gz", matrix(pairs))
        gz(f"{folder}/smallnorb-{half}-info.mat.gz", matrix(info))


def sun397(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    """With its own split lists, because the official lists name files that a miniature does not have."""
    members, lists = {}, {}
    for split in ("tr", "va", "te"):
        keys = []
        for i, label in enumerate(_labels(per_class, num_classes)):
            key = f"{tasks.get('sun397').classes[label]}/sun_{split}{i:014d}.jpg"
            keys.append(key)
            members[f"SUN397{key}"] = disguised(picture(label, rng), i)
        lists[split] = keys
    lists["tr"].append(UNDECODABLE)
    members[f"SUN397{UNDECODABLE}"] = b"GIF89a, or so it says"
    tar(f"{folder}/SUN397.tar.gz", members)
    for split, keys in lists.items():
        save(f"{folder}/sun397_tfds_{split}.txt", "\n".join(keys).encode())


def svhn(folder: str, rng: np.random.Generator, per_class: int, num_classes: int) -> None:
    from scipy.io import savemat

    for split in ("train", "test"):
        labels = list(_labels(per_class, num_classes))
        images_HWCN = np.stack([picture(label, rng, 32, 32) for label in labels], axis=3)
        targets = np.array([[label or 10] for label in labels], np.uint8)  # 10 stands for the digit 0
        savemat(f"{folder}/{split}_32x32.mat", {"X": images_HWCN, "y": targets}, do_compression=True)


WRITERS: dict[str, Callable[[str, np.random.Generator, int, int], None]] = {
    "caltech101": caltech101,
    "cifar100": cifar100,
    "clevr": clevr,
    "diabetic_retinopathy_detection": diabetic_retinopathy,
    "dmlab": dmlab,
    "dsprites": dsprites,
    "dtd": dtd,
    "eurosat": eurosat,
    "kitti": kitti,
    "oxford_flowers102": flowers102,
    "oxford_iiit_pet": pets,
    "patch_camelyon": patch_camelyon,
    "resisc45": resisc45,
    "smallnorb": smallnorb,
    "sun397": sun397,
    "svhn_cropped": svhn,
}
