"""smallNORB: stereo pairs of toys. Two tasks: the azimuth (18 steps of 20 degrees) and the elevation (9 steps of 5 degrees).

NORB's own matrix format: magic number (element type), number of dimensions, at least three sizes, the elements.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from pipeline.errors import UserError, plural
from pipeline.vtab.containers import MAX_MEMBER_BYTES, png, unzipped
from pipeline.vtab.datasets.base import ArchiveFile, DataSet, FoundFile, Listing, Member, OfficialFile

ELEMENT_TYPES: dict[int, np.dtype[Any]] = {0x1E3D4C54: np.dtype("<i4"), 0x1E3D4C55: np.dtype("u1")}  # by magic number
NAMES = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training-{}.mat.gz",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing-{}.mat.gz",
}


def index(files: Mapping[str, FoundFile]) -> list[Listing]:
    """Columns of the info matrix: instance, elevation (0-8), azimuth (0-34 in steps of 2), lighting."""
    listings = []
    for split, name in NAMES.items():
        uri = files[name.format("info")].uri
        with unzipped(uri) as stream:
            dtype, shape = _read_header(stream, uri)
            if len(shape) != 2 or shape[1] != 4 or dtype != "<i4":
                raise UserError(f"{uri}: {shape} {dtype}, not the info matrix of smallNORB")
            size = shape[0] * 4 * dtype.itemsize
            data = stream.read(min(size, MAX_MEMBER_BYTES))
        if len(data) < size:
            raise UserError(f"{uri}: truncated: {len(data):,} bytes for {plural(shape[0], 'row')}; fetch it again")
        info = np.frombuffer(data, dtype).reshape(shape)
        numbers = range(len(info))
        listings.append(
            Listing(
                split=split,
                file=ArchiveFile(uri=files[name.format("dat")].uri, read=read),
                keys=numbers,
                members=numbers,
                labels={"smallnorb_azimuth": info[:, 2] // 2, "smallnorb_elevation": info[:, 1]},
            )
        )
    return listings


def read(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """The left picture of each stereo pair, grey, in row order."""
    wanted = set(members)
    with unzipped(file.uri) as stream:
        dtype, (rows, *shape) = _read_header(stream, file.uri)
        if shape != [2, 96, 96] or dtype != np.uint8:
            raise UserError(f"{file.uri}: pictures of {shape} {dtype}, not 96 x 96 pairs; not the official file")
        for i in range(rows):
            pair = stream.read(2 * 96 * 96)
            if len(pair) < 2 * 96 * 96:
                raise UserError(f"{file.uri}: truncated at image {i:,} of {rows:,}")
            if i in wanted:
                yield i, png(np.frombuffer(pair, np.uint8, 96 * 96).reshape(96, 96))


def _read_header(stream: IO[bytes], uri: str) -> tuple[np.dtype[Any], list[int]]:
    """Reads (element type, shape) of a matrix; the stream is then at the first element."""
    head = stream.read(8)
    magic, dimensions = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
    if magic not in ELEMENT_TYPES or not 1 <= dimensions <= 4:
        raise UserError(f"{uri}: truncated, or not a NORB matrix")
    sizes = struct.unpack(f"<{max(3, dimensions)}I", stream.read(4 * max(3, dimensions)))
    return ELEMENT_TYPES[magic], list(sizes[:dimensions])


DATASET = DataSet(
    name="smallnorb",
    files=(
        OfficialFile(
            name="smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat.gz",
            bytes=130_799_817,
            sha256="cf7104eed3e51174d2f65b66d1e5878b9da233b886f161b0d88f4510ba2c7474",
            url="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat.gz",
            instead=("smallnorb-5x01235x9x18x6x2x96x96-testing-dat.mat",),
        ),
        OfficialFile(
            name="smallnorb-5x01235x9x18x6x2x96x96-testing-info.mat.gz",
            bytes=10_428,
            sha256="16adf314226327ee006d1a44db8cfef52773c06c829951d5653a9f6f310248a2",
            url="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/smallnorb-5x01235x9x18x6x2x96x96-testing-info.mat.gz",
            instead=("smallnorb-5x01235x9x18x6x2x96x96-testing-info.mat",),
        ),
        OfficialFile(
            name="smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz",
            bytes=131_896_188,
            sha256="5ffd6272a07d32695ee1082a26a41a93a37aab8c28da047f8c34ed348d214873",
            url="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz",
            instead=("smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat",),
        ),
        OfficialFile(
            name="smallnorb-5x46789x9x18x6x2x96x96-training-info.mat.gz",
            bytes=71_052,
            sha256="de7eb932ebe7a4ee16217fead60660d0eb3d23632c2f4d1c51f88c501c17bf32",
            url="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/smallnorb-5x46789x9x18x6x2x96x96-training-info.mat.gz",
            instead=("smallnorb-5x46789x9x18x6x2x96x96-training-info.mat",),
        ),
    ),
    classes={
        "smallnorb_azimuth": [f"{20 * step} degrees" for step in range(18)],
        "smallnorb_elevation": [f"{30 + 5 * step} degrees" for step in range(9)],
    },
    index=index,
)
