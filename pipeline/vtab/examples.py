"""Lists the examples of a data set and reads their image files."""

from collections.abc import Iterable, Iterator, Sequence

from pipeline.errors import UserError
from pipeline.vtab.containers import MALFORMED
from pipeline.vtab.datasets import get_dataset
from pipeline.vtab.datasets.base import ArchiveFile, FoundFile, Listing, Member


def list_examples(name: str, found: Iterable[FoundFile]) -> list[Listing]:
    """All examples of a data set. Raises UserError that names the archive if it is
    damaged or has an unexpected layout."""
    files = {file.file.name: file for file in found}
    where = ", ".join(file.uri for file in files.values())
    try:
        listings = get_dataset(name).index(files)
    except MALFORMED as error:
        raise UserError(f"{where}: not the layout of {name} ({type(error).__name__}: {error})") from error
    if not any(len(listing.keys) for listing in listings):
        raise UserError(f"{where}: contains no examples of {name}")
    return listings


def read_images(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """Yields (member, image file) of the requested members: in their order with random access, otherwise in archive
    order. Missing members are skipped. Raises UserError that names the archive if it is damaged.
    """
    try:
        yield from file.read(file, members)
    except (*MALFORMED, OSError) as error:  # OSError: HDF5 at damaged chunks
        raise UserError(f"{file.uri}: unexpected layout ({type(error).__name__}: {error})") from error
