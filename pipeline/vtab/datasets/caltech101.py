"""Caltech101: pictures of 101 kinds of objects and of background, one folder per class."""

from collections.abc import Mapping

import numpy as np

from pipeline.errors import UserError, plural
from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, image_files

TRAIN_PER_CLASS = 30

CLASSES = [
    "accordion", "airplanes", "anchor", "ant", "background_google", "barrel", "bass", "beaver", "binocular", "bonsai",
    "brain", "brontosaurus", "buddha", "butterfly", "camera", "cannon", "car_side", "ceiling_fan", "cellphone",
    "chair", "chandelier", "cougar_body", "cougar_face", "crab", "crayfish", "crocodile", "crocodile_head", "cup",
    "dalmatian", "dollar_bill", "dolphin", "dragonfly", "electric_guitar", "elephant", "emu", "euphonium", "ewer",
    "faces", "faces_easy", "ferry", "flamingo", "flamingo_head", "garfield", "gerenuk", "gramophone", "grand_piano",
    "hawksbill", "headphone", "hedgehog", "helicopter", "ibis", "inline_skate", "joshua_tree", "kangaroo", "ketch",
    "lamp", "laptop", "leopards", "llama", "lobster", "lotus", "mandolin", "mayfly", "menorah", "metronome",
    "minaret", "motorbikes", "nautilus", "octopus", "okapi", "pagoda", "panda", "pigeon", "pizza", "platypus",
    "pyramid", "revolver", "rhino", "rooster", "saxophone", "schooner", "scissors", "scorpion", "sea_horse", "snoopy",
    "soccer_ball", "stapler", "starfish", "stegosaurus", "stop_sign", "strawberry", "sunflower", "tick", "trilobite",
    "umbrella", "watch", "water_lilly", "wheelchair", "wild_cat", "windsor_chair", "wrench", "yin_yang",
]  # fmt: skip


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    """30 pictures of every class are for training, the others for testing. TFDS draws them with NumPy's seed 1234 in
    the order in which the file system lists the folders; here the order is sorted. To get the selection of TFDS,
    prepare from its TFRecords (pipeline/vtab/copies.py).
    """
    found = files["101_ObjectCategories.tar.gz"]
    folders: dict[str, list[str]] = {}
    for name in found.tree.names():
        *_, folder, file = ["", *name.split("/")]
        folders.setdefault(folder, []).append(file)
    generator = np.random.RandomState(1234)
    keys: dict[str, list[str]] = {"train": [], "test": []}
    for folder in sorted(folders):
        names = sorted(folders[folder])
        if folder.lower() not in CLASSES:
            continue
        if len(names) < TRAIN_PER_CLASS:
            raise UserError(f"{found.uri}: only {plural(len(names), 'file')} in {folder}, of which 30 are for training")
        train = set(generator.choice(names, TRAIN_PER_CLASS, replace=False).tolist())
        for file in names:
            if file.endswith(".jpg"):  # BACKGROUND_Google also has a file named tmp, which is included in the draw
                keys["train" if file in train else "test"].append(f"{folder}/{file}")
    images = image_files(found)
    return [
        Listing(
            split=split,
            file=images,
            keys=listed,
            members=[f"101_ObjectCategories/{key}" for key in listed],
            labels={"caltech101": [CLASSES.index(key.partition("/")[0].lower()) for key in listed]},
        )
        for split, listed in keys.items()
    ]


DATASET = DataSet(
    name="caltech101",
    files=(
        OfficialFile(
            name="101_ObjectCategories.tar.gz",
            bytes=131_740_031,
            sha256="af6ece2f339791ca20f855943d8b55dd60892c0a25105fcd631ee3d6430f9926",
            url="http://www.vision.caltech.edu/Image_Datasets/Caltech101/101_ObjectCategories.tar.gz",
            manual="caltech-101.zip of data.caltech.edu/records/mzrjq-6wc02, which contains it",
            instead=("101_ObjectCategories", "caltech-101/101_ObjectCategories.tar.gz"),
            within=("caltech-101.zip", "caltech-101/101_ObjectCategories.tar.gz"),
        ),
    ),
    classes={"caltech101": CLASSES},
    index=index,
)
