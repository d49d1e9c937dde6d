"""Headers of tar archives, read in bounded memory.

tarfile holds the headers of a member in memory, whatever size they claim: long names, extended attributes, and the maps of
sparse members. A compressed archive of 1 MB could claim a gigabyte of them."""

import tarfile
from typing import Any, Self

MAX_HEADER_BYTES = 1 << 20
"""Bytes that may describe one member."""


class BoundedTarInfo(tarfile.TarInfo):
    """The header of a member, for `tarfile.open(tarinfo=BoundedTarInfo)`. Raises tarfile.ReadError for headers above
    MAX_HEADER_BYTES, and for those whose numbers are not numbers."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        return _read_bounded(super().fromtarfile, tarfile)


def _read_bounded(read: Any, archive: Any) -> Any:
    """The header that `read` reads from the archive, whose file is limited meanwhile."""
    whole = archive.fileobj
    archive.fileobj = whole if isinstance(whole, _Bounded) else _Bounded(whole)  # a header may be followed by another
    try:
        return read(archive)
    except (ValueError, OverflowError, RecursionError) as error:
        raise tarfile.ReadError(f"damaged header ({error})") from error
    finally:
        archive.fileobj = whole


class _Bounded:
    """A file of which MAX_HEADER_BYTES can be read."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES:,} bytes")
        return self.file.read(size)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, position: int) -> None:
        self.file.seek(position)
