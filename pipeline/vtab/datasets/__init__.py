"""The owners' archives, one data set after another: what is in them, the label rules, and the images bit for bit.

`index(dataset, found, raw)` lists every example as a `Listing` per TFDS split: keys in TFDS's form, labels per task, and the member
that holds the image. `read(source, members)` then fetches images. Files are passed on as they are; arrays of pixels become PNG,
which loses nothing.
"""

import csv
import io
import json
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import cv2
import numpy as np

from pipeline import storage
from pipeline.data.sources.tfrecord import parse_example, read_records
from pipeline.errors import UserError
from pipeline.vtab.archives import MAX_MEMBER_BYTES, Found, Tree, damaged, unzipped
from pipeline.vtab.tasks import TABLE, sun397_splits

MAX_UNPACKED = 16 << 30  # bytes; the largest official .h5 has 7.2 GB
Member = str | int
Labels = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A container of images: its kind (a key of READERS), where it lies, the prefix of the member names when it is unpacked,
    and which part of it is meant."""

    kind: str
    uri: str
    prefix: str = ""
    part: str = ""

    @property
    def random_access(self) -> bool:
        """Whether a slice of the members costs no more than its share."""
        if self.kind in ("tree", "retinopathy"):
            return Tree(self.uri).random_access
        return self.kind in ("patch_camelyon", "dsprites") and self.uri.endswith((".h5", ".hdf5"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Examples of one TFDS split that lie in one source. `labels` has a list for every task of the data set."""

    split: str
    source: Source
    keys: Sequence[Any]
    members: Sequence[Member]
    labels: dict[str, Labels]


Index = Callable[[dict[str, Found]], list[Listing]]

# What parsing raises over contents that are not what they should be: the archive's fault, not the program's.
MALFORMED = (
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
    OverflowError,
    MemoryError,
    cv2.error,
)


def index(dataset: str, found: Iterable[Found]) -> list[Listing]:
    """Every example of a data set. Raises UserError naming the archive that is damaged or not laid out as expected."""
    places = {place.file.name: place for place in found}
    try:
        listings = INDEXES[dataset](places)
    except MALFORMED as error:
        where = ", ".join(place.uri for place in places.values())
        raise UserError(f"{where}: not laid out as {dataset} is ({type(error).__name__}: {error})") from error
    if not any(len(listing.keys) for listing in listings):
        raise UserError(f"{', '.join(place.uri for place in places.values())}: no example of {dataset} in there")
    return listings


def read(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """(member, image file) of the members asked for: in their order with random access, else in the archive's.

    Members that the source lacks are left out.
    """
    try:
        yield from READERS[source.kind](source, members)
    except (*MALFORMED, OSError) as error:  # OSError: HDF5 over damaged chunks
        raise UserError(f"{source.uri}: not laid out as expected ({type(error).__name__}: {error})") from error


def _tree(place: Found) -> Tree:
    return Tree(place.uri, place.prefix)


def _source(place: Found, kind: str = "tree", part: str = "") -> Source:
    return Source(kind=kind, uri=place.uri, prefix=place.prefix, part=part)


def _tasks(dataset: str, labels: Labels) -> dict[str, Labels]:
    """One label list for the data sets that one task is made from."""
    return {task.name: labels for task in TABLE.values() if task.dataset == dataset}


def _classes(dataset: str) -> dict[str, int]:
    task = next(task for task in TABLE.values() if task.dataset == dataset)
    return {name: label for label, name in enumerate(task.classes)}


def _label(classes: dict[str, int], name: str, where: str) -> int:
    if name not in classes:
        raise UserError(f"{where}: {name!r} is not one of the {len(classes)} classes")
    return classes[name]


def _text(tree: Tree, *names: str) -> list[str]:
    """The contents of small text members. Raises UserError when one is missing."""
    contents = dict(tree.read(names))
    for name in names:
        if name not in contents:
            raise UserError(f"{tree.uri}: {name} is missing; not the official archive")
    return [contents[name].decode() for name in names]


def _expect(array: Any, uri: str, name: str, shape: Sequence[int | None], dtype: Any = np.uint8) -> None:
    """Raises UserError when an array is not what the data set has; None stands for any size."""
    fits = len(array.shape) == len(shape) and all(b in (a, None) for a, b in zip(array.shape, shape, strict=True))
    if not fits or array.dtype != dtype:
        wanted = " x ".join("N" if size is None else str(size) for size in shape)
        has = f"{' x '.join(map(str, array.shape))} {array.dtype}"
        raise UserError(f"{uri}: {name} is {has}, not {wanted} {np.dtype(dtype)}; not the official file")


def png(image: np.ndarray) -> bytes:
    """A lossless file of an RGB (H, W, 3) or grey (H, W) uint8 array."""
    if image.ndim == 3:
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", image)[1].tobytes()


# ---------------------------------------------------------------- class folders and lists of files


def caltech101(places: dict[str, Found]) -> list[Listing]:
    """30 pictures of every class train, the others test. TFDS draws them by numpy's seed 1234 while it walks the folders in
    whatever order the file system gives; here folders and files are walked sorted. For TFDS's own draw, prepare from its
    TFRecords (pipeline/vtab/copies.py)."""
    tree, source = _tree(places["101_ObjectCategories.tar.gz"]), _source(places["101_ObjectCategories.tar.gz"])
    folders: dict[str, list[str]] = {}
    for name in tree.names():
        *_, folder, file = ["", *name.split("/")]
        folders.setdefault(folder, []).append(file)
    classes = _classes("caltech101")
    generator = np.random.RandomState(1234)
    keys: dict[str, list[str]] = {"train": [], "test": []}
    for folder in sorted(folders):
        files = sorted(folders[folder])
        if folder.lower() not in classes:
            continue
        if len(files) < 30:
            raise UserError(f"{tree.uri}: only {len(files)} files in {folder}, of which 30 are for training")
        train = set(generator.choice(files, 30, replace=False).tolist())
        for file in files:
            if file.endswith(".jpg"):  # BACKGROUND_Google also holds a file called tmp, which takes part in the draw
                keys["train" if file in train else "test"].append(f"{folder}/{file}")
    root = "101_ObjectCategories/"
    return [
        Listing(
            split=split,
            source=source,
            keys=listed,
            members=[root + key for key in listed],
            labels=_tasks("caltech101", [classes[key.partition("/")[0].lower()] for key in listed]),
        )
        for split, listed in keys.items()
    ]


def dtd(places: dict[str, Found]) -> list[Listing]:
    """The first of the ten official folds."""
    tree, source = _tree(places["dtd-r1.0.1.tar.gz"]), _source(places["dtd-r1.0.1.tar.gz"])
    classes = _classes("dtd")
    listings = []
    lists = _text(tree, "dtd/labels/train1.txt", "dtd/labels/val1.txt", "dtd/labels/test1.txt")
    for split, text in zip(("train", "validation", "test"), lists, strict=True):
        keys = text.split()
        labels = [_label(classes, key.partition("/")[0], f"{tree.uri}: {key}") for key in keys]
        members = [f"dtd/images/{key}" for key in keys]
        listings.append(Listing(split=split, source=source, keys=keys, members=members, labels=_tasks("dtd", labels)))
    return listings


def flowers102(places: dict[str, Found]) -> list[Listing]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    def mat(name: str) -> dict[str, Any]:
        data = storage.read_bytes(places[name].uri)
        try:
            return loadmat(io.BytesIO(data))
        except (*MALFORMED, MatReadError, OSError, NotImplementedError, zlib.error) as error:
            raise UserError(f"{places[name].uri}: truncated, or not a MATLAB file ({error})") from error

    labels = mat("imagelabels.mat")["labels"].ravel().astype(int) - 1
    sets = mat("setid.mat")
    source = _source(places["102flowers.tgz"])
    listings = []
    for split, field in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        ids = sets[field].ravel().astype(int)
        keys = [f"image_{i:05d}.jpg" for i in ids]
        listings.append(
            Listing(
                split=split,
                source=source,
                keys=keys,
                members=[f"jpg/{key}" for key in keys],
                labels=_tasks("oxford_flowers102", labels[ids - 1]),
            )
        )
    return listings


def pets(places: dict[str, Found]) -> list[Listing]:
    tree = _tree(places["annotations.tar.gz"])
    source = _source(places["images.tar.gz"])
    listings = []
    lists = _text(tree, "annotations/trainval.txt", "annotations/test.txt")
    for split, text in zip(("train", "test"), lists, strict=True):
        rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        keys = [f"{row[0]}.jpg" for row in rows]  # columns: name, class from 1, species, breed within species
        labels = [int(row[1]) - 1 for row in rows]
        members = [f"images/{key}" for key in keys]
        listings.append(
            Listing(split=split, source=source, keys=keys, members=members, labels=_tasks("oxford_iiit_pet", labels))
        )
    return listings


def sun397(places: dict[str, Found]) -> list[Listing]:
    """TFDS's own partition; its lists beside the archive (sun397_tfds_{tr,va,te}.txt) take precedence over ours."""
    place = places["SUN397.tar.gz"]
    source = _source(place)
    splits = dict(sun397_splits())
    folder = place.uri.rpartition("/")[0]
    for split, short in (("train", "tr"), ("validation", "va"), ("test", "te")):
        own = storage.join(folder, f"sun397_tfds_{short}.txt")
        if storage.exists(own):
            splits[split] = storage.read_bytes(own).decode().split()
    classes = _classes("sun397")
    return [
        Listing(
            split=split,
            source=source,
            keys=keys,
            members=[f"SUN397{key}" for key in keys],
            labels=_tasks("sun397", [_label(classes, key.rpartition("/")[0], key) for key in keys]),
        )
        for split, keys in splits.items()
    ]


def _class_folders(dataset: str, place: Found, class_of: Callable[[str, str], str]) -> list[Listing]:
    """A tree of <folder>/<file>.jpg that is all 'train'; `class_of(folder, file)` names the class. Keys: <class>_<file>."""
    tree, source = _tree(place), _source(place)
    classes = _classes(dataset)
    members = [name for name in tree.names() if name.lower().endswith((".jpg", ".jpeg"))]
    parts = [member.split("/")[-2:] for member in members]
    if any(len(part) < 2 for part in parts):
        raise UserError(f"{tree.uri}: images outside the class folders")
    names = [class_of(*part) for part in parts]
    labels = [_label(classes, name, f"{tree.uri}: {member}") for name, member in zip(names, members, strict=True)]
    keys = [f"{name}_{file}" for name, (_, file) in zip(names, parts, strict=True)]
    return [Listing(split="train", source=source, keys=keys, members=members, labels=_tasks(dataset, labels))]


def eurosat(places: dict[str, Found]) -> list[Listing]:
    """2750/<class>/<class>_<number>.jpg; the class is the one in the file name, as TFDS takes it."""
    return _class_folders("eurosat", places["EuroSAT.zip"], lambda folder, file: file.partition("_")[0])


def resisc45(places: dict[str, Found]) -> list[Listing]:
    return _class_folders("resisc45", places["NWPU-RESISC45"], lambda folder, file: folder)


def retinopathy(places: dict[str, Found]) -> list[Listing]:
    """Kaggle's train images are 'train', its test images 'validation' (public leaderboard) and 'test' (private)."""
    listings = []
    for split, table, images, usage in (
        ("train", "trainLabels.csv", "train", None),
        ("validation", "retinopathy_solution.csv", "test", "Public"),
        ("test", "retinopathy_solution.csv", "test", "Private"),
    ):
        text = storage.read_bytes(places[table].uri).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text)))
        try:
            rows = [row for row in rows if usage is None or row["Usage"] == usage]
            keys, labels = [row["image"] for row in rows], [int(row["level"]) for row in rows]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{places[table].uri}: not a table of image, level and Usage ({error!r})") from error
        source = _source(places[images], "retinopathy")
        members = [f"{images}/{key}.jpeg" for key in keys]
        labelled = _tasks("diabetic_retinopathy_detection", labels)
        listings.append(Listing(split=split, source=source, keys=keys, members=members, labels=labelled))
    return listings


def read_tree(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    yield from Tree(source.uri, source.prefix).read(str(member) for member in members)


def read_retinopathy(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    from pipeline.vtab.retinopathy import btgraham

    for name, data in read_tree(source, members):
        try:
            yield name, btgraham(data, str(name))
        except UserError:
            yield name, b""  # a row for the rejects, like any other image that does not decode


# ---------------------------------------------------------------- scenes with geometry


def clevr_count(objects: int) -> int:
    return objects - 3


def clevr_distance(distances: Iterable[float]) -> int:
    """The bin of the closest object, -1 without any. An edge belongs to the bin below it; float32, as in TFDS."""
    edges = np.array([0, 8, 8.5, 9, 9.5, 10, 100], np.float32)
    return int(np.sum(edges < np.float32(min(distances, default=0)))) - 1


def clevr(places: dict[str, Found]) -> list[Listing]:
    """Scene number i describes the i-th image in the order of names. The official test images have no scenes: not used."""
    tree, source = _tree(places["CLEVR_v1.0.zip"]), _source(places["CLEVR_v1.0.zip"])
    names = sorted(name for name in tree.names() if name.endswith(".png"))
    listings = []
    for split, folder in (("train", "train"), ("validation", "val")):
        members = [name for name in names if f"/images/{folder}/" in f"/{name}"]
        (text,) = _text(tree, f"CLEVR_v1.0/scenes/CLEVR_{folder}_scenes.json")
        scenes = json.loads(text)["scenes"]
        if len(scenes) != len(members):
            raise UserError(f"{tree.uri}: {len(members):,} {folder} images, but {len(scenes):,} scenes")
        keys = [member.rpartition("/")[2] for member in members]
        for key, scene in zip(keys, scenes, strict=True):
            if scene.get("image_filename", key) != key:
                raise UserError(f"{tree.uri}: the scene of {scene['image_filename']} stands at the place of {key}")
        objects = [scene["objects"] for scene in scenes]
        listings.append(
            Listing(
                split=split,
                source=source,
                keys=keys,
                members=members,
                labels={
                    "clevr_count": [clevr_count(len(scene)) for scene in objects],
                    "clevr_distance": [clevr_distance(o["pixel_coords"][2] for o in scene) for scene in objects],
                },
            )
        )
    return listings


VEHICLES = ("Car", "Van", "Truck")


def kitti_distance(vehicle_distances: Iterable[float]) -> int:
    """The bin of the closest car, van or truck in metres ahead: up to 8, 20, farther, none. An edge belongs to the bin below."""
    closest = np.float32(min(vehicle_distances, default=1000))
    return int(np.sum(np.array([-100, 8, 20, 999], np.float32) < closest)) - 1


def kitti_label(text: str) -> int:
    """The label of one frame from its label_2 file: type first, z of the location in column 13."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return kitti_distance(float(row[13]) for row in rows if row[0] in VEHICLES)


def kitti_videos(permutation: str, mapping: str) -> dict[str, list[int]]:
    """{TFDS split: image numbers}: 10 % of the videos for test, 10 % for validation, drawn by numpy's seed 123.

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


def kitti(places: dict[str, Found]) -> list[Listing]:
    devkit = _tree(places["devkit_object.zip"])
    annotations = _tree(places["data_object_label_2.zip"])
    images, source = _tree(places["data_object_image_2.zip"]), _source(places["data_object_image_2.zip"])
    labels = {}
    names = [name for name in annotations.names() if name.startswith("training/") and name.endswith(".txt")]
    for name, data in annotations.read(names):
        try:
            labels[int(name[-10:-4])] = kitti_label(data.decode())
        except (ValueError, IndexError) as error:
            raise UserError(f"{annotations.uri}: {name}: not a KITTI label file ({error})") from error
    members = {
        int(name[-10:-4]): name
        for name in images.names()
        if name.startswith("training/image_2/") and name.endswith(".png")
    }
    listings = []
    try:
        videos = kitti_videos(*_text(devkit, "mapping/train_rand.txt", "mapping/train_mapping.txt"))
    except (ValueError, IndexError) as error:
        raise UserError(f"{devkit.uri}: mapping/train_rand.txt does not fit train_mapping.txt ({error})") from error
    for split, numbers in videos.items():
        unlabelled = [number for number in numbers if number not in labels]
        if unlabelled:
            raise UserError(f"{annotations.uri}: no label file for image {unlabelled[0]:06d}")
        paths = [members.get(number, f"training/image_2/{number:06d}.png") for number in numbers]
        listings.append(
            Listing(
                split=split,
                source=source,
                keys=[path.rpartition("/")[2] for path in paths],
                members=paths,
                labels=_tasks("kitti", [labels[number] for number in numbers]),
            )
        )
    return listings


# ---------------------------------------------------------------- arrays of pixels


def cifar100(places: dict[str, Found]) -> list[Listing]:
    """Rows of 3,074 bytes: coarse label, fine label, 32x32 planes of red, green and blue."""
    place = places["cifar-100-binary.tar.gz"]
    listings = []
    for split, part in (("train", "train.bin"), ("test", "test.bin")):
        source = _source(place, "cifar100", part)
        rows = _cifar_rows(source)
        labelled = _tasks("cifar100", rows[:, 1].astype(int))
        numbers = range(len(rows))
        listings.append(Listing(split=split, source=source, keys=numbers, members=numbers, labels=labelled))
    return listings


def _cifar_rows(source: Source) -> np.ndarray:
    name = f"cifar-100-binary/{source.part}"
    data = dict(Tree(source.uri, source.prefix).read([name])).get(name, b"")
    if not data or len(data) % 3074:
        raise UserError(
            f"{source.uri}: {name} has {len(data):,} bytes, not a multiple of 3,074; truncated or another file"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, 3074)


def read_cifar100(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    rows = _cifar_rows(source)
    for i in members:
        yield i, png(rows[int(i), 2:].reshape(3, 32, 32).transpose(1, 2, 0))


def svhn(places: dict[str, Found]) -> list[Listing]:
    """Format 2, cropped digits; label 10 stands for the digit 0. The extra images are no part of the task."""
    listings = []
    for split, name in (("train", "train_32x32.mat"), ("test", "test_32x32.mat")):
        source = Source(kind="svhn", uri=places[name].uri)
        labels = _svhn_field(source.uri, "y").ravel().astype(int) % 10
        numbers = range(len(labels))
        labelled = _tasks("svhn_cropped", labels)
        listings.append(Listing(split=split, source=source, keys=numbers, members=numbers, labels=labelled))
    return listings


def _svhn_field(uri: str, field: str) -> np.ndarray:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        with storage.open_file(uri) as file, damaged(uri):
            return loadmat(file, variable_names=[field])[field]
    except (*MALFORMED, MatReadError, OSError) as error:
        raise UserError(f"{uri}: truncated, or not the MATLAB file of SVHN ({error})") from error


def read_svhn(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    images_HWCN = _svhn_field(source.uri, "X")
    _expect(images_HWCN, source.uri, "X", (32, 32, 3, None))
    for i in members:
        yield i, png(images_HWCN[:, :, :, int(i)])


def _open_h5(uri: str, stack: IO[bytes]) -> Any:
    """An HDF5 file. Inside .gz it is unpacked to `stack`, a temporary file, since HDF5 needs random access."""
    import h5py

    with unzipped(uri) as stream:
        if uri.endswith(".gz"):
            while chunk := stream.read(4 << 20):
                if stack.tell() > MAX_UNPACKED:
                    raise UserError(f"{uri}: unpacks to more than {MAX_UNPACKED:,} bytes, which no official file does")
                stack.write(chunk)
    try:
        if uri.endswith(".gz"):
            stack.seek(0)
            return h5py.File(stack, "r")
        fs, path = storage.filesystem(uri)
        return h5py.File(fs.open(path, "rb"), "r")
    except (OSError, KeyError) as error:
        raise UserError(f"{uri}: truncated, or not an HDF5 file ({error})") from error


def patch_camelyon(places: dict[str, Found]) -> list[Listing]:
    listings = []
    for split, short in (("train", "train"), ("validation", "valid"), ("test", "test")):
        pixels, targets = (places[f"camelyonpatch_level_2_split_{short}_{axis}.h5.gz"].uri for axis in "xy")
        with tempfile.TemporaryFile() as scratch, _open_h5(targets, scratch) as file:
            labels = file["y"][:].ravel().astype(int)
        listings.append(
            Listing(
                split=split,
                source=Source(kind="patch_camelyon", uri=pixels),
                keys=[f"{short}_{i}" for i in range(len(labels))],
                members=range(len(labels)),
                labels=_tasks("patch_camelyon", labels),
            )
        )
    return listings


def read_patch_camelyon(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    with tempfile.TemporaryFile() as scratch, _open_h5(source.uri, scratch) as file:
        images_NHWC = file["x"]
        _expect(images_NHWC, source.uri, "x", (None, 96, 96, 3))
        for i in members:
            yield i, png(images_NHWC[int(i)])


def dsprites_label(value: int, original_classes: int) -> int:
    """32 positions or 40 orientations in 16 bins."""
    return int(value // (original_classes / 16))


DSPRITES_BLOCK = 4096  # rows; the file is compressed in chunks that single rows would unpack again and again


def dsprites(places: dict[str, Found]) -> list[Listing]:
    """Columns of the latent classes: colour, shape, scale, orientation (40), x (32), y (32)."""
    (place,) = places.values()
    uri = place.uri
    with damaged(uri):
        if uri.endswith(".npz"):
            with storage.open_file(uri) as file, np.load(file, allow_pickle=False) as arrays:
                latents = arrays["latents_classes"]
        else:
            with tempfile.TemporaryFile() as scratch, _open_h5(uri, scratch) as file:
                latents = file["latents/classes"][:]
    numbers = range(len(latents))
    labels = {
        "dsprites_location": (latents[:, 4] // 2).astype(int),
        "dsprites_orientation": np.array([dsprites_label(o, 40) for o in range(40)])[latents[:, 3]],
    }
    return [
        Listing(split="train", source=Source(kind="dsprites", uri=uri), keys=numbers, members=numbers, labels=labels)
    ]


def _dsprites_blocks(uri: str) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """(first row, function that gives the block's rows) for blocks of DSPRITES_BLOCK rows, in order."""
    if not uri.endswith(".npz"):
        with tempfile.TemporaryFile() as scratch, _open_h5(uri, scratch) as file:
            images = file["imgs"]
            _expect(images, uri, "imgs", (None, 64, 64))
            for first in range(0, len(images), DSPRITES_BLOCK):
                yield first, lambda first=first: images[first : first + DSPRITES_BLOCK]  # type: ignore[misc]
        return
    with storage.open_file(uri) as file, zipfile.ZipFile(file) as archive, archive.open("imgs.npy") as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        _expect(np.broadcast_to(np.zeros((), dtype), shape), uri, "imgs", (None, 64, 64))
        rows, height, width = shape
        for first in range(0, rows, DSPRITES_BLOCK):
            count = min(DSPRITES_BLOCK, rows - first)
            block = np.frombuffer(stream.read(count * height * width), np.uint8).reshape(count, height, width)
            yield first, lambda block=block: block  # type: ignore[misc]


def read_dsprites(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """Binary images as grey 0 and 255, in the order of rows."""
    wanted = np.sort(np.array(members, np.int64))
    with damaged(source.uri):
        for first, block in _dsprites_blocks(source.uri):
            low, high = np.searchsorted(wanted, [first, first + DSPRITES_BLOCK])
            if low < high:
                rows = block()
                for i in wanted[low:high].tolist():
                    yield i, png(rows[i - first] * np.uint8(255))


# NORB's own matrix format: magic number (element type), number of dimensions, at least three sizes, the elements.
NORB_TYPES: dict[int, np.dtype[Any]] = {0x1E3D4C54: np.dtype("<i4"), 0x1E3D4C55: np.dtype("u1")}
NORB = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training-{}.mat.gz",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing-{}.mat.gz",
}


def _norb_header(stream: IO[bytes], uri: str) -> tuple[np.dtype[Any], list[int]]:
    head = stream.read(8)
    magic, dimensions = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
    if magic not in NORB_TYPES or not 1 <= dimensions <= 4:
        raise UserError(f"{uri}: truncated, or not a matrix of NORB")
    sizes = struct.unpack(f"<{max(3, dimensions)}I", stream.read(4 * max(3, dimensions)))
    return NORB_TYPES[magic], list(sizes[:dimensions])


def smallnorb(places: dict[str, Found]) -> list[Listing]:
    """Rows of the info matrix: instance, elevation (0-8), azimuth (0-34 in steps of 2), lighting."""
    listings = []
    for split, name in NORB.items():
        uri = places[name.format("info")].uri
        with unzipped(uri) as stream:
            dtype, shape = _norb_header(stream, uri)
            if len(shape) != 2 or shape[1] != 4 or dtype != "<i4":
                raise UserError(f"{uri}: {shape} {dtype}, not the info matrix of smallNORB")
            data = stream.read(MAX_MEMBER_BYTES)
            if len(data) < shape[0] * 4 * dtype.itemsize:
                raise UserError(f"{uri}: truncated: {len(data):,} bytes for {shape[0]:,} rows; fetch it again")
            data = data[: shape[0] * 4 * dtype.itemsize]
            info = np.frombuffer(data, dtype).reshape(shape)
        numbers = range(len(info))
        listings.append(
            Listing(
                split=split,
                source=Source(kind="smallnorb", uri=places[name.format("dat")].uri),
                keys=numbers,
                members=numbers,
                labels={"smallnorb_azimuth": info[:, 2] // 2, "smallnorb_elevation": info[:, 1]},
            )
        )
    return listings


def read_smallnorb(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """The left picture of each stereo pair, grey, in the order of rows."""
    wanted = set(members)
    with unzipped(source.uri) as stream:
        dtype, (rows, *shape) = _norb_header(stream, source.uri)
        if shape != [2, 96, 96] or dtype != np.uint8:
            raise UserError(f"{source.uri}: pictures of {shape} {dtype}, not pairs of 96 x 96; not the official file")
        for i in range(rows):
            pair = stream.read(2 * 96 * 96)
            if len(pair) < 2 * 96 * 96:
                raise UserError(f"{source.uri}: truncated at image {i:,} of {rows:,}")
            if i in wanted:
                yield i, png(np.frombuffer(pair, np.uint8, 96 * 96).reshape(96, 96))


# ---------------------------------------------------------------- DMLab


def _dmlab_records(tree: Tree, split: str, check: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(member name, Example) of the split's records. A member is <file>#<number in it>."""

    def wanted(name: str) -> bool:
        return name.rpartition("/")[2].startswith(f"dmlab-{split}.tfrecord" if split else "dmlab-")

    for name, file in tree.walk(wanted):
        where = f"{tree.uri}: {name}"
        with damaged(where):
            for number, record in enumerate(read_records(file, where, check)):
                yield f"{name}#{number}", parse_example(record, where)


def dmlab(places: dict[str, Found]) -> list[Listing]:
    tree, source = _tree(places["dmlab.tar.gz"]), _source(places["dmlab.tar.gz"], "dmlab")
    listed: dict[str, list[tuple[str, bytes, int]]] = {"train": [], "validation": [], "test": []}
    for member, example in _dmlab_records(tree, "", check=False):
        split = member.rpartition("/")[2].removeprefix("dmlab-").partition(".")[0]
        if split in listed:
            try:
                listed[split].append((member, example["filename"][0], int(example["label"][0])))
            except (KeyError, IndexError) as error:
                raise UserError(f"{tree.uri}: {member} has no {error}; not a record of DMLab") from error
    return [
        Listing(
            split=split,
            source=source,
            keys=[key.decode() for _, key, _ in rows],
            members=[member for member, _, _ in rows],
            labels=_tasks("dmlab", [label for _, _, label in rows]),
        )
        for split, rows in listed.items()
    ]


def read_dmlab(source: Source, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    wanted = set(members)
    for member, example in _dmlab_records(Tree(source.uri, source.prefix), "", check=True):
        if member in wanted:
            yield member, example["image"][0]


INDEXES: dict[str, Index] = {
    "caltech101": caltech101,
    "cifar100": cifar100,
    "clevr": clevr,
    "diabetic_retinopathy_detection": retinopathy,
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

READERS: dict[str, Callable[[Source, Sequence[Member]], Iterator[tuple[Member, bytes]]]] = {
    "tree": read_tree,
    "retinopathy": read_retinopathy,
    "cifar100": read_cifar100,
    "svhn": read_svhn,
    "patch_camelyon": read_patch_camelyon,
    "dsprites": read_dsprites,
    "smallnorb": read_smallnorb,
    "dmlab": read_dmlab,
}
