"""EuroSAT: 64 x 64 satellite pictures of ten kinds of land, in colour (RGB)."""

from collections.abc import Mapping

from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, list_class_folders

CLASSES = [
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
    "Residential", "River", "SeaLake",
]  # fmt: skip


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    """2750/<class>/<class>_<number>.jpg (EuroSAT_RGB/... in Zenodo's copy). As in
    TFDS, the file name determines the class."""
    return list_class_folders(files["EuroSAT.zip"], "eurosat", CLASSES, lambda folder, file: file.partition("_")[0])


DATASET = DataSet(
    name="eurosat",
    files=(
        OfficialFile(
            name="EuroSAT.zip",
            bytes=94_280_567,
            sha256="8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd",
            url="http://madm.dfki.de/files/sentinel/EuroSAT.zip",
            manual="EuroSAT_RGB.zip of zenodo.org/records/7711810",
            instead=("2750", "EuroSAT_RGB.zip", "EuroSAT_RGB"),
        ),
    ),
    classes={"eurosat": CLASSES},
    index=index,
)
