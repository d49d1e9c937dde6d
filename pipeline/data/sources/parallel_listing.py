"""Lists a large source with many tasks, which mostly wait for the store. The result is the listing of `list_source`.

A unit of the work (`workqueue.run_growing`) lists for some seconds, writes what it found to files at the output, and leaves
the rest to several new units. A small source is listed in this process, without tasks. There are two kinds of units:

- a range of names, on stores that can list from any name on (s3://, gs://). `keyranges` divides the rest of the range,
  with or without folders in the names.
- some folders, elsewhere (az://, hf://, local folders). A folder without folders is listed by one task.

The files stay until the source is scanned, so that a killed command continues. They are used for STALE seconds, because
the source may change."""

import contextlib
import functools
import hashlib
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import cluster, storage, workqueue
from pipeline.data.sources import keyranges, listing
from pipeline.data.sources.items import LISTING
from pipeline.data.sources.listing import SPILL_ROWS, IgnoredFiles, TooLarge
from pipeline.errors import NotRead, StorageError, UserError
from pipeline.links import Roots
from pipeline.stores import Entry
from pipeline.workqueue import Receipts, unit_name

STALE = 6 * 3600.0  # seconds after which an unfinished listing begins again
PART_ROWS = 1 << 18  # rows of a file of a part
TASKS_PER_CPU, MOST_TASKS = 8, 128  # tasks wait for the store most of the time
FIRST_UNITS, IDLE_UNITS, UNITS = 64, 16, 4  # how many units the first one leaves, one of too few, and one of many
WHOLE_PAGES = 4  # pages of a folder that are listed with its folders, before each of these is listed alone
EVERY = 10.0  # seconds between two lines of the log
logger = logging.getLogger(__name__)

Unit = list[Any]  # ["names", after, upto, generation] or ["folders", [[path/, roots], ...], generation]
Write = Callable[[Sequence[tuple[str, int]]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelListing:
    """How a large source is listed."""

    folder: str
    """URI of the folder for the files of unfinished listings, which all nodes can write."""
    tasks: int | None = None
    """Number of tasks; None: TASKS_PER_CPU for each CPU of the cluster."""
    small_files: int = 50_000
    """A source stays in this process until it has more files ..."""
    small_seconds: float = 10.0
    """... and takes longer."""
    unit_seconds: float = 5.0
    """Time of the first units; later ones take up to four times as long, because there are more."""

    def parts(self, uri: str) -> str:
        """The folder of one source."""
        return storage.join(self.folder, hashlib.sha256(uri.encode()).hexdigest()[:16])

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Removes the files once the sources are scanned, and after an error in the input, which the user may correct. A
        command that was killed or that ended because of an outage continues with them."""
        try:
            yield
        except (StorageError, NotRead):
            raise
        except UserError:
            self.remove()
            raise
        self.remove()

    def remove(self) -> None:
        """Removes the files."""
        if storage.exists(self.folder):
            storage.remove(self.folder, recursive=True)
            if not storage.is_remote(self.folder):
                with contextlib.suppress(OSError):  # it has other files
                    os.rmdir(os.path.dirname(self.folder))


class Unsorted(Exception):
    """Raised if a store does not list by name, although it should."""


def list_source(uri: str, parallel: ParallelListing) -> pa.Table:
    """`listing.list_source`, which becomes parallel if the source is large, or if it was listed in parallel before the
    command was stopped."""
    begun = storage.join(parallel.parts(uri), "begun.json")
    if storage.exists(begun):
        return _list(uri, parallel, float(storage.read_record(begun, ["began"])["began"]))
    begin = time.monotonic()

    def is_large(files: int) -> bool:
        return files > parallel.small_files and time.monotonic() - begin > parallel.small_seconds

    try:
        return listing.list_source(uri, is_large)
    except TooLarge:
        return _list(uri, parallel, None)


def _list(uri: str, parallel: ParallelListing, began: float | None) -> pa.Table:
    """began: the time when a stopped listing began."""
    parts = parallel.parts(uri)
    if began is not None and time.time() - began > STALE:
        logger.warning("%s: the stopped listing is more than %d hours old and begins again", uri, STALE // 3600)
        storage.remove(parts, recursive=True)
        began = None
    if began is None:
        storage.write_json(storage.join(parts, "begun.json"), {"uri": uri, "began": time.time()})
    else:
        logger.info(
            "%s: the listing begun at %s continues; remove %s if the source has changed since then",
            uri, time.strftime("%H:%M:%S", time.localtime(began)), parts,
        )  # fmt: skip
    try:
        return _assembled(uri, parts, _run(uri, parts, parallel))
    except Unsorted as error:
        logger.warning("%s: the store does not list by name (%s); the source is listed by one process", uri, error)
        storage.remove(parts, recursive=True)
        return listing.list_source(uri)


def _run(uri: str, parts: str, parallel: ParallelListing) -> dict[str, dict[str, Any]]:
    """Lists the source. Returns the receipts of all units, with the names of the units that they left."""
    root: Unit = ["names", "", None, 0] if storage.lists_by_name(uri) else ["folders", [["", []]], 0]
    tasks = parallel.tasks or _tasks()
    logger.info("%s: many files; listing it with %d tasks", uri, tasks)
    units = workqueue.run_growing(
        root,
        _list_unit,
        receipts=Receipts(parts),
        context=(uri, parts, parallel.unit_seconds),
        tasks=tasks,
        num_cpus=1 / TASKS_PER_CPU,
    )
    found: dict[str, dict[str, Any]] = {}
    begin, logged, files = time.monotonic(), 0.0, 0
    for name, receipt in units:
        found[name] = receipt | {"rest": [unit_name(unit) for unit in receipt["rest"]]}
        files += sum(rows for _, rows in receipt["files"])
        seconds = time.monotonic() - begin
        if seconds - logged > EVERY:
            logged = seconds
            logger.info("%s: %s files listed, %s/s", uri, f"{files:,}", f"{files / seconds:,.0f}")
    logger.info("%s: %s files listed in %.1f s by %d units", uri, f"{files:,}", time.monotonic() - begin, len(found))
    return found


def _tasks() -> int:
    if not workqueue.uses_ray():
        return 1
    import ray

    cluster.connect()
    return int(min(MOST_TASKS, TASKS_PER_CPU * max(1, ray.cluster_resources().get("CPU", 0))))


def _assembled(uri: str, parts: str, receipts: dict[str, dict[str, Any]]) -> pa.Table:
    """The listing from the files of the units. Ranges of names are in order, so there is nothing to sort."""
    order, waiting = [], [next(iter(receipts))] if receipts else []
    while waiting:
        order.append(waiting.pop())
        waiting += reversed(receipts[order[-1]]["rest"])
    files = [(name, rows) for unit in order for name, rows in receipts[unit]["files"]]
    ignored = IgnoredFiles()
    ignored.count = sum(receipt["ignored"] for receipt in receipts.values())
    ignored.example = next((receipts[name]["example"] for name in order if receipts[name]["ignored"]), "")
    is_sorted, last = True, ""

    def batches() -> Iterator[pa.Table]:
        nonlocal is_sorted, last
        contents = storage.read_many((storage.join(parts, name) for name, _ in files), threads=4)
        for (name, rows), data in zip(files, contents, strict=True):
            if isinstance(data, FileNotFoundError):
                raise NotRead(f"{parts}/{name}: removed while {uri} was listed; remove {parts} and repeat the command")
            damaged = NotRead(f"{parts}/{name}: damaged; remove {parts} and repeat the command")
            try:
                table = pa.ipc.open_file(pa.BufferReader(data)).read_all().combine_chunks()
            except pa.ArrowException as error:
                raise damaged from error
            if table.num_rows != rows:
                raise damaged
            paths = table["path"]
            is_sorted &= last < paths[0].as_py() and pc.all(pc.less(paths[:-1], paths[1:])).as_py() is not False
            last = paths[-1].as_py()
            yield from listing.in_batches(table)

    found = listing.spilled(batches(), LISTING)
    return listing.checked(uri, found if is_sorted else listing.sort_by_path(found), ignored)


# ---------------------------------------------------------------- one unit


def _list_unit(unit: Unit, context: tuple[str, str, float], idle: bool) -> dict[str, Any]:
    """Lists for some seconds. Returns the files that it wrote with their numbers of rows, the number of ignored files with
    an example, and the units of the rest."""
    uri, parts, seconds = context
    kind, generation = unit[0], unit[-1]
    count = FIRST_UNITS if not generation else IDLE_UNITS if idle else UNITS
    seconds *= 0 if not generation else 0.2 if idle else 2 ** (min(generation, 3) - 1)
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="listing-") as scratch, _Part(parts, scratch) as part:
        if kind == "names":
            ranges = _list_names(part.write, uri, unit[1], unit[2], until, count)
            rest: list[Unit] = [["names", after, upto, generation + 1] for after, upto in ranges]
        else:
            folders = _list_folders(part.write, uri, unit[1], until)
            groups = (folders[i::count] for i in range(count))
            rest = [["folders", group, generation + 1] for group in groups if group]
    return {"files": part.files, "ignored": part.ignored.count, "example": part.ignored.example, "rest": rest}


class _Part:
    """Writes the files of a unit, without hidden and system files. Every attempt has its own names, because another attempt
    stops elsewhere."""

    def __init__(self, folder: str, scratch: str) -> None:
        self.folder, self.name, self._copy = folder, uuid.uuid4().hex, os.path.join(scratch, "part")
        self.files: list[tuple[str, int]] = []
        self.ignored = IgnoredFiles()
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._count = 0

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish()
        elif self._writer is not None:
            self._writer.close()

    def write(self, files: Sequence[tuple[str, int]]) -> None:
        """Adds (path, size) pairs."""
        for first in range(0, len(files), SPILL_ROWS):
            table = self.ignored.without_ignored(listing.listing(files[first : first + SPILL_ROWS]))
            if not table.num_rows:
                continue
            if self._writer is None:
                options = pa.ipc.IpcWriteOptions(compression="zstd")
                self._writer = pa.ipc.new_file(self._copy, LISTING, options=options)
            self._writer.write_table(table)
            self._count += table.num_rows
            if self._count >= PART_ROWS:
                self._finish()

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            name = f"{self.name}-{len(self.files)}.arrow"
            try:
                storage.copy_file(self._copy, storage.join(self.folder, name))
            except OSError as error:
                raise storage.not_written(self.folder, error) from error
            self.files.append((name, self._count))
        self._writer, self._count = None, 0


# ---------------------------------------------------------------- ranges of names


def _list_names(
    write: Write, uri: str, after: str, upto: str | None, until: float, count: int
) -> list[keyranges.Range]:
    """Lists the names greater than `after` and at most `upto`, at least one page. Returns about `count` ranges of what is
    left after the time `until`."""
    last = after
    for page in storage.iter_pages(uri, after=after):
        if not all(one.path < other.path for one, other in pairwise([Entry(last, 0, ""), *page])):
            raise Unsorted(f"{page[0].path} after {last}")
        within = [(file.path, file.size) for file in page if upto is None or file.path <= upto]
        write(within)
        if len(within) < len(page):
            return []
        last = within[-1][0] if within else last
        if time.monotonic() >= until:
            return keyranges.divide(functools.partial(_first, uri), last, upto, count)
    return []


def _first(uri: str, after: str) -> str | None:
    """The first name greater than `after`."""
    for page in storage.iter_pages(uri, after=after, limit=1):
        for file in page:
            if file.path <= after:
                raise Unsorted(f"{file.path} after {after}")
            return file.path
    return None


# ---------------------------------------------------------------- folders


def _list_folders(write: Write, uri: str, folders: Sequence[Any], until: float) -> list[Any]:
    """Lists folders and the folders in them, at least one. Returns the folders that are left after the time `until`."""
    expand = _expand_prefix if storage.is_remote(uri) else _expand_local
    waiting = [(path, tuple(roots)) for path, roots in reversed(folders)]
    while waiting:
        path, roots = waiting.pop()
        waiting += expand(write, uri, path, roots)
        if time.monotonic() >= until:
            break
    return [[path, roots] for path, roots in reversed(waiting)]


def _expand_local(write: Write, uri: str, path: str, roots: Roots) -> list[tuple[str, Roots]]:
    """Lists a local folder. Returns the folders in it."""
    if not os.path.isdir(uri):
        raise UserError(f"{uri}: no such folder on a node of the cluster; put the source where all nodes have it")
    found, folders = listing.read_folder(os.path.join(uri, path), path, roots), []
    while part := list(islice(found, SPILL_ROWS)):
        write([(name, size) for name, size in part if isinstance(size, int)])
        folders += [(name, inside) for name, inside in part if not isinstance(inside, int)]
    return folders


def _expand_prefix(write: Write, uri: str, path: str, roots: Roots) -> list[tuple[str, Roots]]:
    """Lists a folder of a store with everything in it, if that takes few pages, otherwise without its folders. Returns
    these."""
    place = storage.join(uri, path) if path else uri
    pages = list(islice(storage.iter_pages(place), WHOLE_PAGES))
    if len(pages) < WHOLE_PAGES:
        for page in pages:
            write([(path + file.path, file.size) for file in page])
        return []
    folders = []
    for page in storage.iter_pages(place, recursive=False):
        write([(path + file.path, file.size) for file in page if not file.is_folder])
        folders += [file.path for file in page if file.is_folder]
    if "" in folders:  # names such as a//b, in a folder that has no address
        for page in storage.iter_pages(place):
            write([(path + file.path, file.size) for file in page if file.path.startswith("/")])
    return [(f"{path}{folder}/", ()) for folder in dict.fromkeys(folders) if folder]
