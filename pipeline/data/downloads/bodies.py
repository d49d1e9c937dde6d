"""The bodies of responses: in memory, or in temporary files when they are large or all bodies together take much
memory."""

import os
import tempfile
import threading
from typing import IO

from pipeline import storage

MEMORY_BYTES = 2 << 20  # a larger body becomes a temporary file


class Memory:
    """The memory that several bodies share: at most `limit` bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._mutex = threading.Lock()

    def take(self, size: int) -> bool:
        """Reserves memory. Returns False if that would exceed the limit."""
        with self._mutex:
            if self.used + size > self.limit:
                return False
            self.used += size
            return True

    def give(self, size: int) -> None:
        """Releases reserved memory."""
        with self._mutex:
            self.used -= size


class Body:
    """The body of a response, which is written once and then read any number of times. `with` closes it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._data = bytearray()
        self._file: IO[bytes] | None = None
        self.size = 0

    @property
    def is_on_disk(self) -> bool:
        return self._file is not None

    def __enter__(self) -> "Body":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, part: bytes) -> None:
        """Raises NotWritten if the temporary folder is full or cannot be written."""
        if self._file is None and self.size + len(part) <= MEMORY_BYTES and self._memory.take(len(part)):
            self._data += part
        else:
            try:
                self._write_to_disk(part)
            except OSError as error:
                raise storage.not_written(None, error) from error
        self.size += len(part)

    def _write_to_disk(self, part: bytes) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            part = bytes(self._data) + part
            self._free()
        rest = memoryview(part)
        while rest:
            rest = rest[self._file.write(rest) :]

    def head(self, size: int) -> bytes:
        """The first bytes."""
        if self._file is None:
            return bytes(self._data[:size])
        self._file.seek(0)
        data = self._file.read(size)
        self._file.seek(0, os.SEEK_END)
        return data

    def read(self) -> bytes:
        """All bytes."""
        return self.head(self.size)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._free()

    def _free(self) -> None:
        self._memory.give(len(self._data))
        self._data = bytearray()
