"""Joins the files of a folder with the rows of large label tables, on Ray Data.

Files and rows are distributed over buckets by a hash of `join_key`, which a file and its row have in common. A task then
matches the files and the rows of a bucket, some ten thousand at a time, by the same rules as for small tables. So no
process holds a table or a listing. Without Ray (`workqueue.without_ray`), all buckets are in this process.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline import workqueue
from pipeline.data.sources import listing
from pipeline.data.sources.items import FRAGMENTS, NO_ROW, fragments_of_files, with_rows
from pipeline.data.sources.large_tables import LargeTable
from pipeline.data.sources.naming import MAX_COMPARED, Naming, RowMatcher, check_rows
from pipeline.data.sources.table_chunks import Chunk
from pipeline.data.sources.tables import LabelTable, clean_path, join_key, table_of_rows
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

BUCKET_ENTRIES = 1 << 17  # files and rows of a bucket, which a task holds as Arrow data
GROUP_ENTRIES = 1 << 14  # files and rows that are matched at a time, as Python objects
BUCKETS = (4, 256)  # minimum and maximum number
ENTRY_BYTES = 100  # approximate size of a file or a row
BLOCK_FILES = 1 << 16  # files of a block of the listing

FILE, ROW, PROBLEM = 0, 1, 2  # kinds of entries
ENTRIES = pa.schema(
    [
        ("bucket", pa.int32()),
        ("group", pa.int32()),  # part of the bucket
        ("kind", pa.int8()),
        ("folder", pa.large_string()),  # folder of the table
        ("key", pa.large_string()),  # path of a file, or normalised file name of a row
        ("size", pa.int64()),  # bytes of a file
        ("number", pa.int64()),  # number of a row in its table
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),
    ]
)
JOINED = pa.schema(
    [
        *(FRAGMENTS.field(name) for name in ("path", "size", "labels", "split", "row")),
        ("kind", pa.int8()),  # FILE; ROW for a row without a file; PROBLEM for an error, whose text is the path
        ("folder", pa.large_string()),
        ("number", pa.int64()),  # of the row; -1 for a file without a row
        ("multilabel", pa.bool_()),  # whether rows of this part of the table have several labels
    ]
)


@dataclass
class Counts:
    """Rows of one table."""

    matched: int = 0
    gone: int = 0
    example: tuple[int, str] = (-1, "")
    """Number and path of the first row without a file."""


@dataclass(kw_only=True)
class Joined:
    """The files and rows of a source, after the join."""

    files: pa.Table
    """Schema FRAGMENTS, sorted by path."""
    gone: pa.Table
    """Rows without a file, in the same schema."""
    names: set[str] = field(default_factory=set)
    multilabel: bool = False
    counts: dict[str, Counts] = field(default_factory=dict)
    """By folder of the table."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What every task needs to know."""

    naming: Naming
    tables: dict[str, LabelTable]
    """By folder."""
    chunks: list[tuple[str, Chunk | None]]
    """(folder of the table, chunk); None for a table in memory."""
    is_document: Callable[[str], bool]
    buckets: int
    groups: int


def has_large_tables(naming: Naming) -> bool:
    return any(isinstance(table, LargeTable) for table in naming.by_folder_of_table().values())


def join_files(uri: str, files: pa.Table, naming: Naming, is_document: Callable[[str], bool]) -> Joined:
    """Joins files with the rows of label tables.

    files: schema LISTING. is_document: whether a path is that of a document, which has no label. Raises UserError if a
    row matches two files or if no row of a table matches a file."""
    tables = naming.by_folder_of_table()
    large = {folder: table for folder, table in tables.items() if isinstance(table, LargeTable)}
    entries = files.num_rows + sum(table.rows for table in large.values())
    buckets = min(max(BUCKETS[0], entries // BUCKET_ENTRIES), BUCKETS[1])
    chunks: list[tuple[str, Chunk | None]] = [(folder, chunk) for folder in large for chunk in large[folder].chunks]
    plan = _Plan(
        naming=naming,
        tables=tables,
        chunks=[*chunks, *((folder, None) for folder in tables.keys() - large.keys())],
        is_document=is_document,
        buckets=buckets,
        groups=1 + entries // buckets // GROUP_ENTRIES,
    )
    logger.info("%s: joining %d files with %d rows of labels", uri, files.num_rows, entries - files.num_rows)
    found = Joined(files=FRAGMENTS.empty_table(), gone=FRAGMENTS.empty_table())
    joined = listing.spilled((_counted(part, found) for part in _matched(files, plan)), JOINED)
    found.files, found.gone = (_sorted(joined, kind) for kind in (FILE, ROW))
    for folder, counts in found.counts.items():
        if counts.gone:
            some = files["path"].slice(0, MAX_COMPARED).to_pylist()
            rows, example = counts.matched + counts.gone, counts.example[1]
            check_rows(uri, tables[folder].uri, folder, rows, counts.gone, example, some)
    return found


def _counted(part: pa.Table, found: Joined) -> pa.Table:
    """Adds a part of the result to the counts. Raises UserError for the problem of a task."""
    problems = part.filter(pc.equal(part["kind"], PROBLEM))
    if problems.num_rows:
        raise UserError(min(problems["path"].to_pylist()))
    found.names.update(pc.unique(pc.list_flatten(part["labels"])).drop_null().to_pylist())
    found.multilabel |= bool(pc.any(part["multilabel"]).as_py())
    for folder in pc.unique(part["folder"]).drop_null().to_pylist():
        here = part.filter(pc.equal(part["folder"], folder))
        counts, gone = found.counts.setdefault(folder, Counts()), here.filter(pc.equal(here["kind"], ROW))
        matched = pc.and_(pc.equal(here["kind"], FILE), pc.greater_equal(here["number"], 0))
        counts.matched += pc.sum(matched).as_py() or 0
        if gone.num_rows:
            counts.gone += gone.num_rows
            first = int(np.argmin(gone["number"].to_numpy()))
            example = gone["number"][first].as_py(), gone["path"][first].as_py()[len(folder) + bool(folder) :]
            counts.example = min(counts.example, example) if counts.example[1] else example
    return part


def _sorted(joined: pa.Table, kind: int) -> pa.Table:
    """The fragments of one kind, sorted by path."""

    def fragments() -> Iterator[pa.Table]:
        for part in listing.in_batches(joined):
            part = part.filter(pc.equal(part["kind"], kind))
            if part.num_rows:
                yield with_rows(fragments_of_files(part, part["labels"], part["split"]), part["row"])

    return listing.sort_by_path(listing.spilled(fragments(), FRAGMENTS))


# ---------------------------------------------------------------- files and rows -> buckets


def _matched(files: pa.Table, plan: _Plan) -> Iterator[pa.Table]:
    """The parts of the result, in any order."""
    blocks = (files.slice(first, BLOCK_FILES).combine_chunks() for first in range(0, files.num_rows, BLOCK_FILES))
    if not workqueue.uses_ray():
        parts = [part for i in range(len(plan.chunks)) for part in _entries_of_chunk(i, plan)]
        parts += [_entries_of_files(block, plan) for block in blocks]
        yield match_bucket(pa.concat_tables(parts), plan)
        return
    import ray

    entries_in_all = files.num_rows + sum(getattr(table, "rows", 0) for table in plan.tables.values())
    workqueue.prepare_shuffle(ENTRY_BYTES * entries_in_all, plan.buckets)
    shared = {"plan": [ray.put(plan)]}  # in a list, because Ray would copy the value of a direct reference
    one_task: dict[str, Any] = {"batch_size": None, "fn_kwargs": shared}
    tasks: Any = (_chunk_task, _files_task, _match_task)  # Ray's stubs do not support functions of Arrow tables
    refs: Any = [ray.put(block) for block in blocks]
    with workqueue.errors_of_tasks():  # `from_arrow_refs` starts tasks, too
        items = [{"chunk": i} for i in range(len(plan.chunks))]
        chunks = ray.data.from_items(items, override_num_blocks=len(items))
        listed = ray.data.from_arrow_refs(refs).map_batches(tasks[1], batch_format="pyarrow", **one_task)
        entries = chunks.map_batches(tasks[0], **one_task).union(listed)
        matched = entries.groupby("bucket", num_partitions=plan.buckets).map_groups(
            tasks[2], batch_format="pyarrow", fn_kwargs=shared
        )
        for batch in matched.iter_batches(batch_size=listing.SPILL_ROWS, batch_format="pyarrow"):
            yield cast("pa.Table", batch).cast(JOINED)


def _chunk_task(batch: Mapping[str, Any], plan: list[Any]) -> Iterator[pa.Table]:
    import ray

    yield ENTRIES.empty_table()  # Ray Data cannot shuffle a block without columns
    for i in batch["chunk"].tolist():
        yield from _entries_of_chunk(i, ray.get(plan[0]))


def _files_task(block: pa.Table, plan: list[Any]) -> pa.Table:
    import ray

    return _entries_of_files(block, ray.get(plan[0]))


def _match_task(bucket: pa.Table, plan: list[Any]) -> pa.Table:
    import ray

    return match_bucket(bucket, ray.get(plan[0]))


def _entries_of_chunk(number: int, plan: _Plan) -> Iterator[pa.Table]:
    """The rows of a chunk as ENTRIES."""
    folder, chunk = plan.chunks[number]
    table, first = plan.tables[folder], 0
    if chunk is None:
        keys = list(table.keys)
        batches = iter([(keys, [table.labels.get(key) for key in keys], [table.splits.get(key) for key in keys])])
    else:
        batches, first = cast("LargeTable", table).labelled_batches(chunk), chunk.first
    for keys, labels, splits in batches:
        places = _places([folder] * len(keys), keys, plan)
        numbers = range(first, first + len(keys))
        yield _entries(places, ROW, [folder] * len(keys), keys, number=numbers, labels=labels, split=splits)
        first += len(keys)


def _entries_of_files(block: pa.Table, plan: _Plan) -> pa.Table:
    """Files, in schema LISTING, as ENTRIES."""
    paths = block["path"].to_pylist()
    found = [plan.naming.table_of(path) for path in paths]
    folders = [part[1] if part else None for part in found]
    inside = [clean_path(part[2] if part else path) for part, path in zip(found, paths, strict=True)]
    places = _places(folders, inside, plan)
    return _entries(places, FILE, folders, paths, size=block["size"].to_pylist())


def _places(folders: Sequence[str | None], keys: Sequence[str], plan: _Plan) -> np.ndarray:
    """(bucket, group) of each file name, int32 (2, n)."""
    texts = (
        f"{folder}\0{join_key(key)}".encode("utf-8", "backslashreplace")
        for folder, key in zip(folders, keys, strict=True)
    )
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(text) for text in texts), np.uint64, len(keys))
    buckets, groups = np.uint64(plan.buckets), np.uint64(plan.groups)
    return np.stack([hashes % buckets, hashes // buckets % groups]).astype(np.int32)


def _entries(
    places: np.ndarray, kind: int, folders: Sequence[str | None], keys: Sequence[str], **columns: Any
) -> pa.Table:
    values = {"bucket": places[0], "group": places[1], "kind": [kind] * len(keys), "folder": folders, "key": keys}
    values |= columns
    return pa.table([pa.array(values.get(f.name, [None] * len(keys)), f.type) for f in ENTRIES], schema=ENTRIES)


# ---------------------------------------------------------------- matching


def match_bucket(bucket: pa.Table, plan: _Plan) -> pa.Table:
    """The files and rows of a bucket, in schema ENTRIES, as JOINED."""
    group = bucket["group"].to_numpy()
    order = np.argsort(group, kind="stable")
    ends = np.flatnonzero(np.diff(group[order], append=-1)) + 1
    parts = [
        _match_group(bucket.take(pa.array(order[first:end])), plan)
        for first, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
    ]
    return pa.concat_tables([JOINED.empty_table(), *parts])


def _match_group(group: pa.Table, plan: _Plan) -> pa.Table:
    rows = group.filter(pc.equal(group["kind"], ROW)).sort_by("number")
    files = group.filter(pc.equal(group["kind"], FILE)).sort_by("key")
    tables, numbers = dict[str, LabelTable](), dict[tuple[str, str], int]()
    for folder, whole in plan.tables.items():
        here = rows.filter(pc.equal(rows["folder"], folder))
        keys, labels = here["key"].to_pylist(), here["labels"].to_pylist()
        one_hot = isinstance(whole, LargeTable) and bool(whole.one_hot)
        several = whole.multilabel or (one_hot and any(len(names) != 1 for names in labels))
        part = table_of_rows(whole.uri, keys, labels, here["split"].to_pylist(), several, whole.has_labels)
        tables[folder] = replace(part, of_splits=whole.of_splits)
        for key, number in zip(keys, here["number"].to_pylist(), strict=True):
            numbers.setdefault((folder, key), number)
    naming = plan.naming
    naming = replace(naming, table=tables[""]) if naming.table else replace(naming, tables=tables)
    matcher = RowMatcher(naming)
    multilabel = naming.multilabel
    joined: dict[str, list[Any]] = {name: [] for name in JOINED.names}

    def add(
        kind: int, path: str, size: int, said: tuple[Any, Any], folder: str | None, number: int, row: int = 0
    ) -> None:
        values = (path, size, *said, row, kind, folder, number, multilabel)
        for name, value in zip(JOINED.names, values, strict=True):
            joined[name].append(value)

    try:
        for path, size in zip(files["key"].to_pylist(), files["size"].to_pylist(), strict=True):
            found = matcher.add(path)
            said = (None, naming.layout.split(path)) if plan.is_document(path) else naming.said_by(found, path)
            number = -1 if found is None or found[2] is None else numbers[found[1], found[2]]
            without = NO_ROW if found is not None and found[2] is None and naming.applies(found[0], None, path) else 0
            add(FILE, path, size, said, found[1] if found else None, number, without)
    except UserError as error:
        add(PROBLEM, str(error), 0, (None, None), None, 0)
        return pa.table(joined, schema=JOINED)
    for folder, key in matcher.rows_without_file():
        path, labels, split = matcher.missing_file(folder, key)
        add(ROW, path, 0, (labels, split), folder, numbers[folder, key])
    return pa.table(joined, schema=JOINED)
