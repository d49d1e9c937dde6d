"""DTD, Describable Textures: pictures of 47 textures; the first of the ten official folds."""

from collections.abc import Mapping

from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, image_files, label_of

CLASSES = [
    "banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed", "cracked", "crosshatched",
    "crystalline", "dotted", "fibrous", "flecked", "freckled", "frilly", "gauzy", "grid", "grooved", "honeycombed",
    "interlaced", "knitted", "lacelike", "lined", "marbled", "matted", "meshed", "paisley", "perforated", "pitted",
    "pleated", "polka-dotted", "porous", "potholed", "scaly", "smeared", "spiralled", "sprinkled", "stained",
    "stratified", "striped", "studded", "swirly", "veined", "waffled", "woven", "wrinkled", "zigzagged",
]  # fmt: skip


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    found = files["dtd-r1.0.1.tar.gz"]
    listings = []
    lists = found.tree.texts("dtd/labels/train1.txt", "dtd/labels/val1.txt", "dtd/labels/test1.txt")
    for split, text in zip(("train", "validation", "test"), lists, strict=True):
        keys = text.split()
        listings.append(
            Listing(
                split=split,
                file=image_files(found),
                keys=keys,
                members=[f"dtd/images/{key}" for key in keys],
                labels={"dtd": [label_of(CLASSES, key.partition("/")[0], f"{found.uri}: {key}") for key in keys]},
            )
        )
    return listings


DATASET = DataSet(
    name="dtd",
    files=(
        OfficialFile(
            name="dtd-r1.0.1.tar.gz",
            bytes=637_880_320,
            sha256="6b2c060a070cc7e13042807a00294af51a75b4b89f82d480219da22002e79ce0",
            url="https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
            instead=("dtd",),
        ),
    ),
    classes={"dtd": CLASSES},
    index=index,
)
