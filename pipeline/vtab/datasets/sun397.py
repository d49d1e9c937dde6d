"""SUN397: photographs of 397 kinds of scenes, with the splits of TFDS."""

import lzma
from collections.abc import Mapping
from functools import cache
from importlib import resources

from pipeline import storage
from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, image_files, label_of


@cache
def sun397_splits() -> dict[str, list[str]]:
    """{TFDS split: keys}. TFDS drew its splits at random; no rule reproduces them,
    so a file of this package lists them."""
    packed = resources.files(__package__).joinpath("sun397_splits.txt.xz").read_bytes()
    keys: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for line in lzma.decompress(packed).decode().splitlines():  # class, then the names of each split
        folder, *names = line.split("\t")
        for split, listed in zip(keys, names, strict=True):
            keys[split] += [f"{folder}/sun_{name}.jpg" for name in listed.split()]
    return keys


CLASSES = sorted({key.rpartition("/")[0] for key in sun397_splits()["train"]})  # "/a/abbey", "/a/airplane_cabin", ...


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    """TFDS's lists next to the archive (sun397_tfds_{tr,va,te}.txt), if present, override the lists of this package."""
    found = files["SUN397.tar.gz"]
    splits = dict(sun397_splits())
    folder = found.uri.rpartition("/")[0]
    for split, short in (("train", "tr"), ("validation", "va"), ("test", "te")):
        own = storage.join(folder, f"sun397_tfds_{short}.txt")
        if storage.exists(own):
            splits[split] = storage.read_bytes(own).decode().split()
    return [
        Listing(
            split=split,
            file=image_files(found),
            keys=keys,
            members=[f"SUN397{key}" for key in keys],
            labels={"sun397": [label_of(CLASSES, key.rpartition("/")[0], key) for key in keys]},
        )
        for split, keys in splits.items()
    ]


DATASET = DataSet(
    name="sun397",
    files=(
        OfficialFile(
            name="SUN397.tar.gz",
            bytes=39_077_296_924,
            sha256="f404130965a7ad77bed5ececc71e720ab50f3cc1e1bb257257610d38f3b928ec",
            url="https://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
            instead=("SUN397",),
        ),
    ),
    classes={"sun397": CLASSES},
    index=index,
)
