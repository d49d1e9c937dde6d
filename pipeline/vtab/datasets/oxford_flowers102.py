"""Oxford Flowers-102: photographs of 102 kinds of flowers, labels and splits in MATLAB files."""

from collections.abc import Mapping

from pipeline.vtab.containers import read_mat
from pipeline.vtab.datasets.base import DataSet, FoundFile, Listing, OfficialFile, image_files

CLASSES = [
    "pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily",
    "moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea",
    "spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower",
    "giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth",
    "corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation",
    "garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower",
    "great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia",
    "bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia",
    "wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium", "orange dahlia",
    "pink-yellow dahlia", "cautleya spicata", "japanese anemone", "black-eyed susan", "silverbush",
    "californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower", "tree poppy", "gazania",
    "azalea", "water lily", "rose", "thorn apple", "morning glory", "passion flower", "lotus", "toad lily",
    "anthurium", "frangipani", "clematis", "hibiscus", "columbine", "desert-rose", "tree mallow", "magnolia",
    "cyclamen", "watercress", "canna lily", "hippeastrum", "bee balm", "ball moss", "foxglove", "bougainvillea",
    "camellia", "mallow", "mexican petunia", "bromelia", "blanket flower", "trumpet creeper", "blackberry lily",
]  # fmt: skip


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    labels = read_mat(files["imagelabels.mat"].uri, "labels").ravel().astype(int) - 1
    listings = []
    for split, field in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        ids = read_mat(files["setid.mat"].uri, field).ravel().astype(int)  # counted from 1
        keys = [f"image_{i:05d}.jpg" for i in ids]
        listings.append(
            Listing(
                split=split,
                file=image_files(files["102flowers.tgz"]),
                keys=keys,
                members=[f"jpg/{key}" for key in keys],
                labels={"flowers102": labels[ids - 1]},
            )
        )
    return listings


DATASET = DataSet(
    name="oxford_flowers102",
    files=(
        OfficialFile(
            name="102flowers.tgz",
            bytes=353_105_920,
            sha256="ab4f0aa80bcf087a6841e317568ad8858fe121e7f60c4354d20c6be0869d03cc",
            url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz",
            instead=("jpg",),
        ),
        OfficialFile(
            name="imagelabels.mat",
            bytes=502,
            sha256="4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d",
            url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/imagelabels.mat",
        ),
        OfficialFile(
            name="setid.mat",
            bytes=14_989,
            sha256="46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd",
            url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/setid.mat",
        ),
    ),
    classes={"flowers102": CLASSES},
    index=index,
)
