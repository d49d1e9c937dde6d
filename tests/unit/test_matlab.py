"""MATLAB files and ImageNet's devkit: whatever is in them, one line names the file and this process goes on."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from scipy.io import savemat

from pipeline import matlab
from pipeline.data.sources import cifar
from pipeline.data.sources.devkit import read_devkit
from pipeline.data.sources.items import ScanOptions
from pipeline.errors import UserError
from pipeline.vtab.containers import Tree, read_mat

NAME = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def meta() -> bytes:
    """The table of the classes: their numbers and WordNet ids."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(1, "n02119789", "fox"), (2, "n01440764", "tench"), (3, "n99999999", "inner")], fields)
    sink = io.BytesIO()
    savemat(sink, {"synsets": synsets[:, None]})
    return sink.getvalue()


def devkit(tmp_path, meta: bytes, truth: bytes = b"2\n1\n") -> str:
    with tarfile.open(tmp_path / NAME, "w:gz") as archive:
        for name, data in ((TRUTH, truth), ("meta.mat", meta)):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(tmp_path / NAME)


def changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def bomb(size: int) -> bytes:
    """A MATLAB file with a variable X of `size` zeros, compressed."""
    sink = io.BytesIO()
    savemat(sink, {"X": np.zeros((16, 1), np.uint8)})
    body = bytearray(sink.getvalue()[128:-16])  # without the 16 numbers
    body[4:8] = struct.pack("<I", len(body) - 8 + size)
    body[32:36] = body[-4:] = struct.pack("<I", size)  # the rows, and the bytes of the numbers
    packer = zlib.compressobj()
    packed = packer.compress(bytes(body)) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20))
    packed += packer.flush()
    return sink.getvalue()[:128] + struct.pack("<II", 15, len(packed)) + packed


def test_the_devkit_gives_the_labels(tmp_path):
    assert read_devkit(devkit(tmp_path, meta())) == {
        "ILSVRC2012_val_00000001.JPEG": ["n01440764"],
        "ILSVRC2012_val_00000002.JPEG": ["n02119789"],
    }


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"", "truncated"),
        (bytes(1000), "corrupt"),
        (changed(meta(), 552, 148), ""),  # SciPy 1.17 ends with SIGSEGV
        (changed(meta(), 213, 5), "no field of name"),
        (bytes(17 << 20), "17,825,792 bytes; not ImageNet's devkit"),
    ],
    ids=["empty", "zeros", "crash", "another field", "too large"],
)
def test_a_damaged_devkit_is_one_line(tmp_path, broken, message):
    with pytest.raises(UserError, match=rf"{NAME}: .*meta\.mat.*{message}") as caught:
        read_devkit(devkit(tmp_path, broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("truth", [b"9\n", b"x\n", b"1 1e400\n"])
def test_ground_truth_that_is_not_of_the_devkit(tmp_path, truth):
    with pytest.raises(UserError, match=f"{NAME}: not ImageNet's devkit"):
        read_devkit(devkit(tmp_path, meta(), truth))


def test_a_variable_that_unpacks_to_more_memory_than_allowed(tmp_path):
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(bomb(8 << 20))
    assert read_mat(str(path), "X").shape == (8 << 20, 1)
    path.write_bytes(bomb(300 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"train_32x32\.mat: .*unpacks to more memory than"):
        read_mat(str(path), "X")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(matlab, "MAX_FILE_BYTES", 100)
    (tmp_path / "a.mat").write_bytes(meta())
    with pytest.raises(UserError, match=r"a\.mat: more than 100 bytes"):
        read_mat(str(tmp_path / "a.mat"), "synsets")


def giant_attributes() -> dict[str, str]:
    return {"comment": "x" * (2 << 20)}


def giant_map() -> dict[str, str]:
    """A sparse member whose map, in its data, has as many places as it says."""
    return {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a", "GNU.sparse.realsize": "1"}


@pytest.mark.parametrize(("headers", "damage"), [(giant_attributes, ""), (giant_map, ""), (giant_map, "not a number")])
def test_headers_of_a_tar_are_read_in_bounded_memory(tmp_path, headers, damage):
    info = tarfile.TarInfo("meta.mat")
    info.pax_headers = headers()
    data = (damage or "900000000").encode() + b"\n" + b"1\n" * (1 << 20)
    info.size = len(data)
    path = tmp_path / NAME
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data))
    for read in (read_devkit, lambda uri: Tree(uri).names(), lambda uri: cifar.scan_file(uri, "", 1, ScanOptions())):
        with pytest.raises(UserError, match=rf"{NAME}: .*header"):
            read(str(path))
