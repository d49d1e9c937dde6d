"""NWPU-RESISC45: 256 x 256 aerial pictures of 45 kinds of scenes, one folder per class."""

from collections.abc import Mapping

from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, list_class_folders

CLASSES = [
    "airplane", "airport", "baseball_diamond", "basketball_court", "beach", "bridge", "chaparral", "church",
    "circular_farmland", "cloud", "commercial_area", "dense_residential", "desert", "forest", "freeway",
    "golf_course", "ground_track_field", "harbor", "industrial_area", "intersection", "island", "lake", "meadow",
    "medium_residential", "mobile_home_park", "mountain", "overpass", "palace", "parking_lot", "railway",
    "railway_station", "rectangular_farmland", "river", "roundabout", "runway", "sea_ice", "ship", "snowberg",
    "sparse_residential", "stadium", "storage_tank", "tennis_court", "terrace", "thermal_power_station", "wetland",
]  # fmt: skip


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    return list_class_folders(files["NWPU-RESISC45"], "resisc45", CLASSES, lambda folder, file: folder)


DATASET = DataSet(
    name="resisc45",
    files=(
        OfficialFile(
            name="NWPU-RESISC45",
            manual="NWPU-RESISC45.rar from 1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs (OneDrive): unpack it, 45 folders of 700 JPEGs",
            instead=("NWPU-RESISC45.zip",),
        ),
    ),
    classes={"resisc45": CLASSES},
    index=index,
)
