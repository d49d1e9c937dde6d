"""One way to open local paths and s3:// addresses.

A URI is a local path or `s3://bucket/prefix`; every function here takes either. S3 endpoint, region and credentials come
from the usual AWS_* environment variables (AWS_ENDPOINT_URL for any S3-compatible store), never from arguments, so that
no secret passes through a config, a log or a run.
"""

import contextlib
import functools
import json
import logging
import os
import stat
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import fsspec

from pipeline.errors import UserError
from pipeline.libraries import import_library

# Third-party S3 servers answer 411 to the SDK's newer default of checksummed, chunked bodies; "when required" is
# understood by all of them. Set before any client exists; an explicit setting of the user's wins.
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

logger = logging.getLogger(__name__)

PATIENCE = 180.0  # seconds for which a read of a byte range is tried again: a store restarts in minutes
LONGEST_PAUSE = 10.0  # seconds between two attempts; the first pauses are 0.1, 0.2, 0.4, ...
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 20  # seconds, of one attempt


class StorageError(UserError):
    """The store cannot be reached or does not answer as it should: another attempt may succeed, unlike with other wrong input."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file under a listed folder: path relative to the folder, size in bytes, full URI."""

    path: str
    size: int
    uri: str


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def normalise(uri: str | os.PathLike) -> str:
    """An absolute local path or s3:// without a trailing slash (Ray workers change directory: relative paths break)."""
    uri = os.fspath(uri)
    if is_remote(uri):
        scheme, _, path = uri.partition("://")
        return f"{scheme}://{path.rstrip('/')}"
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def filesystem(uri: str | os.PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of `uri` and the path on it. Directory listings are never cached.

    Raises UserError for a scheme other than a local path or s3://, and for s3:// without the library for it.
    """
    uri = normalise(uri)
    if not is_remote(uri):
        return fsspec.filesystem("file"), uri
    scheme, _, path = uri.partition("://")
    if scheme != "s3":
        raise UserError(f"{uri}: {scheme}:// is not supported; use a local path or s3://bucket/prefix")
    if not path.strip("/"):
        raise UserError(f"{uri}: no bucket; use s3://bucket/prefix")
    # connect and read time-outs in seconds; botocore's own retries cover single requests, callers retry whole reads
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", 5))
    import_library("s3fs")
    config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": attempts, "mode": "standard"}}
    return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=config), path


def join(uri: str | os.PathLike, *parts: str) -> str:
    return "/".join([os.fspath(uri).rstrip("/"), *(part.strip("/") for part in parts)])


@contextlib.contextmanager
def _explained(uri: str | os.PathLike) -> Iterator[None]:
    """Turns what S3 clients raise for wrong names and credentials into a UserError that names the URI."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{uri}: access denied ({error}); check the AWS_* credentials and the bucket policy") from error
    except OSError as error:
        if is_remote(os.fspath(uri)) and not isinstance(error, FileNotFoundError):
            raise StorageError(f"{uri}: {error}; check the bucket name and AWS_ENDPOINT_URL") from error
        raise
    except Exception as error:  # botocore's own classes (NoCredentialsError, EndpointConnectionError, ...)
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise StorageError(
                f"{uri}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role), and AWS_ENDPOINT_URL "
                "for a store other than AWS"
            ) from error
        raise


def refuse_special(path: str) -> None:
    """Raises UserError for a local file that could be read for ever: a pipe, a socket, a device, a stream of the kernel."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # missing, on a store, or a NUL in its name: opening it says so
        return
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UserError(f"{path}: a pipe, a socket or a device, not a regular file")
    if not status.st_size and os.path.realpath(path).startswith(("/proc/", "/sys/")):
        raise UserError(f"{path}: a file of the kernel, not of data")


def exists(uri: str | os.PathLike) -> bool:
    fs, path = filesystem(uri)
    with _explained(uri):
        return bool(fs.exists(path))


def read_bytes(uri: str | os.PathLike, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes [start, end) of a file. Raises FileNotFoundError, or UserError when the store refuses."""
    fs, path = filesystem(uri)
    refuse_special(path)
    with _explained(uri):
        return bytes(fs.cat_file(path, start=start, end=end))


def read_range(uri: str | os.PathLike, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file, tried again for `PATIENCE` seconds while the store is away.

    Raises FileNotFoundError, UserError for what trying again cannot change, StorageError for an outage.
    """
    if is_remote(os.fspath(uri)):
        return _shared_reader().read(normalise(uri), start, end)
    with open(normalise(uri), "rb") as file:
        file.seek(start)
        return file.read(end - start)


def read_many(uris: Iterable[str], threads: int = 64) -> Iterator[bytes | FileNotFoundError]:
    """Whole s3:// files in the order given, `threads` at a time and at most twice as many held; the error for one that does
    not exist. Raises UserError or StorageError as `read_range` does: what is missing is one matter, an outage another."""
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
        return _shared_reader().read(normalise(uri))
    except FileNotFoundError as error:
        return error


_S3_SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_DEFAULT_REGION",
)


def _shared_reader() -> "RangeReader":
    """The reader of this process for the settings that the environment has now."""
    with _making_reader:
        return _make_reader(os.getpid(), *map(os.environ.get, _S3_SETTINGS))


_making_reader = threading.Lock()  # botocore's sessions are not made by two threads at once


@functools.lru_cache(maxsize=4)
def _make_reader(*settings: Any) -> "RangeReader":
    return RangeReader()


class RangeReader:
    """Reads s3:// files and byte ranges of them by blocking requests, from any number of threads.

    This is the retry policy of the pipeline: what may pass (500, 503, 429, time-outs, resets, short bodies) is tried again
    with growing pauses for `PATIENCE` seconds, whole attempts only; the client itself never repeats anything, so that all
    repetitions are counted in `retries`.

    botocore's blocking client and not fsspec: 5-11 ms of CPU time per 16 MiB, against 9-13 for pyarrow's S3 filesystem and
    19-34 for s3fs, which moves every body through one event loop.
    """

    def __init__(self) -> None:
        import botocore.config
        import botocore.session

        timeouts = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT}
        config = botocore.config.Config(retries={"total_max_attempts": 1}, max_pool_connections=64, **timeouts)
        self._s3 = botocore.session.get_session().create_client("s3", config=config)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self.retries = 0

    def close(self) -> None:
        """Ends the pauses of reads that wait for the store."""
        self._closing.set()

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes [start, end) of `uri`, the whole file without an end. Raises as `read_range` does."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        given_up = time.monotonic() + PATIENCE
        attempt = 0
        while True:
            problem = self._attempt(uri, bucket, key, start, end)
            if isinstance(problem, bytes):
                return problem
            pause = min(0.1 * 2**attempt, LONGEST_PAUSE)
            attempt += 1
            with self._lock:
                self.retries += 1
            logger.warning("%s: attempt %d to read failed: %s", uri, attempt, problem)
            if time.monotonic() + pause > given_up or self._closing.wait(pause):
                raise StorageError(
                    f"{uri}: unreadable after {attempt} attempts in {PATIENCE:g} s; the last one: {problem}; check that "
                    "the store is up and AWS_ENDPOINT_URL"
                ) from problem

    def _attempt(self, uri: str, bucket: str, key: str, start: int, end: int | None) -> bytes | Exception:
        """The bytes, or what went wrong when another attempt may do better."""
        from botocore.exceptions import ClientError, NoCredentialsError

        try:
            part = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
            body = self._s3.get_object(Bucket=bucket, Key=key, **part)["Body"]
            with contextlib.closing(body):
                data = body.read()
            if end is None or len(data) == end - start:
                return data
            return OSError(f"{len(data)} of {end - start} bytes at {start}")
        except NoCredentialsError as error:
            raise UserError(f"{uri}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role)") from error
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in (401, 403):
                raise UserError(f"{uri}: access denied ({error}); check the AWS_* credentials") from error
            if status in (404, 416):
                raise FileNotFoundError(f"{uri}: missing, or shorter than expected ({error})") from error
            return error
        except Exception as error:  # botocore, urllib3 and the socket layer each have their own
            return error


def write_bytes(uri: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file so that readers see all of it or none: temp + rename locally, one PUT on S3."""
    fs, path = filesystem(uri)
    with _explained(uri):
        if is_remote(os.fspath(uri)):
            fs.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            raise


def create_bytes(uri: str | os.PathLike, data: bytes) -> bool:
    """Writes a whole file unless it exists already; True for the one caller of many who made it.

    A hard link locally, a conditional PUT (If-None-Match: *) on S3: the store decides, whatever the number of callers.
    """
    fs, path = filesystem(uri)
    with _explained(uri):
        try:
            if is_remote(os.fspath(uri)):
                fs.pipe_file(path, data, mode="create")
                return True
            temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            write_bytes(temporary, data)
            try:
                os.link(temporary, path)
            finally:
                os.remove(temporary)
            return True
        except FileExistsError:
            return False


def read_json(uri: str | os.PathLike) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri}: not valid JSON ({error})") from error


def write_json(uri: str | os.PathLike, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=False) + "\n").encode())


@contextlib.contextmanager
def open_file(uri: str | os.PathLike, mode: str = "rb") -> Iterator[IO]:
    """A plain file object. A local file opened for writing has its folder made; use `write_bytes` where atomicity matters."""
    fs, path = filesystem(uri)
    refuse_special(path)
    with _explained(uri):
        if "w" in mode and not is_remote(os.fspath(uri)):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with fs.open(path, mode) as file:
            yield file


def list_files(uri: str | os.PathLike, recursive: bool = True) -> list[FileInfo]:
    """Every file under a folder, sorted by path; empty when the folder is empty or does not exist."""
    fs, root = filesystem(uri)
    base = normalise(uri)
    with _explained(uri):
        try:
            found = fs.find(root, withdirs=False, detail=True, maxdepth=None if recursive else 1)
        except FileNotFoundError:
            return []
    prefix = root.rstrip("/") + "/"
    files = [
        FileInfo(path=name[len(prefix) :], size=int(info["size"] or 0), uri=join(base, name[len(prefix) :]))
        for name, info in found.items()
        if name.startswith(prefix) and info["type"] == "file" and not name.endswith("/")
    ]
    return sorted(files, key=lambda file: file.path)


def iter_files(uri: str) -> Iterator[FileInfo]:
    """Every object under an s3:// prefix, in the order of the store, a page of a thousand at a time; none in a bucket that
    does not exist."""
    fs, root = filesystem(uri)
    bucket, _, key = root.partition("/")
    prefix = f"{key}/" if key else ""
    more: dict[str, str] = {}
    with _explained(uri), contextlib.suppress(FileNotFoundError):
        while True:
            page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):
                    path = found["Key"].removeprefix(prefix)
                    yield FileInfo(path=path, size=int(found["Size"]), uri=join(uri, path))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


def remove(uri: str | os.PathLike, recursive: bool = False) -> None:
    """Removes a file, or a folder when recursive; one that is not there is no error."""
    fs, path = filesystem(uri)
    with _explained(uri), contextlib.suppress(FileNotFoundError):
        if is_remote(os.fspath(uri)):
            # One by one: the SDK's bulk request comes without the Content-MD5 that Swift and older Ceph insist on.
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(fs.rm_file, fs.find(path) if recursive else [path]))
            return
        fs.rm(path, recursive=recursive)


def copy_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Streams one file between any two places, in multipart chunks on S3."""
    (from_fs, from_path), (to_fs, to_path) = filesystem(source), filesystem(target)
    with _explained(source), _explained(target):
        if not is_remote(os.fspath(target)):
            os.makedirs(os.path.dirname(to_path), exist_ok=True)
        if not is_remote(os.fspath(source)):
            to_fs.put_file(from_path, to_path)
        elif not is_remote(os.fspath(target)):
            from_fs.get_file(from_path, to_path)
        else:
            with from_fs.open(from_path, "rb") as reader, to_fs.open(to_path, "wb") as writer:
                while chunk := reader.read(16 << 20):
                    writer.write(chunk)


def copy_tree(source: str | os.PathLike, target: str | os.PathLike, threads: int = 8) -> list[FileInfo]:
    """Copies every file under `source` to the same relative path under `target`, `threads` at a time."""
    files = list_files(source)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda file: copy_file(file.uri, join(target, file.path)), files))
    return files
