"""CIFAR-10 and CIFAR-100 as published, in the binary or the Python version (Krizhevsky 2009).

Binary: records of one label byte (CIFAR-100: coarse, then fine) and 3072 bytes. Python: a pickle of a dict with `data`, uint8
(N, 3072), and `labels` or `fine_labels`. In both versions the 3072 bytes of an image are its red, green and blue planes
of 32x32.
"""

import io
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives, items
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.items import FRAGMENTS, Item, ScanOptions, Source
from pipeline.data.sources.listing import address_of
from pipeline.errors import UserError, plural
from pipeline.tarheaders import BoundedTarInfo

NAME = "cifar"
ARCHIVE = re.compile(r"cifar-100?-(binary|python)\.(tar|tar\.gz|tgz)$")
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error)  # what reading a damaged archive raises

PIXELS = 3 * 32 * 32
MAX_BATCH_BYTES = 256 << 20  # the largest published batch, CIFAR-100's for Python, has 155 MB
CIFAR10_PARTS = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
CIFAR100_PARTS = ("train", "test")
PARTS = frozenset(CIFAR10_PARTS + CIFAR100_PARTS)
META = frozenset({"batches.meta", "meta", "batches.meta.txt", "fine_label_names.txt"})  # files of class names


def class_names(members: Iterable[tuple[str, bytes]]) -> list[str]:
    """Class names in index order, from the members (name, content) of an archive;
    numbers if the archive does not list names."""
    names: list[str] = []
    count = 100
    for member, data in members:
        if member.removesuffix(".bin") in CIFAR10_PARTS:
            count = 10
        if member in ("batches.meta.txt", "fine_label_names.txt"):
            names = data.decode().split()
        elif member in ("batches.meta", "meta"):
            table = unpickle(data)
            found = table.get("label_names") or table.get("fine_label_names") or []
            names = [text(name) for name in found]
    return names or [str(i) for i in range(count)]


def parse(member: str, data: bytes) -> tuple[np.ndarray, list[int], int]:
    """(uint8 images (N, 32, 32, 3), labels, number of bytes left over) of one part.
    Raises ValueError for other data."""
    if member.endswith(".bin"):
        skip = 1 if member.removesuffix(".bin") in CIFAR10_PARTS else 2
        whole = len(data) // (skip + PIXELS)
        records = np.frombuffer(data, np.uint8, whole * (skip + PIXELS)).reshape(whole, skip + PIXELS)
        rows, labels, left_over = records[:, skip:], records[:, skip - 1].tolist(), len(data) % (skip + PIXELS)
    else:
        table, left_over = unpickle(data), 0
        rows, labels = table.get("data"), table.get("labels", table.get("fine_labels"))  # type: ignore[assignment]
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != PIXELS:
            raise ValueError(f"{member}: no data of {PIXELS} bytes a row")
        if not isinstance(labels, list) or len(labels) != len(rows) or not all(type(k) is int for k in labels):
            raise ValueError(f"{member}: no list of {plural(len(rows), 'label')}")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, left_over


def unpickle(data: bytes) -> dict[str, Any]:
    """A pickled dict of text, numbers, lists and uint8 arrays, with keys as text. Raises ValueError for anything else.

    Unpickling can run arbitrary code. This unpickler allows only the names that numpy arrays and bytes need and maps
    them to the two inert classes below, so no code from the archive runs.
    """
    try:
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except ValueError:
        raise
    except Exception as error:  # a damaged stream can raise almost any exception
        raise ValueError(f"not a pickle of CIFAR ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"not a pickle of CIFAR ({type(value).__name__})")
    return {text(key): item.array() if isinstance(item, _Array) else item for key, item in value.items()}


def text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _Dtype:
    """Replaces numpy.dtype and accepts only uint8."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if text(kind) != "u1":
            raise ValueError(f"an array of {text(kind)}, not of bytes")

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Replaces numpy.ndarray. Its pickled state is (version, shape, dtype, whether in column order, bytes)."""

    shape: tuple[int, ...]
    content: bytes

    def __setstate__(self, state: Any) -> None:
        _, self.shape, _, columns, self.content = state
        if columns or not isinstance(self.content, bytes):
            raise ValueError("an array in column order, or not of bytes")

    def array(self) -> np.ndarray:
        return np.frombuffer(self.content, np.uint8).reshape(self.shape)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("_codecs", "encode"): _latin1,  # how a newer Python writes the bytes of an old pickle
        }
        try:
            return known[module, name]
        except KeyError:
            raise ValueError(f"the pickle refers to {module}.{name}, which no CIFAR archive needs") from None


def _latin1(value: str, encoding: Any) -> bytes:
    if text(encoding) != "latin1":
        raise ValueError(f"bytes encoded as {text(encoding)}")
    return value.encode("latin1")


# ---------------------------------------------------------------- a source of images


def matches(path: str) -> bool:
    """Whether a path is a published archive or a file of one."""
    return bool(ARCHIVE.search(path)) or part_of(path) is not None


def part_of(path: str) -> str | None:
    """The name of the part that an unpacked file holds: data_batch_1 or test_batch; train or test for CIFAR-100."""
    name = path.rpartition("/")[2]
    return name.removesuffix(".bin") if name.removesuffix(".bin") in PARTS else None


def split_of_part(part: str) -> str:
    return "test" if part in ("test", "test_batch") else "train"


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    """Each archive, or each part of an unpacked archive, is one fragment. Raises UserError for a damaged archive, and
    for a folder that mixes the two data sets or the two versions."""
    paths = files["path"].to_pylist()
    unpacked = [path for path in paths if part_of(path)]
    if not unpacked:
        return archives.scan_archives(
            NAME, uri, files, options, lambda path: path.lower().endswith((".tar", "gz")), scan_file
        )
    folders = {path.rpartition("/")[0] for path in unpacked}
    if len(folders) > 1 or {path.endswith(".bin") for path in unpacked} == {True, False}:
        raise UserError(
            f"{uri}: holds several versions of CIFAR ({', '.join(sorted(folders))}); name one with --source"
        )
    folder = folders.pop()
    beside = [path for path in paths if path.rpartition("/")[0] == folder]
    meta = [path for path in beside if path.rpartition("/")[2] in META]
    try:
        members = [(path.rpartition("/")[2], storage.read_bytes(address_of(uri, path))) for path in meta]
        names = tuple(class_names([*members, *((path.rpartition("/")[2], b"") for path in unpacked)]))
    except ValueError as error:
        raise UserError(f"{uri}: not CIFAR, or damaged ({error}); fetch it again") from error
    files = files.filter(pa.array([path in set(unpacked) for path in paths], pa.bool_()))
    splits = [split_of_part(part_of(path) or "") for path in files["path"].to_pylist()]
    return Source(
        uri=uri,
        kind=NAME,
        prefix=options.prefix,
        fragments=items.fragments_of_files(
            files, pa.nulls(files.num_rows, FRAGMENTS.field("labels").type), pa.array(splits, pa.string())
        ),
        names=frozenset(names),
        ordered_names=names,
        splits=tuple(sorted(set(splits))),
    )


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    parts: set[str] = set()

    def members() -> Iterator[tuple[str, bytes]]:
        for member, data in _members(uri):
            if (part := member.removesuffix(".bin")) in PARTS:
                parts.add(part)
            yield member, data

    try:
        names = class_names(members())
    except (*DAMAGE, ValueError) as error:
        raise UserError(f"{uri}: not an archive of CIFAR, or damaged ({error}); fetch it again") from error
    return FileScan(
        fragments=archives.whole_file(path, size),
        names=names,
        ordered_names=tuple(names),
        splits=set(map(split_of_part, parts)),
    )


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(source, fragments, lambda uri, name, *_: _read_file(uri, name))


def _members(uri: str) -> Iterator[tuple[str, bytes]]:
    """(base name, content) of the members of an archive, or of one unpacked part."""
    if part_of(uri):
        with storage.open_file(uri) as file:
            yield uri.rpartition("/")[2], file.read(MAX_BATCH_BYTES)
        return
    with storage.open_file(uri) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=BoundedTarInfo) as archive:
        for member in archive:
            if member.isfile():
                handle = archive.extractfile(member)
                yield os.path.basename(member.name), handle.read(MAX_BATCH_BYTES) if handle else b""
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen


def _read_file(uri: str, name: str) -> Iterator[Item]:
    try:
        for member, data in _members(uri):
            part, where = member.removesuffix(".bin"), f"{name}/{member}"
            if part not in PARTS:
                continue
            split = split_of_part(part)
            try:
                pixels_NHWC, labels, left_over = parse(member, data)
            except ValueError as error:
                yield Item(part, where, b"", None, Refused("corrupt", str(error)), split)
                continue
            if left_over:
                detail = f"{left_over} bytes after the last whole record"
                yield Item(part, where, b"", None, Refused("truncated", detail), split)
            for i, (pixels, label) in enumerate(zip(pixels_NHWC, labels, strict=True)):
                yield Item(f"{part}/{i:05d}", where, np.ascontiguousarray(pixels), [str(label)], split=split)
    except DAMAGE as error:
        yield Item(name, uri, b"", None, Refused("unreadable", f"the archive is truncated: {error}"))
