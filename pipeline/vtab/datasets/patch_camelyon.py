"""PatchCamelyon: 96 x 96 patches of lymph node sections, with or without tumour tissue in the centre. HDF5 arrays."""

from collections.abc import Iterator, Mapping, Sequence

from pipeline.vtab.containers import expect_array, open_h5, png
from pipeline.vtab.datasets.base import ArchiveFile, DataSet, FoundFile, Listing, Member, OfficialFile


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    listings = []
    for split, short in (("train", "train"), ("validation", "valid"), ("test", "test")):
        pixels, targets = (files[f"camelyonpatch_level_2_split_{short}_{axis}.h5.gz"].uri for axis in "xy")
        with open_h5(targets) as h5:
            labels = h5["y"][:].ravel().astype(int)
        listings.append(
            Listing(
                split=split,
                file=ArchiveFile(uri=pixels, read=read, random_access=pixels.endswith(".h5")),
                keys=[f"{short}_{i}" for i in range(len(labels))],
                members=range(len(labels)),
                labels={"patch_camelyon": labels},
            )
        )
    return listings


def read(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    with open_h5(file.uri) as h5:
        images_NHWC = h5["x"]
        expect_array(images_NHWC, file.uri, "x", (None, 96, 96, 3))
        for i in members:
            yield i, png(images_NHWC[int(i)])


DATASET = DataSet(
    name="patch_camelyon",
    files=(
        OfficialFile(
            name="camelyonpatch_level_2_split_test_x.h5.gz",
            bytes=800_875_929,
            sha256="79174c2201ad521602a5888be8f36ee10875f37403dd3f2086caf2182ef87245",
            url="https://zenodo.org/record/2546921/files/camelyonpatch_level_2_split_test_x.h5.gz",
            instead=("camelyonpatch_level_2_split_test_x.h5",),
        ),
        OfficialFile(
            name="camelyonpatch_level_2_split_test_y.h5.gz",
            bytes=3_040,
            sha256="0a522005fccc8bbd04c5a117bfaf81d8da2676f03a29d7499f71d0a0bd6068ef",
            url="https://zenodo.org/record/2546921/files/camelyonpatch_level_2_split_test_y.h5.gz",
            instead=("camelyonpatch_level_2_split_test_y.h5",),
        ),
        OfficialFile(
            name="camelyonpatch_level_2_split_train_x.h5.gz",
            bytes=6_421_353_462,
            sha256="d619e741468a7ab35c7e4a75e6821b7e7e6c9411705d45708f2a0efc8960656c",
            url="https://zenodo.org/record/2546921/files/camelyonpatch_level_2_split_train_x.h5.gz",
            instead=("camelyonpatch_level_2_split_train_x.h5",),
        ),
        OfficialFile(
            name="camelyonpatch_level_2_split_train_y.h5.gz",
            bytes=21_378,
            sha256="b74126d2c01b20d3661f9b46765d29cf4e4fba6faba29c8e0d09d406331ab75a",
            url="https://zenodo.org/record/2546921/files/camelyonpatch_level_2_split_train_y.h5.gz",
            instead=("camelyonpatch_level_2_split_train_y.h5",),
        ),
        OfficialFile(
            name="camelyonpatch_level_2_split_valid_x.h5.gz",
            bytes=805_965_320,
            sha256="f82ee1670d027b4ec388048d9eabc2186b77c009655dae76d624c0ecb053ccb2",
            url="https://zenodo.org/record/2546921/files/camelyonpatch_level_2_split_valid_x.h5.gz",
            instead=("camelyonpatch_level_2_split_valid_x.h5",),
        ),
        OfficialFile(
            name="camelyonpatch_level_2_split_valid_y.h5.gz",
            bytes=3_038,
            sha256="ce1ae30f08feb468447971cfd0472e7becd0ad96d877c64120c72571439ae48c",
            url="https://zenodo.org/record/2546921/files/camelyonpatch_level_2_split_valid_y.h5.gz",
            instead=("camelyonpatch_level_2_split_valid_y.h5",),
        ),
    ),
    classes={"patch_camelyon": ["no tumour", "tumour"]},
    index=index,
)
