"""CIFAR-100: 32 x 32 pictures of 100 classes, the binary version."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipeline.errors import UserError
from pipeline.vtab.containers import MAX_LARGE_BYTES, png
from pipeline.vtab.datasets.base import ArchiveFile, DataSet, FoundFile, Listing, Member, OfficialFile

ROW_BYTES = 3074  # coarse label, fine label, 32 x 32 planes of red, green and blue

CLASSES = [
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
]  # fmt: skip


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    found = files["cifar-100-binary.tar.gz"]
    listings = []
    for split in ("train", "test"):
        file = ArchiveFile(uri=found.uri, prefix=found.prefix, part=f"{split}.bin", read=read)
        rows = _rows(file)
        numbers = range(len(rows))
        labels = {"cifar100": rows[:, 1].astype(int)}
        listings.append(Listing(split=split, file=file, keys=numbers, members=numbers, labels=labels))
    return listings


def read(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    rows = _rows(file)
    for i in members:
        yield i, png(rows[int(i), 2:].reshape(3, 32, 32).transpose(1, 2, 0))


def _rows(file: ArchiveFile) -> np.ndarray:
    """The bytes of one split, uint8 (N, 3074)."""
    name = f"cifar-100-binary/{file.part}"
    data = dict(file.tree.read([name], MAX_LARGE_BYTES)).get(name, b"")
    if not data or len(data) % ROW_BYTES:
        raise UserError(
            f"{file.uri}: {name} has {len(data):,} bytes, not a multiple of {ROW_BYTES:,}; truncated or another file"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, ROW_BYTES)


DATASET = DataSet(
    name="cifar100",
    files=(
        OfficialFile(
            name="cifar-100-binary.tar.gz",
            bytes=168_513_733,
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            instead=("cifar-100-binary",),
        ),
    ),
    classes={"cifar100": CLASSES},
    index=index,
)
