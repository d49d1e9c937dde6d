"""Base class of the object stores: the requests of `pipeline.storage` with a common retry policy.

Each store is a class in its own module, with a row in `pipeline.stores.SCHEMES`. The class makes one attempt of each
request and tells permanent errors from temporary ones; this module does the rest. Credentials and endpoints come from
the environment variables of the vendor's own tools, never from arguments, so that no secret gets into a config, a log
or a run.

Temporary failures (500, 503, 429, time-outs, resets, short bodies) are retried according to `pipeline.retry`. Retries in
the client libraries are off, so that every retry is counted and logged. The exception is an upload in parts: the library
first retries single parts, because a whole upload can be gigabytes.
"""

import abc
import builtins
import contextlib
import functools
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Any, ClassVar, NamedTuple, TypeVar

from pipeline import retry as policy
from pipeline.credentials import redacted
from pipeline.errors import StorageError, UserError

FIRST_PATIENCE = 15.0  # seconds, until the endpoint has responded once: before that, a wrong address is more likely
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 20  # seconds per attempt
PART_TIMEOUT, PART_ATTEMPTS = 60, 5  # per part of an upload
BLOCK = 8 << 20  # bytes that an open file reads at a time
TRY_AGAIN = (408, 409, 429)  # temporary statuses below 500

T = TypeVar("T")
_answered: set[str] = set()  # endpoints that have responded to this process
_ANY = "any endpoint"


class Entry(NamedTuple):
    """A file or a folder in a listing. `etag` changes with the content of a file."""

    path: str
    size: int
    etag: str
    is_folder: bool = False


class After(str):
    """In place of the token of a page: the page begins with the first file whose path is greater than this one. Only for
    addresses with `lists_by_name`."""


class IncompleteResponse(OSError):
    """Raised for a response with fewer bytes than announced."""


class ObjectStore(abc.ABC):
    """Blocking requests for the addresses of one scheme; thread-safe. Every public method raises FileNotFoundError for
    a missing file, UserError for a permanent error, and StorageError for an outage. `retries` counts the repeated
    attempts.
    """

    EXAMPLE: ClassVar[str]
    """An example address for error messages."""
    ROOT: ClassVar[str] = "bucket"
    """The kind of the first part of an address, such as bucket."""
    WRITABLE: ClassVar[bool] = True
    LISTS: ClassVar[bool] = True
    """Whether the files of a folder can be listed."""
    ENDPOINT: ClassVar[str] = ""
    """The environment variable, or the part of one, for a server other than the vendor's."""
    RESENDS: ClassVar[bool] = False
    """Whether the client may repeat a write on its own."""
    SETTINGS: ClassVar[tuple[str, ...]] = ()
    """The environment variables that configure a client."""
    ACCESS: ClassVar[str]
    """Remedy for denied access."""
    REMEDY: ClassVar[str]
    """Remedy if the store does not respond, or refuses a request."""

    def __init__(self) -> None:
        self._lock, self._closing = threading.Lock(), threading.Event()
        self.retries = 0

    def close(self) -> None:
        """Ends the waiting of requests for the store."""
        self._closing.set()

    @classmethod
    def endpoint(cls, uri: str) -> str:
        """The server of an address: `http://host[:port]`, or "" for the vendor's server."""
        return ""

    @classmethod
    def lists_by_name(cls, uri: str) -> bool:
        """Whether listings are sorted by the UTF-8 bytes of the names and can begin after any name."""
        return False

    # ------------------------------------------------------------ one attempt of each request

    @abc.abstractmethod
    def _get(self, uri: str, start: int, end: int | None, exact: bool) -> bytes:
        """Like `read`; raises Incomplete for a response that is too short."""

    @abc.abstractmethod
    def _head(self, uri: str) -> Entry:
        """Like `head`."""

    @abc.abstractmethod
    def _page(self, uri: str, recursive: bool, token: Any, limit: int | None) -> tuple[list[Entry], Any]:
        """(entries, token of the next page) of the page of a listing with this token (None: the first page; an `After`:
        a page from there). The returned token of the last page is None. Paths are relative to the folder `uri`.
        """

    def _put(self, uri: str, data: bytes, new: bool) -> None:
        """Writes a file. new: raises FileExistsError if the file exists."""
        raise NotImplementedError

    def _put_file(self, uri: str, path: str) -> None:
        """Uploads a local file, in parts if it is large; the library retries parts."""
        raise NotImplementedError

    def _delete(self, uri: str) -> None:
        """Removes a file."""
        raise NotImplementedError

    @abc.abstractmethod
    def _status(self, error: Exception) -> int:
        """The HTTP status of an error response, else 0."""

    @abc.abstractmethod
    def _may_pass(self, error: Exception) -> bool:
        """Whether an error without a status is a network error, which may be temporary."""

    def _unsent(self, error: Exception) -> str | None:
        """The message for an error before a request was sent, such as missing credentials, else None."""
        return None

    # ------------------------------------------------------------ reading

    def read(self, uri: str, start: int = 0, end: int | None = None, *, exact: bool = False) -> bytes:
        """The bytes [start, end) of a file, or from `start` to its end. Fewer bytes if the file is shorter; with
        `exact`, this raises FileNotFoundError.
        """
        if end is not None and end <= start:
            return b""

        def attempt() -> bytes:
            try:
                return self._get(uri, start, end, exact)
            except Exception as error:
                if self._status(error) == 416 and not exact:  # the file ends before `start`
                    return b""
                raise

        return self._try(uri, attempt)

    def open(self, uri: str, block: int = BLOCK) -> IO[bytes]:
        """A seekable, buffered file object that reads `block` bytes at a time."""
        return io.BufferedReader(_OpenObject(self, uri, self.size(uri)), block)

    def size(self, uri: str) -> int:
        """The size of a file in bytes."""
        return self.head(uri).size

    def head(self, uri: str) -> Entry:
        """The entry of a file, with the path ""."""
        return self._try(uri, lambda: self._head(uri))

    def exists(self, uri: str) -> bool:
        """Whether a file with this name exists, or a file in a folder with this name."""
        key = split(uri)[1]
        with contextlib.suppress(FileNotFoundError):
            if key:
                self.head(uri)
                return True
        if not self.LISTS:
            return False
        with contextlib.suppress(FileNotFoundError):
            found, more = self._try(uri, lambda: self._page(uri, True, None, 1))
            return bool(found or more) or not key
        return False

    def list(self, uri: str, recursive: bool = True) -> Iterator[Entry]:
        """Yields every file below the folder, in the order of the store, page by page; nothing for a missing bucket.
        Without `recursive`, the files and folders directly in the folder."""
        for page in self.pages(uri, recursive):
            yield from page

    def pages(
        self, uri: str, recursive: bool = True, after: str = "", limit: int | None = None
    ) -> Iterator[builtins.list[Entry]]:
        """Like `list`, one page at a time. after: only paths greater than this one, for addresses with
        `lists_by_name`. limit: maximum number of entries of a page."""
        self.refuse_listing(uri)
        token: Any = After(after) if after else None
        with contextlib.suppress(FileNotFoundError):
            while True:
                found, token = self._try(uri, functools.partial(self._page, uri, recursive, token, limit))
                yield found
                if token is None:
                    return

    # ------------------------------------------------------------ writing

    def write(self, uri: str, data: bytes) -> None:
        """Writes a file in one request, so that readers see the complete file or none."""
        self._write(uri, lambda: self._put(uri, data, False))

    def create(self, uri: str, data: bytes) -> bool:
        """Writes a file unless it exists. Returns True for the only caller that created it."""
        attempts = 0

        def attempt() -> None:
            nonlocal attempts
            attempts += 1
            self._put(uri, data, True)

        try:
            self._write(uri, attempt)
        except FileExistsError:
            # an attempt whose response was lost may have created it
            return (attempts > 1 or self.RESENDS) and self.read(uri) == data
        return True

    def upload(self, uri: str, open_source: Callable[[], AbstractContextManager[IO[bytes]]]) -> None:
        """Uploads the file that `open_source` opens, in parts if it is large."""
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(open_source())
            path = getattr(source, "name", None)
            if not isinstance(path, str):  # from a store; the library uploads only local files
                copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="upload-"))
                shutil.copyfileobj(source, copy, 16 << 20)
                copy.flush()
                path = copy.name
            self._write(uri, lambda: self._put_file(uri, path))

    def remove(self, uri: str) -> None:
        """Removes a file. A missing file is not an error."""
        self.refuse_writing(uri)
        if split(uri)[1]:  # never a complete bucket
            with contextlib.suppress(FileNotFoundError):
                self._try(uri, lambda: self._delete(uri))

    def refuse_writing(self, uri: str) -> None:
        """Raises UserError if addresses of this scheme are read-only."""
        if not self.WRITABLE:
            raise UserError(
                f"{redacted(uri)}: {uri.partition('://')[0]}:// can only be read; write to a local path, s3://, gs:// "
                "or az://"
            )

    def refuse_listing(self, uri: str) -> None:
        """Raises UserError if this scheme has no listings."""
        if not self.LISTS:
            raise UserError(
                f"{redacted(uri)}: files cannot be listed over {uri.partition('://')[0]}://; name a file (several with "
                "several addresses), or a prepared dataset"
            )

    def _write(self, uri: str, attempt: Callable[[], Any]) -> None:
        self.refuse_writing(uri)
        try:
            self._try(uri, attempt)
        except FileNotFoundError as error:
            raise StorageError(f"{uri}: no such {self.ROOT}; create it, or correct the address") from error

    # ------------------------------------------------------------ the retry policy

    def _try(self, uri: str, attempt: Callable[[], T]) -> T:
        endpoint = f"{type(self).__name__} {self.endpoint(uri)}"

        def answered() -> T:
            result = attempt()
            _answered.add(endpoint)
            return result

        def permanent(error: Exception) -> Exception | None:
            if self._status(error):
                _answered.add(endpoint)
            return self._permanent(redacted(uri), error)

        def patience() -> float:
            longest = policy.longest_patience()
            return longest if _answered & {endpoint, _ANY} else min(FIRST_PATIENCE, longest)

        return policy.retry(
            redacted(uri),
            answered,
            permanent,
            self.REMEDY,
            patience=patience,
            closing=self._closing,
            on_failure=self._count,
        )

    def _permanent(self, uri: str, error: Exception) -> Exception | None:
        """The exception for a permanent error, else None."""
        if isinstance(error, UserError):
            return error
        if reason := self._unsent(error):
            return UserError(f"{uri}: {reason}")
        status = self._status(error)
        if isinstance(error, FileNotFoundError) and str(error).startswith(uri):
            return error
        if status in (404, 416) or isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"{uri}: missing, or shorter than expected ({_words(error)})")
        if status == 412 or isinstance(error, FileExistsError):
            return FileExistsError(f"{uri}: exists already")
        if status in (401, 403):
            return UserError(f"{uri}: access denied ({_words(error)}); {self.ACCESS}")
        if 300 <= status < 500 and status not in TRY_AGAIN:
            return StorageError(f"{uri}: the store refuses: {_words(error)}; {self.REMEDY}")
        if status or self._may_pass(error):
            return None
        return UserError(f"{uri}: {_words(error)}; {self.REMEDY}") if isinstance(error, ValueError) else error

    def _count(self) -> None:
        with self._lock:
            self.retries += 1


class _OpenObject(io.RawIOBase):
    """The raw file of a BufferedReader."""

    def __init__(self, store: ObjectStore, uri: str, size: int) -> None:
        self.store, self.uri, self.size, self.position = store, uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if position < 0:
            raise OSError(22, f"negative position in {self.uri}")  # EINVAL, like a local file
        self.position = position
        return position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        data = self.store.read(self.uri, self.position, end, exact=True)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def expect_answers() -> None:
    """Marks the endpoints as known to respond. Called in a worker whose driver has read from the same stores, so that
    the worker waits as long for a store as the driver; a new process gives up sooner.
    """
    _answered.add(_ANY)


def split(uri: str) -> tuple[str, str]:
    """(bucket, key) of an address."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def split_folder(uri: str) -> tuple[str, str]:
    """(bucket, prefix of what lies below)."""
    bucket, key = split(uri.rstrip("/"))
    return bucket, f"{key}/" if key else ""


def check_range(data: bytes, content_range: str | None, start: int, end: int | None, exact: str | None) -> bytes:
    """The bytes of a range request, checked against the Content-Range of the response. exact: the address of a file
    that must have all the bytes. Raises Incomplete for a short response and FileNotFoundError for a short file.
    """
    if content_range is None:  # the store does not support ranges and sent the complete file
        data = data[start:end]
    else:
        extent, _, total = content_range.removeprefix("bytes ").partition("/")
        first, _, last_byte = extent.partition("-")
        last = int(last_byte) + 1
        if int(first) != start or len(data) != last - start:
            raise IncompleteResponse(f"{len(data)} of {last - start} bytes at {start}")
        if last < (end or 0) and total not in ("*", str(last)):
            raise IncompleteResponse(f"{len(data)} of {(end or 0) - start} bytes at {start}")
    if exact and end is not None and len(data) < end - start:
        raise too_short(exact, data, start, end)
    return data


def check_length(data: bytes, size: Callable[[], int], start: int, end: int | None, exact: str | None) -> bytes:
    """Like `check_range`, for a library that hides the response header. size:
    function that returns the size of the file."""
    if end is not None and len(data) < end - start:
        there = min(max(size() - start, 0), end - start)
        if len(data) != there:
            raise IncompleteResponse(f"{len(data)} of {there} bytes at {start}")
        if exact:
            raise too_short(exact, data, start, end)
    if end is not None and len(data) > end - start:
        raise IncompleteResponse(f"{len(data)} bytes instead of {end - start} at {start}")
    return data


def too_short(uri: str, data: bytes, start: int, end: int) -> FileNotFoundError:
    return FileNotFoundError(
        f"{redacted(uri)}: missing, or shorter than expected: {len(data)} of {end - start} bytes at {start}"
    )


def _words(error: Exception) -> str:
    """The message of an error in one line, without secrets, because libraries include complete addresses and pages."""
    return redacted(" ".join(str(error).split())[:500]) or type(error).__name__
