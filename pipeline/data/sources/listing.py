"""The files of a source, sorted or shuffled in constant memory.

A listing of more than SPILL_ROWS files is kept in memory-mapped temporary files. Sorting and shuffling distribute the
rows over buckets on disk, process each bucket in memory, and concatenate the buckets. No library does this without
another query engine: pyarrow sorts in memory only, and DuckDB would be needed for one sort and one shuffle.
"""

import contextlib
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.sources.items import LISTING
from pipeline.data.sources.words import JUNK
from pipeline.errors import UserError, plural
from pipeline.links import Roots, follow_link

SPILL_ROWS = 1 << 12  # rows of a listing that are held in memory at once
logger = logging.getLogger(__name__)


def address_of(uri: str, path: str) -> str:
    """The address of a listed file. Keeps the empty names of folders that object stores allow, as in photos//ant.jpg."""
    return f"{uri.rstrip('/')}/{path}"


class TooLarge(Exception):
    """Raised by `list_source` when it stops."""


def list_source(uri: str, stop: Callable[[int], bool] = lambda files: False) -> pa.Table:
    """The files under a folder as a table of schema LISTING, sorted by path; a single file has the path "".

    stop: whether to stop, and to raise TooLarge, after this number of files. Raises UserError for a folder that cannot be
    read, or that holds only hidden and system files.
    """
    files: Iterator[tuple[str, int]]
    if not storage.is_remote(uri):
        storage.refuse_special(uri)
        if os.path.isfile(uri):
            return listing([("", os.path.getsize(uri))])
        files = walk(uri, "")
    elif not storage.can_list(uri):
        try:
            return listing([("", storage.file_size(uri))])
        except FileNotFoundError as error:
            raise UserError(
                f"{uri}: no such file; name an archive or a Parquet file, since https:// has no folders"
            ) from error
    else:
        files = ((file.path, file.size) for page in storage.iter_pages(uri) for file in page)
    ignored, count = IgnoredFiles(), 0

    def parts() -> Iterator[pa.Table]:
        nonlocal count
        while part := list(itertools.islice(files, SPILL_ROWS)):
            yield ignored.without_ignored(listing(part))
            count += len(part)
            if stop(count):
                raise TooLarge

    return checked(uri, sort_by_path(spilled(parts(), LISTING)), ignored)


def checked(uri: str, found: pa.Table, ignored: "IgnoredFiles") -> pa.Table:
    """A sorted listing without its ignored files, or the listing of the single file. Raises UserError if there are only
    ignored files."""
    if not found.num_rows and storage.is_remote(uri) and storage.exists(uri):
        return listing([("", storage.file_size(uri))])
    if ignored.count and not found.num_rows:
        raise UserError(
            f"{uri}: only {plural(ignored.count, 'hidden or system file')}, such as {ignored.example}; to "
            "read a hidden folder, name the folder itself with --source"
        )
    if ignored.count:
        logger.info("%s: ignored %s, such as %s", uri, plural(ignored.count, "hidden or system file"), ignored.example)
    return found


class IgnoredFiles:
    """Removes hidden and system files from a listing, or from the members of an archive, and counts them."""

    def __init__(self) -> None:
        self.count, self.example = 0, ""

    def without_ignored(self, files: pa.Table) -> pa.Table:
        """The listing without hidden and system files."""
        junk = pc.match_substring_regex(files["path"], JUNK)
        if pc.any(junk).as_py():
            gone = files.filter(junk)["path"]
            self.count, self.example = self.count + len(gone), self.example or gone[0].as_py()
        return files.filter(pc.invert(junk))

    def has(self, member: str) -> bool:
        """Whether a member of an archive is a hidden or system file, which is counted."""
        if not re.search(JUNK, member):
            return False
        self.count, self.example = self.count + 1, self.example or member
        return True


def listing(files: Sequence[tuple[str, int]]) -> pa.Table:
    """(path, size) pairs as a table of schema LISTING."""
    paths, sizes = zip(*files, strict=True) if files else ((), ())
    return pa.table([pa.array(paths, pa.large_string()), pa.array(sizes, pa.int64())], schema=LISTING)


def walk(folder: str, prefix: str, roots: Roots = ()) -> Iterator[tuple[str, int]]:
    """(path, size in bytes) of the files below a local folder, whose paths begin with `prefix`."""
    for found in read_folder(folder, prefix, roots):
        if isinstance(found[1], int):
            yield found[0], found[1]
        else:
            yield from walk(os.path.join(folder, found[0][len(prefix) : -1]), found[0], found[1])


def read_folder(folder: str, prefix: str, roots: Roots = ()) -> Iterator[tuple[str, int | Roots]]:
    """What a local folder has: (path, size in bytes) of a file, (path/, its roots) of a folder, whose path is not yet text.
    Uses os.scandir: fsspec's listing takes ten times as long per file.

    roots: as in `follow_link`, which decides which links are followed; empty for the listed folder itself.
    Raises UserError for a folder that cannot be read; a missing one is empty.
    """
    try:
        roots = roots or (os.path.realpath(folder),)
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        raise UserError(f"{folder}: permission denied") from error
    except OSError as error:  # a link to itself, or a path that is too long
        raise UserError(f"{folder}: {error.strerror}") from error
    with entries:
        for entry in entries:
            if _is_folder(entry):
                below = follow_link(entry.path, roots) if entry.is_symlink() else roots
                if below:
                    yield f"{prefix}{entry.name}/", below
            else:
                # a name that is not valid UTF-8 becomes a reject when the file is read
                yield os.fsencode(f"{prefix}{entry.name}").decode("utf-8", "backslashreplace"), _size(entry)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a dangling link, which becomes a reject when it is read
        return 0


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which becomes a reject when it is read
        return False


# ---------------------------------------------------------------- tables larger than memory


def in_batches(table: pa.Table) -> Iterator[pa.Table]:
    """The table in slices of at most SPILL_ROWS rows."""
    return (table.slice(first, SPILL_ROWS) for first in range(0, table.num_rows, SPILL_ROWS))


def spilled(parts: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """The parts as one table: in memory if there is one part, otherwise in a memory-mapped temporary file."""
    parts = iter(parts)
    first = list(itertools.islice(parts, 2))
    if len(first) < 2:
        return first[0] if first else schema.empty_table()
    with tempfile.NamedTemporaryFile(prefix="listing-") as file:
        with pa.ipc.new_file(file.name, schema) as writer:
            for part in itertools.chain(first, parts):
                writer.write_table(part)
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def sort_by_path(files: pa.Table) -> pa.Table:
    """A listing sorted by path."""
    if files.num_rows <= SPILL_ROWS:
        return files.sort_by("path")
    places = np.linspace(0, files.num_rows - 1, SPILL_ROWS).astype(np.int64).tolist()
    sample = sorted(files["path"][place].as_py() for place in places)  # `take` would copy the whole column
    bounds = np.array(sample, object)[np.linspace(0, SPILL_ROWS - 1, _bucket_count(files) + 1).astype(np.int64)[1:-1]]
    return _by_bucket(files, lambda part: np.searchsorted(bounds, part["path"].to_numpy(), "right"), sort_by_path)


def shuffled(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    """The rows in a uniformly random order."""
    if table.num_rows <= SPILL_ROWS:
        return table.take(pa.array(rng.permutation(table.num_rows)))
    count = _bucket_count(table)
    return _by_bucket(table, lambda part: rng.integers(count, size=part.num_rows), lambda bucket: shuffled(bucket, rng))


def _bucket_count(table: pa.Table) -> int:
    """The number of buckets, for about SPILL_ROWS / 2 rows each; at most 256, since each bucket is an open file."""
    return min(256, 1 + 2 * table.num_rows // SPILL_ROWS)


def _by_bucket(
    table: pa.Table, partition: Callable[[pa.Table], np.ndarray], finalize: Callable[[pa.Table], pa.Table]
) -> pa.Table:
    """Distributes the rows over buckets on disk and concatenates `finalize(bucket)` of all buckets.

    `partition` returns the bucket number of every row. Memory holds at most one bucket.
    """
    with tempfile.TemporaryDirectory(prefix="listing-") as folder, contextlib.ExitStack() as stack:
        names = [f"{folder}/{i}" for i in range(_bucket_count(table))]
        writers = [stack.enter_context(pa.ipc.new_file(name, table.schema)) for name in names]
        for first in range(0, table.num_rows, SPILL_ROWS):
            part = table.slice(first, SPILL_ROWS).combine_chunks()
            buckets = partition(part)
            for i in np.unique(buckets).tolist():
                writers[i].write_table(part.filter(pa.array(buckets == i)))
        for writer in writers:
            writer.close()
        done = (finalize(pa.ipc.open_file(pa.memory_map(name)).read_all()) for name in names)
        return spilled(done, table.schema)
