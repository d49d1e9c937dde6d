"""Lists the examples of a data set and reads their image files."""

from collections.abc import Iterable, Iterator, Sequence

from pipeline.errors import UserError
from pipeline.vtab.containers import MALFORMED
from pipeline.vtab.datasets import get_dataset
from pipeline.vtab.datasets.base import ArchiveFile, FoundFile, Listing, Member


def list_examples(name: str, found: Iterable[FoundFile]) -> list[Listing]:
    """Every example of a data set. Raises UserError naming the archive that is damaged or not laid out as expected."""
    files = {file.file.name: file for file in found}
    where = ", ".join(file.uri for file in files.values())
    try:
        listings = get_dataset(name).index(files)
    except MALFORMED as error:
        raise UserError(f"{where}: not laid out as {name} is ({type(error).__name__}: {error})") from error
    if not any(len(listing.keys) for listing in listings):
        raise UserError(f"{where}: contains no example of {name}")
    return listings


def read_images(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """(member, image file) of the members asked for: in their order with random access, else in the archive's.

    Members that the file lacks are left out. Raises UserError naming an archive that is damaged.
    """
    try:
        yield from file.read(file, members)
    except (*MALFORMED, OSError) as error:  # OSError: HDF5 over damaged chunks
        raise UserError(f"{file.uri}: not laid out as expected ({type(error).__name__}: {error})") from error
