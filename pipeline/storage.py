"""Access to local paths and the addresses of object stores: s3://bucket/prefix, gs://bucket/prefix and so on. Every
function accepts both. `pipeline.stores` speaks to the stores and has the only retry policy: it holds for every function
and every store alike.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from pipeline import stores
from pipeline.credentials import take_queries
from pipeline.errors import NotWritten, UserError, nearest
from pipeline.links import Roots, follow_link
from pipeline.stores import BLOCK, Entry, ObjectStore, store_of

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

COPY_BYTES = 16 << 20  # bytes per read of a download


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file under a listed folder: path relative to the folder, size in bytes, full URI. `stamp` changes when the file is
    written: its time, or its ETag."""

    path: str
    size: int
    uri: str
    stamp: str = ""


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def normalise(uri: str | os.PathLike) -> str:
    """An absolute local path or s3:// without a trailing slash (Ray workers change directory: relative paths break)."""
    uri = os.fspath(uri)
    if is_remote(uri):
        uri = take_queries(uri)
        scheme, _, path = uri.partition("://")
        return f"{scheme}://{path.rstrip('/')}"
    if uri.startswith("file://") and not uri.startswith("file:///"):
        raise UserError(f"{uri}: an address of a local file has three slashes, file:///PATH; or give its path alone")
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def join(uri: str | os.PathLike, *parts: str) -> str:
    return "/".join([os.fspath(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def _place(uri: str | os.PathLike) -> tuple[str, ObjectStore | None]:
    """(normalised URI, its store; None for a local path). Raises UserError for an address that is neither."""
    uri = normalise(uri)
    return uri, store_of(uri) if is_remote(uri) else None


def refuse_writing(uri: str | os.PathLike) -> None:
    """Raises UserError for an address that can only be read."""
    place, store = _place(uri)
    if store is not None:
        store.refuse_writing(place)


@contextlib.contextmanager
def _rights(path: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"{path}: access denied ({error.strerror}); correct the rights of the file or folder"
        ) from error


def not_written(uri: str | None, error: OSError) -> NotWritten:
    """The error to raise for an output that cannot be written; None for the temporary folder. A store raises StorageError,
    and its files are temporary files first, so an OSError comes from the temporary folder."""
    is_temporary = uri is None or is_remote(uri)
    where = (tempfile.tempdir or "temporary folder") if is_temporary else uri
    remedy = "free some space there or set TMPDIR to another folder," if is_temporary else "free some space"
    return NotWritten(f"{where}: cannot be written ({error}); {remedy} and repeat the command, finished work is kept")


def refuse_special(path: str) -> None:
    """Raises UserError for a local file that could be read forever: a pipe, a socket, a device, a stream of the kernel."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # missing, on a store, or a NUL in its name: opening it says so
        return
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UserError(f"{path}: a pipe, a socket or a device, not a regular file")
    if not status.st_size and os.path.realpath(path).startswith(("/proc/", "/sys/")):
        raise UserError(f"{path}: a file of the kernel, not of data")


def open_regular(path: str, mode: str = "rb") -> IO[Any]:
    """Like `open`, for a local path. Raises UserError for a special file (`refuse_special`): opening a pipe would wait
    for its other end for ever."""
    refuse_special(path)
    return open(path, mode)


def refuse_special_files(folder: str) -> None:
    """Raises UserError for a special file directly in a local folder, which a library reads as a whole."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), _rights(folder):
        for name in os.listdir(folder):
            refuse_special(os.path.join(folder, name))


# ---------------------------------------------------------------- reading


def exists(uri: str | os.PathLike) -> bool:
    """Whether there is a file or a folder of this name."""
    place, store = _place(uri)
    return store.exists(place) if store is not None else os.path.exists(place)


def file_size(uri: str | os.PathLike) -> int:
    """The bytes of a file. Raises FileNotFoundError."""
    return file_info(uri).size


def read_bytes(uri: str | os.PathLike, start: int = 0, end: int | None = None) -> bytes:
    """The bytes [start, end) of a file; fewer where the file ends before.

    Raises FileNotFoundError, UserError for what trying again cannot change, StorageError for an outage.
    """
    place, store = _place(uri)
    if store is not None:
        return store.read(place, start, end)
    with _rights(place), open_regular(place) as file:
        file.seek(start)
        return file.read() if end is None else file.read(end - start)


def read_range(uri: str | os.PathLike, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file that has them all. Raises as `read_bytes` does, FileNotFoundError when it is shorter."""
    place, store = _place(uri)
    if store is not None:
        return store.read(place, start, end, exact=True)
    data = read_bytes(place, start, end)
    if len(data) != end - start:
        raise FileNotFoundError(f"{place}: shorter than expected: {len(data)} of {end - start} bytes at {start}")
    return data


def read_many(uris: Iterable[str], threads: int = 64) -> Iterator[bytes | FileNotFoundError]:
    """Whole files in the order given, `threads` at a time and at most twice as many held; the error for one that does not
    exist. Raises UserError or StorageError as `read_bytes` does: what is missing is one matter, an outage another."""
    waiting: deque[Future[bytes | FileNotFoundError]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for uri in uris:
            waiting.append(pool.submit(_read_or_missing, uri))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_or_missing(uri: str) -> bytes | FileNotFoundError:
    try:
        return read_bytes(uri)
    except FileNotFoundError as error:
        return error


def read_json(uri: str | os.PathLike) -> Any:
    """Raises UserError for invalid JSON, otherwise like `read_bytes`."""
    try:
        return json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri}: not valid JSON ({error})") from error


def read_record(uri: str | os.PathLike, keys: Iterable[str] = (), remedy: str = "remove it") -> dict[str, Any]:
    """A JSON object that has these keys. Raises UserError, naming the file, for any other JSON; else as `read_json` does."""
    value = read_json(uri)
    missing = [key for key in keys if key not in value] if isinstance(value, dict) else []
    if not isinstance(value, dict) or missing:
        what = f"has no {', '.join(missing)}" if missing else f"holds a {type(value).__name__} instead of an object"
        raise UserError(f"{uri}: not what this program writes: {what}; {remedy}")
    return value


@contextlib.contextmanager
def open_file(uri: str | os.PathLike, block: int = BLOCK) -> Iterator[IO[bytes]]:
    """A file to read, seekable. On S3 it reads `block` bytes at a time, each as `read_bytes` does."""
    place, store = _place(uri)
    if store is not None:
        with store.open(place, block) as file:
            yield file
        return
    with _rights(place), open_regular(place) as file:
        yield file


# ---------------------------------------------------------------- listing


def list_files(uri: str | os.PathLike, recursive: bool = True) -> list[FileInfo]:
    """Every file under a folder, sorted by path; empty when the folder is empty or does not exist."""
    return sorted(iter_files(uri, recursive), key=lambda file: file.path)


def iter_files(uri: str | os.PathLike, recursive: bool = True) -> Iterator[FileInfo]:
    """Every file under a folder, as the listing goes on and in no order, for those who need only the first ones."""
    place, store = _place(uri)
    if store is None:
        yield from _local_files(place, "", recursive)
    else:
        yield from (_file_info(place, entry) for entry in store.list(place, recursive) if not entry.is_folder)


def _file_info(folder: str, entry: Entry) -> FileInfo:
    return FileInfo(entry.path, entry.size, join(folder, entry.path), entry.etag)


def iter_pages(
    uri: str | os.PathLike, recursive: bool = True, after: str = "", limit: int | None = None
) -> Iterator[list[Entry]]:
    """The entries under a prefix of a store, in the order of the store, a page of at most `limit` at a time; none in a bucket
    that does not exist. after: only paths greater than this one, where `lists_by_name`."""
    place, store = _place(uri)
    if store is not None:
        yield from store.pages(place, recursive, after, limit)


def lists_by_name(uri: str | os.PathLike) -> bool:
    """Whether the store lists files in the order of their names' UTF-8 bytes, from any name on; False for local folders."""
    place, store = _place(uri)
    return store is not None and store.lists_by_name(place)


def can_list(uri: str | os.PathLike) -> bool:
    """Whether the files of a folder can be listed there: not on a web server."""
    _, store = _place(uri)
    return store is None or store.LISTS


def list_folders(uri: str | os.PathLike) -> list[str]:
    """Names of the folders directly in a folder, sorted; none when it does not exist."""
    place, store = _place(uri)
    if store is not None:
        return sorted(entry.path for entry in store.list(place, recursive=False) if entry.is_folder)
    with _rights(place), contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())
    return []


def nearest_folder(uri: str | os.PathLike) -> str:
    """' (did you mean "x"?)' for the folder whose name is most similar to that of a missing one beside it, or ''."""
    parent, _, name = str(uri).rpartition("/")
    with contextlib.suppress(OSError, UserError):  # the folder above it may be hidden
        beside = list_folders(parent) if parent and can_list(parent) else []
        return nearest(name, [folder for folder in beside if folder != name])  # it may be there, and empty
    return ""


def list_names(uri: str | os.PathLike) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; none when it does not exist."""
    return sorted([*list_folders(uri), *(file.path for file in list_files(uri, recursive=False))])


def file_info(uri: str | os.PathLike) -> FileInfo:
    """What there is to know of one file, under the path "". Raises FileNotFoundError."""
    place, store = _place(uri)
    if store is not None:
        entry = store.head(place)
        return FileInfo("", entry.size, place, entry.etag)
    status = os.stat(place)
    return FileInfo("", status.st_size, place, str(status.st_mtime_ns))


def _local_files(folder: str, prefix: str, recursive: bool, roots: Roots = ()) -> Iterator[FileInfo]:
    """Regular files. Links are followed as `follow_link` says. What is removed meanwhile is left out."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), _rights(folder):
        roots = roots or (os.path.realpath(folder),)
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ELOOP):  # removed meanwhile, or a link to nothing
                        continue
                    raise
                if stat.S_ISREG(status.st_mode):
                    yield FileInfo(prefix + entry.name, status.st_size, entry.path, str(status.st_mtime_ns))
                elif recursive and stat.S_ISDIR(status.st_mode):
                    below = follow_link(entry.path, roots) if entry.is_symlink() else roots
                    if below:
                        yield from _local_files(entry.path, f"{prefix}{entry.name}/", recursive, below)


# ---------------------------------------------------------------- writing


def write_bytes(uri: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file so that readers see all of it or none: temp + rename locally, one PUT on S3."""
    place, store = _place(uri)
    if store is not None:
        store.write(place, data)
        return
    with _replacing(place) as file:
        file.write(data)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` once it is written whole and on the disk."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    with _rights(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            if isinstance(error, OSError) and error.errno and error.filename is None:  # such as a full disk
                raise OSError(error.errno, error.strerror, path) from error
            raise


def create_bytes(uri: str | os.PathLike, data: bytes) -> bool:
    """Writes a whole file unless it exists already; True for the one caller of many who made it.

    A hard link locally, a conditional PUT (If-None-Match: *) on S3: the store decides, whatever the number of callers. Callers
    write different bytes each: that tells a caller whose answer was lost that it was the one.
    """
    place, store = _place(uri)
    if store is not None:
        return store.create(place, data)
    temporary = f"{place}.{uuid.uuid4().hex[:8]}.tmp"
    write_bytes(temporary, data)
    try:
        os.link(temporary, place)
        return True
    except FileExistsError:
        return False
    finally:
        os.remove(temporary)


def write_json(uri: str | os.PathLike, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=False) + "\n").encode())


def remove(uri: str | os.PathLike, recursive: bool = False) -> None:
    """Removes a file, or with `recursive` a folder. A missing file is not an error."""
    place, store = _place(uri)
    if store is not None:
        # One by one: the SDK's bulk request comes without the Content-MD5 that Swift and older Ceph insist on.
        files = [file.uri for file in list_files(place)] if recursive else []
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(store.remove, [*files, place]))
        return
    with _rights(place), contextlib.suppress(FileNotFoundError):
        if recursive and os.path.isdir(place) and not os.path.islink(place):
            shutil.rmtree(place)
        else:
            os.remove(place)


def copy_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies one file between any two places; readers see the whole file or none. Large uploads go up in parts."""
    (begin, _), (end, upload) = _place(source), _place(target)
    if upload is not None:
        upload.upload(end, lambda: open_file(begin, COPY_BYTES))
        return
    with open_file(begin, COPY_BYTES) as reader, _replacing(end) as writer:
        shutil.copyfileobj(reader, writer, COPY_BYTES)


def arrow_filesystem(uri: str | os.PathLike) -> tuple[str, "FileSystem | None"]:
    """(path, filesystem) for the files that Ray Train writes; the filesystem of local files is None."""
    place, store = _place(uri)
    if store is None:
        return place, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return place.partition("://")[2], PyFileSystem(FSSpecHandler(stores.arrow_filesystem(place)))
