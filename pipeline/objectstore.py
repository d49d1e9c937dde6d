"""S3 and what speaks its protocol, through one client and one retry policy. `pipeline.storage` is the way in.

Endpoint, region and credentials come from the usual AWS_* environment variables (AWS_ENDPOINT_URL for a store other than AWS),
never from arguments, so that no secret passes through a config, a log or a run.

What may pass (500, 503, 429, time-outs, resets, short bodies) is tried again as `pipeline.retry` says; the client itself repeats
nothing, so that every repetition is counted and logged. Uploads in parts are the exception: there the
client repeats single parts first, because a whole upload can be gigabytes.

botocore's blocking client and not s3fs: 5-11 ms of CPU time per 16 MiB, against 9-13 for pyarrow's S3 filesystem and 19-34 for
s3fs, which moves every body through one event loop.
"""

import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, TypeVar

from pipeline import retry as policy
from pipeline.errors import StorageError, UserError
from pipeline.libraries import import_library

# Third-party S3 servers answer 411 to the SDK's newer default of checksummed, chunked bodies; "when required" is
# understood by all of them. Set before any client exists; an explicit setting of the user's wins.
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

FIRST_PATIENCE = 15.0  # seconds, before the endpoint has ever answered this process: the address is more likely wrong
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 20  # seconds, of one attempt
PART_TIMEOUT, PART_ATTEMPTS = 60, 5  # of one part of an upload
BLOCK = 8 << 20  # bytes that an open file reads at a time
SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
)
"""The settings that a client is made with."""
ACCESS = "check the AWS_* credentials and the bucket policy"

T = TypeVar("T")
_making = threading.Lock()  # botocore's sessions are not made by two threads at once
_answered: set[str | None] = set()  # endpoints that this process has had an answer from


class Entry(NamedTuple):
    """A file or a folder of a listing. `etag` follows the content of a file."""

    path: str
    size: int
    etag: str
    is_folder: bool = False


class ObjectStore:
    """Requests for s3:// addresses, blocking, from any number of threads.

    Every method raises FileNotFoundError for what is not there, UserError for what no second attempt can change, StorageError
    for an outage. `retries` counts the attempts that failed and were repeated.
    """

    def __init__(self) -> None:
        self.endpoint = os.environ.get("AWS_ENDPOINT_URL")
        self._client = _make_client(READ_TIMEOUT, attempts=1)
        self._uploads: Any = None
        self._lock, self._closing = threading.Lock(), threading.Event()
        self.retries = 0

    def close(self) -> None:
        """Ends the pauses of requests that wait for the store."""
        self._closing.set()

    # ------------------------------------------------------------ reading

    def read(self, uri: str, start: int = 0, end: int | None = None, *, exact: bool = False) -> bytes:
        """The bytes [start, end) of a file, the rest of it without an end; fewer where the file ends before.

        exact: a file that ends before `end` raises FileNotFoundError.
        """
        if end is not None and end <= start:
            return b""
        part = {} if not start and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}

        def attempt() -> bytes:
            try:
                answer = self._client.get_object(**_place(uri), **part)
            except Exception as error:
                if _status(error) == 416 and not exact:  # the file ends before `start`
                    return b""
                raise
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
            return _checked(data, answer.get("ContentRange"), start, end, exact and uri) if part else data

        return self._try(uri, attempt)

    def open(self, uri: str, block: int = BLOCK) -> IO[bytes]:
        """A seekable, buffered file object that reads `block` bytes at a time."""
        return io.BufferedReader(_OpenObject(self, uri, self.size(uri)), block)

    def size(self, uri: str) -> int:
        """The bytes of a file."""
        return self.head(uri).size

    def head(self, uri: str) -> "Entry":
        """What the store knows of a file, under the path ""."""
        found = self._try(uri, lambda: self._client.head_object(**_place(uri)))
        return Entry("", int(found["ContentLength"]), found.get("ETag", ""))

    def exists(self, uri: str) -> bool:
        """Whether there is a file of this name, or a file below a folder of this name."""
        with contextlib.suppress(FileNotFoundError):
            if _place(uri)["Key"]:
                self.size(uri)
                return True
        bucket, prefix = _folder(uri)
        with contextlib.suppress(FileNotFoundError):
            found = self._try(uri, lambda: self._client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1))
            return bool(found.get("KeyCount") or found.get("Contents")) or not prefix
        return False

    def list(self, uri: str, recursive: bool = True) -> Iterator["Entry"]:
        """Every file below the folder, in the store's order, a page of a thousand at a time; none in a bucket
        that does not exist. Without `recursive`, the files and the folders directly in it."""
        bucket, prefix = _folder(uri)
        more: dict[str, str] = {} if recursive else {"Delimiter": "/"}
        with contextlib.suppress(FileNotFoundError):
            while True:
                request = functools.partial(self._client.list_objects_v2, Bucket=bucket, Prefix=prefix, **more)
                page = self._try(uri, request)
                for folder in page.get("CommonPrefixes", ()):
                    yield Entry(folder["Prefix"][len(prefix) :].rstrip("/"), 0, "", is_folder=True)
                for found in page.get("Contents", ()):
                    if not found["Key"].endswith("/"):
                        yield Entry(found["Key"][len(prefix) :], int(found["Size"]), found.get("ETag", ""))
                if not page.get("IsTruncated"):
                    return
                more["ContinuationToken"] = page["NextContinuationToken"]

    # ------------------------------------------------------------ writing

    def write(self, uri: str, data: bytes) -> None:
        """One PUT: readers see the whole file or none."""
        self._write(uri, lambda: self._client.put_object(**_place(uri), Body=data))

    def create(self, uri: str, data: bytes) -> bool:
        """Writes a file unless it exists (If-None-Match: *); True for the one caller of many who made it."""
        attempts = 0

        def attempt() -> None:
            nonlocal attempts
            attempts += 1
            self._client.put_object(**_place(uri), Body=data, IfNoneMatch="*")

        try:
            self._write(uri, attempt)
        except FileExistsError:
            # an attempt whose answer was lost may have made it
            return attempts > 1 and self.read(uri) == data
        return True

    def upload(self, uri: str, open_source: Callable[[], contextlib.AbstractContextManager[IO[bytes]]]) -> None:
        """Writes what `open_source` opens, in parts when it is large."""
        with self._lock:
            if self._uploads is None:
                self._uploads = _make_client(PART_TIMEOUT, attempts=PART_ATTEMPTS)

        def attempt() -> None:
            with open_source() as source:
                self._uploads.upload_fileobj(source, *_place(uri).values())

        self._write(uri, attempt)

    def remove(self, uri: str) -> None:
        """Removes one file; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._try(uri, lambda: self._client.delete_object(**_place(uri)))

    def _write(self, uri: str, attempt: Callable[[], Any]) -> None:
        try:
            self._try(uri, attempt)
        except FileNotFoundError as error:
            raise StorageError(f"{uri}: no such bucket; create it, or correct the address") from error

    # ------------------------------------------------------------ the retry policy

    def _try(self, uri: str, attempt: Callable[[], T]) -> T:
        def answered() -> T:
            result = attempt()
            _answered.add(self.endpoint)
            return result

        def permanent(error: Exception) -> Exception | None:
            if _status(error):
                _answered.add(self.endpoint)
            return _permanent(uri, error)

        def patience() -> float:
            longest = policy.longest_patience()
            return longest if self.endpoint in _answered else min(FIRST_PATIENCE, longest)

        return policy.retry(
            uri,
            answered,
            permanent,
            "check that the store is up and AWS_ENDPOINT_URL",
            patience=patience,
            closing=self._closing,
            on_failure=self._count,
        )

    def _count(self) -> None:
        with self._lock:
            self.retries += 1


class _Incomplete(OSError):
    """An answer with fewer bytes than it promises."""


class _OpenObject(io.RawIOBase):
    """What BufferedReader reads from."""

    def __init__(self, store: ObjectStore, uri: str, size: int) -> None:
        self.store, self.uri, self.size, self.position = store, uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if position < 0:
            raise OSError(22, f"negative position in {self.uri}")  # EINVAL, as a local file raises
        self.position = position
        return position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        data = self.store.read(self.uri, self.position, end, exact=True)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def shared_store() -> ObjectStore:
    """The store of this process for the settings that the environment has now."""
    with _making:
        return _shared_store(os.getpid(), *map(os.environ.get, SETTINGS))


@functools.lru_cache(maxsize=4)
def _shared_store(*settings: Any) -> ObjectStore:
    return ObjectStore()


def expect_answers() -> None:
    """Says that the endpoint of this process has answered another one: a worker calls it, whose driver read the same store.

    The worker then waits as long for the store as the driver would, where a new process gives an unknown address up soon.
    """
    _answered.add(os.environ.get("AWS_ENDPOINT_URL"))


def _make_client(timeout: float, attempts: int) -> Any:
    boto3: Any = import_library("boto3")
    from botocore.config import Config

    retries: Any = {"total_max_attempts": attempts, "mode": "standard"}
    config = Config(retries=retries, max_pool_connections=64, connect_timeout=CONNECT_TIMEOUT, read_timeout=timeout)
    try:
        return boto3.session.Session().client("s3", config=config)
    except Exception as error:  # an unknown profile, an endpoint that is no address
        raise UserError(f"AWS_* settings: {error}") from error


def _place(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def _folder(uri: str) -> tuple[str, str]:
    """(bucket, prefix of what lies below)."""
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    return bucket, f"{key}/" if key else ""


def _checked(data: bytes, content_range: str | None, start: int, end: int | None, exact: Any) -> bytes:
    """The bytes of a range request, compared with what the answer says that they are."""
    if content_range is None:  # a store that does not serve ranges sent the whole file
        data, last = data[start:end], None
    else:
        extent, _, total = content_range.removeprefix("bytes ").partition("/")
        first, _, last_byte = extent.partition("-")
        last = int(last_byte) + 1
        if int(first) != start or len(data) != last - start:
            raise _Incomplete(f"{len(data)} of {last - start} bytes at {start}")
        if last < (end or 0) and total not in ("*", str(last)):
            raise _Incomplete(f"{len(data)} of {(end or 0) - start} bytes at {start}")
    if exact and end is not None and len(data) < end - start:
        raise FileNotFoundError(
            f"{exact}: missing, or shorter than expected: {len(data)} of {end - start} bytes at {start}"
        )
    return data


def _status(error: Exception) -> int:
    """The HTTP status of an answer that is an error, else 0."""
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def _permanent(uri: str, error: Exception) -> Exception | None:
    """What to raise when another attempt cannot do better, else None."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    status, code = _status(error), getattr(error, "response", None) or {}
    code = code.get("Error", {}).get("Code", "") if isinstance(code, dict) else ""
    if isinstance(error, (FileNotFoundError, UserError)):
        return error
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return UserError(f"{uri}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role)")
    if status in (401, 403):
        return UserError(f"{uri}: access denied ({error}); {ACCESS}")
    if status in (404, 416):
        return FileNotFoundError(f"{uri}: missing, or shorter than expected ({error})")
    if status == 412:
        return FileExistsError(f"{uri}: exists already")
    if 300 <= status < 500 and status not in (408, 409, 429) and code not in ("RequestTimeout", "SlowDown"):
        return StorageError(f"{uri}: the store refuses: {error}; check the bucket's name and AWS_ENDPOINT_URL")
    if isinstance(error, (exceptions.ParamValidationError, exceptions.UnknownEndpointError, ValueError)):
        return UserError(f"{uri}: {error}; check the bucket's name and AWS_ENDPOINT_URL")
    if isinstance(error, (exceptions.BotoCoreError, exceptions.ClientError, HTTPError, OSError)):
        return None  # no answer, half of one, or one of a store that is busy
    return error
