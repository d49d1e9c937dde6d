"""Oxford-IIIT Pet: photographs of 37 breeds of cats and dogs."""

from collections.abc import Mapping

from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, image_files

CLASSES = [
    "Abyssinian", "american_bulldog", "american_pit_bull_terrier", "basset_hound", "beagle", "Bengal", "Birman",
    "Bombay", "boxer", "British_Shorthair", "chihuahua", "Egyptian_Mau", "english_cocker_spaniel", "english_setter",
    "german_shorthaired", "great_pyrenees", "havanese", "japanese_chin", "keeshond", "leonberger", "Maine_Coon",
    "miniature_pinscher", "newfoundland", "Persian", "pomeranian", "pug", "Ragdoll", "Russian_Blue", "saint_bernard",
    "samoyed", "scottish_terrier", "shiba_inu", "Siamese", "Sphynx", "staffordshire_bull_terrier", "wheaten_terrier",
    "yorkshire_terrier",
]  # fmt: skip


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    listings = []
    lists = files["annotations.tar.gz"].tree.texts("annotations/trainval.txt", "annotations/test.txt")
    for split, text in zip(("train", "test"), lists, strict=True):
        rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        keys = [f"{row[0]}.jpg" for row in rows]  # columns: name, class from 1, species, breed within species
        listings.append(
            Listing(
                split=split,
                file=image_files(files["images.tar.gz"]),
                keys=keys,
                members=[f"images/{key}" for key in keys],
                labels={"pets": [int(row[1]) - 1 for row in rows]},
            )
        )
    return listings


DATASET = DataSet(
    name="oxford_iiit_pet",
    files=(
        OfficialFile(
            name="annotations.tar.gz",
            bytes=37_969_920,
            sha256="8568ffea346d0b62181808f9fe45d00d214e43a45cd9a28c55664a690bd4eb76",
            url="http://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz",
            instead=("annotations",),
        ),
        OfficialFile(
            name="images.tar.gz",
            bytes=802_191_360,
            sha256="5a13461893eb1873fa8ccf2ed6b6245af14fb3913c8686da1626c108c8522eea",
            url="http://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
            instead=("images",),
        ),
    ),
    classes={"pets": CLASSES},
    index=index,
)
