"""A durable buffer between a run and the tracking server: records are written to disk first and sent to the server
later.

MLflow's asynchronous logging is not used because it keeps records in memory, where they are lost when the process ends.

Each writer has a folder under `spool_root()`:

    <id>/run.json         run, experiment and server of the records
    <id>/metrics.jsonl    metrics, parameters, tags, end of the run; one JSON record per line
    <id>/artifacts.jsonl  artifacts; their bytes are in files/. A queue of its own: a slow store does not delay metrics
    <id>/rejected.jsonl   records that the server refused, with the reason; every upload sends them again
    <id>/lock             locked (flock) while the writer lives; a folder with a free lock is abandoned

    A folder is removed only after the server has all its records. Only its owner can read it.

    Appending a record is one write(2) of a short line to the page cache. It survives the end of the process, takes tens
    of microseconds, and does not wait for the network or the delivery thread. Sending a record twice is harmless,
    because records have time stamps and MLflow identifies a point by (run, metric, time, step, value).
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.outputs import check_output, refuse_package_folder

MAX_BYTES = 1 << 30  # maximum size of a spool folder; further metrics are dropped and counted as lost
MAX_IN_MEMORY = 20_000  # maximum number of records in memory while the disk is full
FILES = ("run.json", "metrics.jsonl", "artifacts.jsonl", "rejected.jsonl")
LOCK_PATIENCE = 0.1  # seconds to wait for the lock of a queue, which is held for microseconds
# bytes per delivery, about a thousand metrics; parsing more at once would delay the threads that log
READ_BYTES = 1 << 15


def spool_root() -> str:
    """The folder of all spools: VIT_SPOOL, or a folder in the user's cache. The
    working directory of Ray workers is temporary."""
    folder = os.environ.get("VIT_SPOOL") or os.path.expanduser("~/.cache/vit-pipeline/spool")
    refuse_package_folder(folder, "VIT_SPOOL")
    return os.path.abspath(folder)


def check_spool() -> None:
    """Raises UserError if records cannot be kept until the server has them."""
    check_output(spool_root(), "VIT_SPOOL")


class Queue:
    """An append-only file of JSON records with a read position. Any thread may
    append; one thread may read and commit."""

    def __init__(self, path: str):
        self.path = path
        self.lost = 0  # records that fitted neither on disk nor in memory
        self.lock = threading.Lock()
        self._inbox: deque[tuple[dict, bytes]] = deque()  # appended while another thread held the lock
        self._memory: deque[dict] = deque()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(self._file).st_size
        self._position = 0
        self._records = 0  # records on disk that are not committed
        self._read = (0, 0)  # number of records of the last read, and its end position on disk (0: read from memory)
        if self._size:  # left by an earlier process; an incomplete last line is dropped
            data = os.pread(self._file, self._size, 0)
            self._size = data.rfind(b"\n") + 1
            os.ftruncate(self._file, self._size)
            self._records = data.count(b"\n")

    def __len__(self) -> int:
        with self._holding():
            return len(self._inbox) + self._records + len(self._memory)

    def append(self, record: dict) -> None:
        """Writes a record to disk, so that it survives a kill of the process.

        Waits for the lock for at most LOCK_PATIENCE, because a signal handler may log while the interrupted code holds
        the lock. Such a record is written when the lock is released.
        """
        self._inbox.append((record, _line(record)))
        if self.lock.acquire(timeout=LOCK_PATIENCE):
            try:
                self._write_inbox()
            finally:
                self.lock.release()

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """Holds the lock, then writes the records that were appended meanwhile."""
        with self.lock:
            yield
        while self._inbox and self.lock.acquire(blocking=False):
            try:
                self._write_inbox()
            finally:
                self.lock.release()

    def _write_inbox(self) -> None:
        while self._inbox:
            record, line = self._inbox.popleft()
            # only metrics may be dropped; other records are few and must not be lost
            many = record.get("kind", "metrics") == "metrics"
            try:
                if many and self._size + len(line) > MAX_BYTES:
                    self.lost += 1
                    continue
                if os.write(self._file, line) != len(line):
                    raise OSError("disk full")
                self._size += len(line)
                self._records += 1
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)  # removes a partially written line
                if not many or len(self._memory) < MAX_IN_MEMORY:
                    self._memory.append(record)
                else:
                    self.lost += 1

    def read(self, limit: int) -> list[dict]:
        """Up to `limit` records from the read position. Returns the same records until `commit` is called."""
        with self._holding():
            self._write_inbox()
            if self._records == 0:
                records = list(itertools.islice(self._memory, limit))
                self._read = (len(records), 0)
                return records
            position, limit = self._position, min(limit, self._records)
        lines: list[bytes] = []
        end = position
        with open(self.path, "rb") as file:  # no lock is needed: these lines do not change before `commit`
            file.seek(position)
            while len(lines) < limit and end - position < READ_BYTES:
                lines.append(file.readline())
                end += len(lines[-1])
        self._read = (len(lines), end)
        return [_parse(line) for line in lines]

    def commit(self) -> None:
        """Removes the records of the last `read` from the queue, and truncates the file
        if it has no further records."""
        with self._holding():
            count, end = self._read
            if end == 0:
                for _ in range(count):
                    self._memory.popleft()
                return
            self._records -= count
            self._position = end
            if self._records == 0:
                os.ftruncate(self._file, 0)
                self._size = self._position = 0

    def close(self) -> None:
        """Tries to write records in memory to disk. Records that do not fit are counted as lost."""
        with self.lock:
            self._inbox.extendleft((record, _line(record)) for record in reversed(self._memory))
            self._memory.clear()
            self._write_inbox()
            self.lost += len(self._memory)
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1


def _line(record: dict) -> bytes:
    return (json.dumps(record, separators=(",", ":")) + "\n").encode()


def _parse(line: bytes) -> dict:
    """The record in a line; a damaged line becomes a record of kind "unreadable"."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("kind", ""), str):
            return record
    return {"kind": "unreadable", "line": line.decode(errors="replace")}


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def private_file(path: str, mode: str) -> IO[Any]:
    """Like `open`, but only the owner can read a new file."""
    return open(path, mode, opener=_open_private)


class Spool:
    """The folder of one writer. Opening it takes its lock; raises BlockingIOError if another process holds the lock."""

    def __init__(self, header: dict[str, Any] | None = None, folder: str | None = None):
        self.folder = folder or os.path.join(spool_root(), uuid.uuid4().hex)
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        os.makedirs(os.path.join(self.folder, "files"), mode=0o700, exist_ok=True)
        self.lock = os.open(os.path.join(self.folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.id = os.path.basename(self.folder)
            self.header = _read_header(self.folder) if header is None else header
            for name in FILES:
                storage.refuse_special(os.path.join(self.folder, name))
        except (OSError, ValueError, UserError):
            os.close(self.lock)
            raise
        self.save_header()
        self.metrics = Queue(os.path.join(self.folder, "metrics.jsonl"))
        self.artifacts = Queue(os.path.join(self.folder, "artifacts.jsonl"))
        self.rejected = len(self.read_rejected())

    def save_header(self) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop a run
            temporary = os.path.join(self.folder, "run.json.tmp")
            with private_file(temporary, "w") as file:
                json.dump(self.header, file)
            os.replace(temporary, os.path.join(self.folder, "run.json"))

    def add_artifact(self, path: str, data: bytes) -> None:
        """Stores a copy of `data`, to be uploaded as the artifact `path`."""
        copy = os.path.join(self.folder, "files", uuid.uuid4().hex)
        try:
            with private_file(copy, "wb") as file:
                file.write(data)
        except OSError:
            self.artifacts.lost += 1
            with contextlib.suppress(OSError):
                os.remove(copy)
            return
        self.artifacts.append({"kind": "artifact", "file": os.path.basename(copy), "path": path})

    # -------- records that the server refused

    @property
    def _rejected_path(self) -> str:
        return os.path.join(self.folder, "rejected.jsonl")

    def reject(self, record: dict, reason: str) -> None:
        """Moves a record that the server refused to rejected.jsonl. Raises OSError if the disk
        is full; the record then stays in its queue."""
        line = _line({**record, "reason": reason})
        with private_file(self._rejected_path, "ab") as file:
            file.write(line)
        self.rejected += 1

    def read_rejected(self) -> list[dict]:
        """The records that the server refused, with `reason`."""
        try:
            with open(self._rejected_path, "rb") as file:
                return [_parse(line) for line in file if line.strip()]
        except FileNotFoundError:
            return []

    def requeue_rejected(self) -> None:
        """Puts refused records back into their queues, since the cause may have been corrected."""
        for record in self.read_rejected():
            record.pop("reason", None)
            (self.artifacts if record.get("kind") == "artifact" else self.metrics).append(record)
        # The file is removed last: after a crash both files have the records, and sending them twice is harmless.
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._rejected_path)
        self.rejected = 0

    # -------- the end

    @property
    def pending(self) -> int:
        return len(self.metrics) + len(self.artifacts)

    def close(self) -> bool:
        """Releases the folder, and removes it if all records were delivered. Returns whether they were."""
        delivered = self.pending == 0 and self.rejected == 0
        self.metrics.close()
        self.artifacts.close()
        if delivered:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)
        return delivered

    def discard(self) -> None:
        """Releases and removes the folder with its records, because the run was refused before any work."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_header(folder: str) -> dict[str, Any]:
    """run.json of a spool folder. Raises OSError or UserError if it cannot be read, and ValueError if its content is invalid."""
    with storage.open_regular(os.path.join(folder, "run.json")) as file:
        try:
            header = json.load(file)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
    if not isinstance(header, dict) or not all(
        isinstance(header.get(key), str) for key in ("uri", "experiment", "name")
    ):
        raise ValueError("not the run.json of a spool")
    if not all(isinstance(header.get(key), str | None) for key in ("run_id", "parent_id")):
        raise ValueError("not the run.json of a spool")
    if not isinstance(header.get("tags"), dict) or not isinstance(header.get("start_time"), int):
        raise ValueError("not the run.json of a spool")
    return header


@dataclass(slots=True)
class SpoolFolders:
    """The folders in `spool_root()`: spools whose writer has ended, folders of
    active writers, and unreadable folders."""

    abandoned: list[Spool] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    """{folder: reason}"""


def find_spools(run_id: str | None = None) -> SpoolFolders:
    """The spools on this machine, oldest first; with `run_id`, only those of one run. Abandoned spools are locked, and
    the caller must close them. Raises UserError if the folder of the spools cannot be read."""
    found = SpoolFolders()
    try:
        entries = sorted(os.scandir(spool_root()), key=lambda entry: entry.stat().st_mtime)
    except FileNotFoundError:
        return found
    except OSError as error:
        raise UserError(f"VIT_SPOOL {spool_root()}: {error.strerror}; name the folder that has the records") from error
    for entry in entries:
        # A copy of a spool, for example from a backup, may have no lock.
        if not entry.is_dir() or not any(os.path.lexists(os.path.join(entry.path, name)) for name in ("lock", *FILES)):
            continue  # not a spool, or one that is being created
        try:
            header = _read_header(entry.path)
            if run_id is None or run_id in (header["run_id"], offline_id(entry.name)):
                found.abandoned.append(Spool(folder=entry.path))
        except BlockingIOError:
            found.in_use.append(entry.path)
        except (OSError, ValueError, UserError) as error:
            if any(os.path.lexists(os.path.join(entry.path, name)) for name in FILES):
                found.unreadable[entry.path] = str(error) if isinstance(error, UserError) else f"run.json: {error}"
    return found


def offline_id(spool_id: str) -> str:
    """The id of a run that was started while its server could not be reached."""
    return f"offline-{spool_id}"
