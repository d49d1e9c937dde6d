"""The durable buffer between a run and the tracking server: what is logged goes to disk first and to the server later.

A folder per writer, under `spool_root()`:

    <id>/run.json         which run, experiment and server this is for
    <id>/metrics.jsonl    metrics, parameters, tags, end of the run; one JSON record a line
    <id>/artifacts.jsonl  artifacts, whose bytes lie in files/ (apart, so that a slow object store never delays metrics)
    <id>/rejected.jsonl   records that the server refused for good, with its reason
    <id>/lock             held (flock) while the writer lives: a folder whose lock is free belongs to nobody

Appending is one write(2) of a short line to the page cache: it survives the death of the process, takes tens of
microseconds and waits neither for the network nor for the thread that delivers. Sending again what may have been sent already is harmless, because records
carry their own time stamps and MLflow's key of a point is (run, metric, time, step, value).
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
from typing import Any

MAX_BYTES = 1 << 30  # of one spool folder: past it, records are counted as lost rather than filling the disk
MAX_IN_MEMORY = 20_000  # records kept in memory when the disk refuses them
# of one delivery, a thousand metrics or so: taking more apart at once would keep the interpreter from those who log
READ_BYTES = 1 << 15


def spool_root() -> str:
    """VIT_SPOOL, or a folder in the user's cache: never the working directory, which on Ray workers is temporary."""
    return os.environ.get("VIT_SPOOL") or os.path.expanduser("~/.cache/vit-pipeline/spool")


class Queue:
    """An append-only file of JSON records with a read position: append from any thread, read and commit from one."""

    def __init__(self, path: str):
        self.path = path
        self.lost = 0  # records that neither disk nor memory could keep
        self._lock = threading.Lock()
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
        with self._lock:
            return len(self._inbox) + self._records + len(self._memory)

    def append(self, record: dict) -> None:
        """Never waits for the lock: a record that finds it taken is written by whoever takes it next."""
        line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        self._inbox.append((record, line))
        if self._lock.acquire(blocking=False):
            try:
                self._write_inbox()
            finally:
                self._lock.release()

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
        with self._lock:
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
        return [json.loads(line) for line in lines]

    def commit(self) -> None:
        """Forgets the records of the last `read`; a file with none left is cut back to nothing."""
        with self._lock:
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
        with self._lock:
            self._write_inbox()
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1


class Spool:
    """One writer's folder. Opening it takes its lock; BlockingIOError when another process holds that."""

    def __init__(self, header: dict[str, Any] | None = None, folder: str | None = None):
        self.folder = folder or os.path.join(spool_root(), uuid.uuid4().hex)
        os.makedirs(os.path.join(self.folder, "files"), mode=0o700, exist_ok=True)
        self._lock = os.open(os.path.join(self.folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise
        self.id = os.path.basename(self.folder)
        if header is None:
            with open(os.path.join(self.folder, "run.json")) as file:
                header = json.load(file)
        self.header = header
        self.save_header()
        self.metrics = Queue(os.path.join(self.folder, "metrics.jsonl"))
        self.artifacts = Queue(os.path.join(self.folder, "artifacts.jsonl"))
        self.rejected = 0

    def save_header(self) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop a run
            temporary = os.path.join(self.folder, "run.json.tmp")
            with open(temporary, "w") as file:
                json.dump(self.header, file)
            os.replace(temporary, os.path.join(self.folder, "run.json"))

    def add_artifact(self, path: str, data: bytes) -> None:
        """Keeps a copy of `data`, to be uploaded as the artifact `path`."""
        copy = os.path.join(self.folder, "files", uuid.uuid4().hex)
        try:
            with open(copy, "wb") as file:
                file.write(data)
        except OSError:
            self.artifacts.lost += 1
            with contextlib.suppress(OSError):
                os.remove(copy)
            return
        self.artifacts.append({"kind": "artifact", "file": os.path.basename(copy), "path": path})

    def reject(self, record: dict, reason: str) -> None:
        self.rejected += 1
        with contextlib.suppress(OSError), open(os.path.join(self.folder, "rejected.jsonl"), "a") as file:
            file.write(json.dumps({"reason": reason, **record}) + "\n")

    @property
    def pending(self) -> int:
        return len(self.metrics) + len(self.artifacts)

    def close(self) -> bool:
        """Gives the folder up; removes it when everything in it was delivered (and says so)."""
        delivered = self.pending == 0 and self.rejected == 0
        self.metrics.close()
        self.artifacts.close()
        if delivered:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        return delivered


def abandoned(run_id: str | None = None) -> list[Spool]:
    """Spools whose writer is gone, oldest first, locked for the caller; only those of one run when `run_id` is given."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.scandir(spool_root()), key=lambda entry: entry.stat().st_mtime):
            header_path = os.path.join(entry.path, "run.json")
            try:
                with open(header_path) as file:
                    header = json.load(file)
                if run_id is None or run_id in (header["run_id"], offline_id(entry.name)):
                    found.append(Spool(folder=entry.path))
            except (OSError, ValueError, KeyError):  # locked by its writer, or being written this instant
                continue
    return found


def offline_id(spool_id: str) -> str:
    """The id of a run that was started while its server could not be reached."""
    return f"offline-{spool_id}"
