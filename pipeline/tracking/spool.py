"""The durable buffer between a run and the tracking server: what is logged goes to disk first and to the server later.

Written here, because MLflow's asynchronous logging keeps its records in memory, where the end of the process loses them.

A folder per writer, under `spool_root()`:

    <id>/run.json         which run, experiment and server this is for
    <id>/metrics.jsonl    metrics, parameters, tags, end of the run; one JSON record a line
    <id>/artifacts.jsonl  artifacts, whose bytes lie in files/ (apart, so that a slow object store never delays metrics)
    <id>/rejected.jsonl   records that the server refused, with its reason; each upload offers them again
    <id>/lock             held (flock) while the writer lives: a folder whose lock is free belongs to nobody

A folder is removed only when the server has everything in it. Only its owner can read it.

Appending is one write(2) of a short line to the page cache: it survives the death of the process, takes tens of
microseconds and waits neither for the network nor for the thread that delivers. Sending again what may have been sent
already is harmless, because records carry their own time stamps and MLflow's key of a point is (run, metric, time, step,
value).
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

from pipeline.outputs import refuse_package_folder

MAX_BYTES = 1 << 30  # of one spool folder: past it, records are counted as lost rather than filling the disk
MAX_IN_MEMORY = 20_000  # records kept in memory when the disk refuses them
LOCK_PATIENCE = 0.1  # seconds; whoever holds the lock of a queue holds it for microseconds
# of one delivery, a thousand metrics or so: taking more apart at once would keep the interpreter from those who log
READ_BYTES = 1 << 15


def spool_root() -> str:
    """VIT_SPOOL, or a folder in the user's cache: never the working directory, which on Ray workers is temporary."""
    folder = os.environ.get("VIT_SPOOL") or os.path.expanduser("~/.cache/vit-pipeline/spool")
    refuse_package_folder(folder, "VIT_SPOOL")
    return os.path.abspath(folder)


class Queue:
    """An append-only file of JSON records with a read position: append from any thread, read and commit from one."""

    def __init__(self, path: str):
        self.path = path
        self.lost = 0  # records that neither disk nor memory could keep
        self.lock = threading.Lock()
        self._inbox: deque[tuple[dict, bytes]] = deque()  # appended while the lock was taken
        self._memory: deque[dict] = deque()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(self._file).st_size
        self._position = 0
        self._records = 0  # on disk and not yet committed
        self._read = (0, 0)  # records of the last read, and where it ended on disk (0: they came from memory)
        if self._size:  # left by an earlier process; a line torn by a power cut is dropped
            data = os.pread(self._file, self._size, 0)
            self._size = data.rfind(b"\n") + 1
            os.ftruncate(self._file, self._size)
            self._records = data.count(b"\n")

    def __len__(self) -> int:
        with self._holding():
            return len(self._inbox) + self._records + len(self._memory)

    def append(self, record: dict) -> None:
        """Writes a record, so that a killed process has left it on disk.

        Waits for the lock no longer than LOCK_PATIENCE: a signal handler may log while the code that it interrupted holds the
        lock. Such a record is written when the lock is given back.
        """
        self._inbox.append((record, _line(record)))
        if self.lock.acquire(timeout=LOCK_PATIENCE):
            try:
                self._write_inbox()
            finally:
                self.lock.release()

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """Holds the lock, then writes what was appended meanwhile."""
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
            # only metrics are many; what else there is, the end of the run above all, is never lost
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
                    os.ftruncate(self._file, self._size)  # takes a half-written line away
                if not many or len(self._memory) < MAX_IN_MEMORY:
                    self._memory.append(record)
                else:
                    self.lost += 1

    def read(self, limit: int) -> list[dict]:
        """Up to `limit` records from the read position; the same ones again until `commit`."""
        with self._holding():
            self._write_inbox()
            if self._records == 0:
                records = list(itertools.islice(self._memory, limit))
                self._read = (len(records), 0)
                return records
            position, limit = self._position, min(limit, self._records)
        lines: list[bytes] = []
        end = position
        with open(self.path, "rb") as file:  # without the lock: these lines stay as they are until `commit`
            file.seek(position)
            while len(lines) < limit and end - position < READ_BYTES:
                lines.append(file.readline())
                end += len(lines[-1])
        self._read = (len(lines), end)
        return [_parse(line) for line in lines]

    def commit(self) -> None:
        """Forgets the records of the last `read`; a file with none left is cut back to nothing."""
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
        """Writes what only memory holds to the disk, if that takes it now; what it refuses counts as lost."""
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
    """The record of a line; one that a damaged disk has changed becomes a record of kind "unreadable"."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("kind", ""), str):
            return record
    return {"kind": "unreadable", "line": line.decode(errors="replace")}


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def private_file(path: str, mode: str) -> IO[Any]:
    """`open`, but a new file can be read by its owner alone."""
    return open(path, mode, opener=_open_private)


class Spool:
    """One writer's folder. Opening it takes its lock; BlockingIOError when another process holds that."""

    def __init__(self, header: dict[str, Any] | None = None, folder: str | None = None):
        self.folder = folder or os.path.join(spool_root(), uuid.uuid4().hex)
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        os.makedirs(os.path.join(self.folder, "files"), mode=0o700, exist_ok=True)
        self.lock = os.open(os.path.join(self.folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.id = os.path.basename(self.folder)
            self.header = _read_header(self.folder) if header is None else header
        except (OSError, ValueError):
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
        """Keeps a copy of `data`, to be uploaded as the artifact `path`."""
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
        """Sets a record aside that the server refused. Raises OSError when the disk does not take it: the record then stays
        in its queue."""
        line = _line({**record, "reason": reason})
        with private_file(self._rejected_path, "ab") as file:
            file.write(line)
        self.rejected += 1

    def read_rejected(self) -> list[dict]:
        """The records that were set aside, with `reason`."""
        try:
            with open(self._rejected_path, "rb") as file:
                return [_parse(line) for line in file if line.strip()]
        except FileNotFoundError:
            return []

    def requeue_rejected(self) -> None:
        """Puts the refused records back into their queues: what they were refused for may have gone since."""
        for record in self.read_rejected():
            record.pop("reason", None)
            (self.artifacts if record.get("kind") == "artifact" else self.metrics).append(record)
        # Only now: after a crash in between both files have a record, and sending it twice is harmless.
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._rejected_path)
        self.rejected = 0

    # -------- the end

    @property
    def pending(self) -> int:
        return len(self.metrics) + len(self.artifacts)

    def close(self) -> bool:
        """Gives the folder up, and removes it when everything in it was delivered; says whether it was."""
        delivered = self.pending == 0 and self.rejected == 0
        self.metrics.close()
        self.artifacts.close()
        if delivered:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)
        return delivered

    def discard(self) -> None:
        """Gives the folder up and removes it, whatever it holds: the run was refused before any work."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_header(folder: str) -> dict[str, Any]:
    """run.json of a spool folder. Raises OSError, or ValueError when it is not what a spool writes."""
    with open(os.path.join(folder, "run.json"), "rb") as file:
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
class Waiting:
    """What lies in `spool_root()`: spools whose writer is gone, folders of living writers, folders that cannot be read."""

    abandoned: list[Spool] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    """{folder: why}"""


def look_up(run_id: str | None = None) -> Waiting:
    """The spools on this machine, oldest first; those of one run when `run_id` is given. The abandoned ones are locked for
    the caller, who closes them."""
    found = Waiting()
    try:
        entries = sorted(os.scandir(spool_root()), key=lambda entry: entry.stat().st_mtime)
    except FileNotFoundError:
        return found
    for entry in entries:
        if not entry.is_dir() or not os.path.exists(os.path.join(entry.path, "lock")):
            continue  # not a spool, or one that is being made this instant
        try:
            header = _read_header(entry.path)
            if run_id is None or run_id in (header["run_id"], offline_id(entry.name)):
                found.abandoned.append(Spool(folder=entry.path))
        except BlockingIOError:
            found.in_use.append(entry.path)
        except (OSError, ValueError) as error:
            if any(os.path.exists(os.path.join(entry.path, name)) for name in ("metrics.jsonl", "artifacts.jsonl")):
                found.unreadable[entry.path] = f"run.json: {error}"
    return found


def offline_id(spool_id: str) -> str:
    """The id of a run that was started while its server could not be reached."""
    return f"offline-{spool_id}"
