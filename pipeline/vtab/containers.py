"""Reads members of the official archives in memory: folders, zip, tar, gzip, HDF5 and MATLAB files.

Nothing is extracted to disk, except an HDF5 file inside .gz, which needs random access. Damaged contents raise a
UserError that names the archive."""

import contextlib
import errno
import gzip
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import cv2
import numpy as np

from pipeline import storage
from pipeline.errors import UserError
from pipeline.libraries import import_library
from pipeline.matlab import read_variable
from pipeline.tarheaders import BoundedTarInfo

MAX_MEMBER_BYTES = 64 << 20  # maximum for an image, a label file or a matrix of labels
MAX_LARGE_BYTES = 256 << 20  # maximum for members with a complete split; CIFAR-100's rows have 154 MB
MAX_RATIO = 100  # maximum ratio of a large zip member to its compressed size; decompression bombs reach 1,000
MAX_UNPACKED = 16 << 30  # bytes; the largest official .h5 has 7.2 GB
CHUNK = 4 << 20

# Exceptions of parsers for unexpected content, which indicate a bad archive.
MALFORMED = (
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
    OverflowError,
    MemoryError,
    RecursionError,
    cv2.error,
)


@contextlib.contextmanager
def damaged(uri: str) -> Iterator[None]:
    """Converts exceptions of decompressors for damaged data to a UserError that names the archive."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError, OSError) as error:
        # With a damaged directory, zipfile seeks to an invalid position. Other system errors do not indicate a damaged
        # archive.
        archives_fault = errno.EINVAL, errno.EISDIR
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno not in archives_fault:
            raise
        raise UserError(f"{uri}: truncated or damaged ({error}); fetch it again") from error  # RuntimeError: encrypted


# ---------------------------------------------------------------- members


class Tree:
    """The members of a folder, a zip, or a tar (compressed or not), under the names that they have in the archive.

    prefix: prefix of the member names if the archive is unpacked. nested: the member of the zip `uri` that is the
    archive."""

    def __init__(self, uri: str, prefix: str = "", nested: str = "") -> None:
        self.uri, self.prefix, self.nested = uri, prefix, nested
        self._files = contextlib.ExitStack()  # kept open during the lifetime of this object
        name = (nested or uri).lower()
        self.kind = (
            "zip" if name.endswith(".zip") else "tar" if name.endswith((".tar", ".tgz", ".tar.gz")) else "folder"
        )

    @property
    def random_access(self) -> bool:
        """Whether members can be read individually without reading the others."""
        return self.kind != "tar"

    def names(self) -> list[str]:
        """All members in archive order (a folder: sorted)."""
        if self.kind == "folder":
            inside = f"{self.prefix}/" if self.prefix else ""
            return [inside + info.path for info in storage.list_files(self.uri) if not _is_litter(info.path)]
        if self.kind == "zip":
            with self._zip() as archive:
                return [
                    i.filename
                    for i in archive.infolist()
                    if i.filename and not i.is_dir() and not _is_litter(i.filename)
                ]
        return [name for name, _ in self.walk()]

    def walk(self, keep: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, IO[bytes]]]:
        """Yields (name, open file) of the members that `keep` accepts, in archive order.
        A file is closed at the next iteration."""
        if self.kind != "tar":
            for name in self.names():
                if keep(name):
                    with self._open(name) as member:
                        yield name, member
            return
        with damaged(self.uri), open_nested(self.uri, self.nested) as file:
            # Two of the official "tar.gz" are plain tar files. tarfile's decompression treats a truncated gzip stream
            # as the end of the archive; the gzip module raises an error.
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with (
                gzip.open(file) if compressed else contextlib.nullcontext(file) as stream,
                tarfile.open(fileobj=stream, mode="r|", tarinfo=BoundedTarInfo) as archive,  # type: ignore[arg-type]
            ):
                for info in archive:
                    name = info.name.removeprefix("./")
                    if info.isfile() and not _is_litter(name) and keep(name):
                        yield name, archive.extractfile(info)  # type: ignore[misc]

    def read(self, names: Iterable[str], limit: int | None = None) -> Iterator[tuple[str, bytes]]:
        """Yields (name, bytes) of the named members, in the order of `names`, or for a tar in archive order. Missing
        members are skipped. Raises UserError for a member of more than `limit` bytes (default: MAX_MEMBER_BYTES)."""
        limit = limit or MAX_MEMBER_BYTES
        if self.kind == "tar":
            wanted = set(names)
            for name, member in self.walk(wanted.__contains__):
                yield name, _read_member(member, f"{self.uri}: {name}", limit)
            return
        for name in names:
            with contextlib.suppress(KeyError, FileNotFoundError):
                with self._open(name) as member:
                    data = _read_member(member, f"{self.uri}: {name}", limit)
                yield name, data

    def texts(self, *names: str, limit: int | None = None) -> list[str]:
        """The contents of text members; `limit` as for `read`. Raises UserError if a member is missing."""
        contents = dict(self.read(names, limit))
        for name in names:
            if name not in contents:
                raise UserError(f"{self.uri}: {name} is missing; not the official archive")
        return [contents[name].decode() for name in names]

    def _zip(self) -> Any:
        # One open archive per Tree: the directory of CLEVR_v1.0.zip lists 100,000 members.
        if not hasattr(self, "_archive"):
            with damaged(self.uri):
                # members are read one by one: small blocks
                file = self._files.enter_context(storage.open_file(self.uri, block=1 << 20))
                self._archive = zipfile.ZipFile(file)
        return contextlib.nullcontext(self._archive)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self.kind == "zip":
            with self._zip() as archive, damaged(f"{self.uri}: {name}"), archive.open(name) as member:
                info = archive.getinfo(name)
                if info.file_size > max(1 << 20, MAX_RATIO * info.compress_size):
                    raise UserError(
                        f"{self.uri}: {name} unpacks from {info.compress_size:,} to {info.file_size:,} bytes; no file "
                        "of this data set is that large"
                    )
                yield member
        else:
            inside = name[len(self.prefix) + 1 :] if self.prefix else name
            if inside.startswith("/") or ".." in inside.split("/"):  # from an annotation
                raise FileNotFoundError(f"{name} is outside {self.uri}")
            with storage.open_file(storage.join(self.uri, inside)) as member:
                yield member


def _is_litter(name: str) -> bool:
    """Whether macOS added the file to a folder or archive: it may have the name of an image, but contains a resource
    fork."""
    *folders, file = name.split("/")
    return "__MACOSX" in folders or file.startswith("._") or file == ".DS_Store"


def _read_member(member: IO[bytes], where: str, limit: int) -> bytes:
    with damaged(where):
        data = member.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{where}: more than {limit:,} bytes; no file of this data set is that large")
    return data


# ---------------------------------------------------------------- single files


@contextlib.contextmanager
def open_nested(uri: str, member: str = "") -> Iterator[IO[bytes]]:
    """Opens a file, or with `member` that member of the zip `uri`. Raises UserError if the member is missing."""
    with storage.open_file(uri) as file:
        if not member:
            yield file
            return
        with damaged(uri), zipfile.ZipFile(file) as archive:
            try:
                stream = archive.open(member)
            except KeyError as error:
                raise UserError(f"{uri}: {member} is missing; not the official archive") from error
            with stream:
                yield stream


@contextlib.contextmanager
def unzipped(uri: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed if its name ends in .gz."""
    with storage.open_file(uri) as file, damaged(uri):
        if uri.endswith(".gz"):
            with gzip.open(file) as stream:
                yield stream  # type: ignore[misc]
        else:
            yield file


@contextlib.contextmanager
def open_h5(uri: str) -> Iterator[Any]:
    """An h5py.File. Inside .gz it is unpacked to a temporary file first, because HDF5 needs random access."""
    h5py: Any = import_library("h5py")  # two of the sixteen data sets need it

    with tempfile.TemporaryFile() as scratch:
        if uri.endswith(".gz"):
            with unzipped(uri) as stream:
                while chunk := stream.read(CHUNK):
                    if scratch.tell() > MAX_UNPACKED:
                        raise UserError(f"{uri}: unpacks to more than {MAX_UNPACKED:,} bytes; no official file does")
                    scratch.write(chunk)
            scratch.seek(0)
        with contextlib.nullcontext(scratch) if uri.endswith(".gz") else storage.open_file(uri) as opened:
            try:
                file = h5py.File(opened, "r")
            except (OSError, KeyError) as error:
                raise UserError(f"{uri}: truncated, or not an HDF5 file ({error})") from error
            with file:
                yield file


def read_mat(uri: str, field: str) -> np.ndarray:
    """One variable of a MATLAB file. Raises UserError if the file is damaged or the variable is missing."""
    with storage.open_file(uri) as file:
        return read_variable(file, uri, field)


def expect_array(array: Any, uri: str, name: str, shape: Sequence[int | None], dtype: Any = np.uint8) -> None:
    """Raises UserError if an array does not have the expected shape and dtype. None in the shape: any size."""
    fits = len(array.shape) == len(shape) and all(b in (a, None) for a, b in zip(array.shape, shape, strict=True))
    if not fits or array.dtype != dtype:
        wanted = " x ".join("N" if size is None else str(size) for size in shape)
        has = f"{' x '.join(map(str, array.shape))} {array.dtype}"
        raise UserError(f"{uri}: {name} is {has}, not {wanted} {np.dtype(dtype)}; not the official file")


def png(image: np.ndarray) -> bytes:
    """Encodes an RGB (H, W, 3) or grey (H, W) uint8 array as PNG."""
    if image.ndim == 3:
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", image)[1].tobytes()
