"""SVHN: house numbers from street photographs, format 2: 32 x 32 cropped
digits. The extra images are not part of the task."""

from collections.abc import Iterator, Mapping, Sequence

from pipeline.vtab.containers import expect_array, png, read_mat
from pipeline.vtab.datasets.base import ArchiveFile, DataSet, FoundFile, Listing, Member, OfficialFile


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    listings = []
    for split in ("train", "test"):
        uri = files[f"{split}_32x32.mat"].uri
        labels = read_mat(uri, "y").ravel().astype(int) % 10  # 10 stands for the digit 0
        numbers = range(len(labels))
        file = ArchiveFile(uri=uri, read=read)
        listings.append(Listing(split=split, file=file, keys=numbers, members=numbers, labels={"svhn": labels}))
    return listings


def read(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    images_HWCN = read_mat(file.uri, "X")
    expect_array(images_HWCN, file.uri, "X", (32, 32, 3, None))
    for i in members:
        yield i, png(images_HWCN[:, :, :, int(i)])


DATASET = DataSet(
    name="svhn_cropped",
    files=(
        OfficialFile(
            name="test_32x32.mat",
            bytes=64_275_384,
            sha256="cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            url="http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
        ),
        OfficialFile(
            name="train_32x32.mat",
            bytes=182_040_794,
            sha256="435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            url="http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        ),
    ),
    classes={"svhn": [str(digit) for digit in range(10)]},
    index=index,
)
