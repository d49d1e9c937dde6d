"""dSprites: one white shape on black, 64 x 64, at every combination of scale, orientation and position.

Two tasks: the position along x, and the orientation, in 16 bins each.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from pipeline import storage
from pipeline.vtab.containers import damaged, expect_array, open_h5, png
from pipeline.vtab.datasets.base import ArchiveFile, DataSet, FoundFile, Listing, Member, OfficialFile

BLOCK = (
    4096  # rows read at once; the file is compressed in chunks, which reading single rows would decompress repeatedly
)


def dsprites_label(value: int, original_classes: int) -> int:
    """One of 16 bins for one of 32 positions or 40 orientations."""
    return int(value // (original_classes / 16))


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    """Columns of the latent classes: colour, shape, scale, orientation (40), x (32), y (32)."""
    (found,) = files.values()
    uri = found.uri
    with damaged(uri):
        if uri.endswith(".npz"):
            with storage.open_file(uri) as stream, np.load(stream, allow_pickle=False) as arrays:
                latents = arrays["latents_classes"]
        else:
            with open_h5(uri) as h5:
                latents = h5["latents/classes"][:]
    numbers = range(len(latents))
    labels = {
        "dsprites_location": (latents[:, 4] // 2).astype(int),
        "dsprites_orientation": np.array([dsprites_label(o, 40) for o in range(40)])[latents[:, 3]],
    }
    file = ArchiveFile(uri=uri, read=read, random_access=not uri.endswith(".npz"))
    return [Listing(split="train", file=file, keys=numbers, members=numbers, labels=labels)]


def read(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """Binary images as grey values 0 and 255, in row order."""
    wanted = np.sort(np.array(members, np.int64))
    with damaged(file.uri):
        for first, block in _blocks(file.uri):
            low, high = np.searchsorted(wanted, [first, first + BLOCK])
            if low < high:
                rows = block()
                for i in wanted[low:high].tolist():
                    yield i, png(rows[i - first] * np.uint8(255))


def _blocks(uri: str) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """Yields (first row, function that reads the rows) for blocks of BLOCK rows, in order."""
    if not uri.endswith(".npz"):
        with open_h5(uri) as h5:
            images = h5["imgs"]
            expect_array(images, uri, "imgs", (None, 64, 64))
            for first in range(0, len(images), BLOCK):
                yield first, lambda first=first: images[first : first + BLOCK]  # type: ignore[misc]
        return
    with storage.open_file(uri) as file, zipfile.ZipFile(file) as archive, archive.open("imgs.npy") as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        expect_array(np.broadcast_to(np.zeros((), dtype), shape), uri, "imgs", (None, 64, 64))
        rows, height, width = shape
        for first in range(0, rows, BLOCK):
            count = min(BLOCK, rows - first)
            block = np.frombuffer(stream.read(count * height * width), np.uint8).reshape(count, height, width)
            yield first, lambda block=block: block  # type: ignore[misc]


DATASET = DataSet(
    name="dsprites",
    files=(
        OfficialFile(
            name="dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5",
            bytes=28_024_106,
            sha256="729fa22e884c9c500e1f17415d580746b4c5894fbbb780a1319bbcfa39a745bb",
            url="https://github.com/deepmind/dsprites-dataset/blob/master/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.hdf5?raw=true",
            instead=("dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",),
        ),
    ),
    classes={
        "dsprites_location": [f"x {2 * bin}-{2 * bin + 1}" for bin in range(16)],
        "dsprites_orientation": [f"orientation bin {bin}" for bin in range(16)],
    },
    index=index,
)
