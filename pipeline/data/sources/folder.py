"""Folders of image files. Labels come from folder names or from label tables."""

import dataclasses
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.codecs import Refused, is_image_data, is_image_name
from pipeline.data.sources import items, listing
from pipeline.data.sources.items import (
    FRAGMENTS,
    Item,
    ScanOptions,
    Source,
    fragments_of_files,
    is_included,
    too_large,
)
from pipeline.data.sources.label_join import has_large_tables, join_files
from pipeline.data.sources.large_tables import open_label_table
from pipeline.data.sources.layout import (
    Layout,
    file_names_have_splits,
    folders_of,
    layout_of_source,
    split_in_name,
    visible_folders,
)
from pipeline.data.sources.listing import address_of
from pipeline.data.sources.naming import Naming, RowMatcher, find_tables, lifted, read_tables, with_layout
from pipeline.data.sources.tables import LabelTable
from pipeline.data.sources.unused_tables import check_unused_tables
from pipeline.errors import UserError, plural

NAME = "folder"
SIDECAR_SUFFIXES = (
    ".txt",
    ".json",
    ".cls",
    ".xml",
    ".caption",
    ".npy",
)  # extensions of files that describe the image of the same name
MAX_SCANNED_FOLDERS = 100  # folders that hold class folders, when empty ones are searched
logger = logging.getLogger(__name__)


def matches(path: str) -> bool:
    """Whether a path has the extension of an image file."""
    return is_image_name(path)


def is_document(path: str) -> bool:
    """Whether a path has the extension of a document: a folder of documents is not a class."""
    return path.lower().endswith(
        (".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".pdf", ".yaml", ".yml")
    )


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    """Every file is a fragment. Labels come from a table (given, or found as labels.*, metadata.*, train.csv, ...), or
    else from the folders. Raises UserError if --include matches nothing or the labels are ambiguous."""
    files, tables = _tables(uri, files, options)
    if options.include:

        def included(batch: pa.Table) -> pa.Table:
            keep = [is_included(options.prefix + path, options.include) for path in batch["path"].to_pylist()]
            return batch.filter(pa.array(keep, pa.bool_()))

        files = listing.spilled(map(included, listing.in_batches(files)), files.schema)
        if not files.num_rows:
            raise UserError(f"{uri}: nothing matches --include {' '.join(options.include)}")
    hint = _hint(files)
    files, captioned = _without_sidecars(uri, files)
    try:
        naming = _with_layout(uri, files, Naming(table=options.table, tables=tables), options, captioned)
    except UserError as error:
        raise UserError(f"{error} ({hint})" if hint and "--labels" in str(error) else str(error)) from error
    labelled = _joined(uri, files, naming) if has_large_tables(naming) else _labelled(uri, files, naming)
    if naming.by_folder and labelled.names and options.class_level is None and not options.unlabelled:
        check_unused_tables(uri, files, naming.layout, options.columns, matches)
    fragments = labelled.fragments
    splits = set(pc.unique(fragments["split"]).drop_null().to_pylist())
    if len(splits) == 1 and _some_without_split(fragments, options.unlabelled):
        splits.add("")
    return Source(
        uri=uri,
        kind=NAME,
        prefix=options.prefix,
        fragments=fragments,
        names=frozenset(labelled.names),
        multilabel=labelled.multilabel,
        by_folder=naming.by_folder,
        splits=tuple(sorted(splits)),
        hint=hint,
        missing=labelled.gone,
        missing_example=labelled.example,
        need_labels=not options.unlabelled,
    )


def _some_without_split(fragments: pa.Table, unlabelled: bool) -> bool:
    """Whether an image without a split has a label, or may have none."""
    for batch in listing.in_batches(fragments):
        without = batch.filter(pc.is_null(batch["split"]))
        known = itertools.repeat(True) if unlabelled else pc.is_valid(without["labels"]).to_pylist()
        if any(label and matches(path) for path, label in zip(without["path"].to_pylist(), known, strict=False)):
            return True
    return False


def _tables(uri: str, files: pa.Table, options: ScanOptions) -> tuple[pa.Table, dict[str, LabelTable]]:
    """(the files that are not label tables, the label tables by folder)."""
    ends = pc.match_substring_regex(files["path"], r"(?i)\.(csv|tsv|txt|lst|jsonl|json|parquet)$")
    found = find_tables(files.filter(ends)["path"].to_pylist())
    if options.table:
        given = storage.normalise(options.table.uri).removeprefix(address_of(uri, "")) if options.table.uri else ""
        return _without_paths(files, [given, *(path for path, _, _ in found)]), {}
    if not found:
        return files, {}

    def read(path: str, need_labels: bool) -> LabelTable:
        return open_label_table(address_of(uri, path), options.columns, need_labels=need_labels)

    images = {folder for path in _paths(files) if matches(path) for folder in _folders_above(path)}
    read_at = read_tables(found, read, not options.unlabelled)
    tables = lifted(read_at, images.__contains__)
    files = _without_paths(files, [path for path, _, _ in found])
    places = {id(table): folder for folder, table in tables.items()}
    named = {folder for _, folder, split in found if split is not None}
    for folder in {
        places[id(read_at[name])] for name in named & read_at.keys()
    }:  # train.txt may list something other than images
        naming = Naming(tables={folder: tables[folder]})
        row = (naming.row(path) for path in _paths(files))
        if not any(found is not None and found[2] is not None for found in row):
            logger.warning("%s: %s names none of the files; the table is ignored", uri, tables.pop(folder).uri)
    return files, tables


def _without_paths(files: pa.Table, paths: list[str]) -> pa.Table:
    known = pa.array(paths, pa.large_string())
    others = (batch.filter(pc.invert(pc.is_in(batch["path"], known))) for batch in listing.in_batches(files))
    return listing.spilled(others, files.schema)


def _without_sidecars(uri: str, files: pa.Table) -> tuple[pa.Table, bool]:
    """(the files without the sidecars of images, such as 0.txt next to 0.jpg; whether there are sidecars)."""
    if not any(path.lower().endswith(SIDECAR_SUFFIXES) for path in _paths(files)):
        return files, False
    count, example = 0, ""

    def keep() -> Iterator[bool]:
        nonlocal count, example
        for block in _alike(_paths(files)):
            stems = {os.path.splitext(path)[0] for path in block if matches(path)}
            for path in block:
                beside = path.lower().endswith(SIDECAR_SUFFIXES) and os.path.splitext(path)[0] in stems
                count, example = count + beside, example or (path if beside else "")
                yield not beside

    flags = keep()
    masks = ((batch, list(itertools.islice(flags, batch.num_rows))) for batch in listing.in_batches(files))
    kept = listing.spilled((batch.filter(pa.array(mask, pa.bool_())) for batch, mask in masks), files.schema)
    if count:
        logger.info("%s: ignored %s next to images, such as %s", uri, plural(count, "file"), example)
    return kept, count > 0


def _folders_above(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _paths(files: pa.Table) -> Iterator[str]:
    return (path for batch in listing.in_batches(files) for path in batch["path"].to_pylist())


def _alike(paths: Iterator[str]) -> Iterator[list[str]]:
    """Sorted paths in blocks: each has all files of a folder whose names are equal up to the first dot."""
    block: list[str] = []
    begin = ""
    for path in paths:
        if not block or not path.startswith(begin):
            if block:
                yield block
            folder, slash, name = path.rpartition("/")
            block, begin = [], folder + slash + name.partition(".")[0] + "."
        block.append(path)
    if block:
        yield block


def _hint(files: pa.Table) -> str:
    """A hint that names the file that is most likely a label table; empty if there is no such file."""
    found: dict[int, str] = {}
    for batch in listing.in_batches(files):
        named = pc.match_substring_regex(batch["path"], r"(?i)\.(csv|tsv|jsonl|parquet|lst|xlsx?|txt|json|mat)$")
        for path in batch.filter(named)["path"].to_pylist():
            name = path.rpartition("/")[2].lower()
            if re.search(r"label|class|annot|meta|target|truth|train", name):
                found.setdefault(0, path)
            elif not re.search(r"readme|licen[cs]e|requirements", name):
                found.setdefault(1 if name.endswith((".csv", ".tsv", ".jsonl", ".parquet", ".lst")) else 2, path)
    return f"{found[min(found)]} may be a label table; pass it with --labels" if found else ""


def _with_layout(uri: str, files: pa.Table, naming: Naming, options: ScanOptions, captioned: bool) -> Naming:
    """Finds the folder levels that name splits and classes."""
    folders: Counter[tuple[str, ...]] = Counter()
    splits_in_names: Counter[str | None] = Counter()
    open_folders = False  # whether some images take their class from a folder
    for batch in listing.in_batches(files):
        for path in batch["path"].to_pylist():
            if matches(path):
                folders[folders_of(path)] += 1
                splits_in_names[split_in_name(path)] += 1
                if not open_folders:
                    found = naming.table_of(path)
                    open_folders = found is None or not found[0].has_labels
    classes_wanted = open_folders and not options.unlabelled

    def find(classes: bool) -> Layout:
        return layout_of_source(uri, folders, options.class_level, classes_wanted=classes and not options.unlabelled)

    naming = with_layout(naming, folders, find, classes_wanted)
    layout = naming.layout
    if classes_wanted and not options.include:
        _warn_about_empty_folders(uri, layout, folders)
    names = {layout.label("/".join((*inside, ""))) for inside in folders} - {None}
    if (
        captioned
        and classes_wanted
        and options.class_level is None
        and names
        and all(map(str.isdigit, map(str, names)))
    ):
        raise UserError(
            f"{uri}: folders such as {min(map(str, names))} look like the shards of img2dataset, whose captions are "
            "not classes; --unlabelled reads images alone, --labels FILE reads labels from a table, --class-level 1 "
            "uses folders as classes"
        )
    if layout.split_level is None and file_names_have_splits(splits_in_names):
        layout = dataclasses.replace(layout, split_in_file_name=True)
    return dataclasses.replace(naming, layout=layout)


def _warn_about_empty_folders(uri: str, layout: Layout, folders: Iterable[tuple[str, ...]]) -> None:
    """Warns about folders without files beside class folders of a local source."""
    beside: dict[tuple[str, ...], set[str]] = {}
    for inside in folders:
        if (level := layout.class_level_within(inside)) is not None:
            beside.setdefault(inside[:level], set()).add(inside[level])
    if storage.is_remote(uri) or len(beside) > MAX_SCANNED_FOLDERS:
        return
    empty = [
        "/".join((*parent, name))
        for parent, names in sorted(beside.items())
        for name in visible_folders("/".join((uri, *parent)))
        if name not in names and not any(True for _ in os.scandir("/".join((uri, *parent, name))))
    ]
    if empty:
        logger.warning(
            "%s: %s without files, such as %s, is not among the classes", uri, plural(len(empty), "folder"), empty[0]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Labelled:
    """The files of a source with their labels, and the rows of tables without a file, so that they are counted."""

    fragments: pa.Table
    names: set[str]
    multilabel: bool
    gone: int = 0
    """Number of rows without a file, of large tables."""
    example: str = ""
    """The path of one of them."""


def _labelled(uri: str, files: pa.Table, naming: Naming) -> _Labelled:
    names: set[str] = set()
    tabled = bool(naming.table or naming.tables)
    rows = RowMatcher(naming)

    def labelled(part: pa.Table) -> pa.Table:
        paths = part["path"].to_pylist()
        found = [(None, naming.layout.split(path)) if is_document(path) else naming.of(path) for path in paths]
        without = []
        if tabled:
            for path in paths:
                row = rows.add(path)
                unlisted = row is not None and row[2] is None and naming.applies(row[0], None, path)
                without.append(items.NO_ROW if unlisted else 0)
        return fragments(part, [label for label, _ in found], [split for _, split in found], without)

    def fragments(
        part: pa.Table, labels: list[list[str] | None], splits: list[str | None], without: list[int]
    ) -> pa.Table:
        names.update(name for label in labels for name in label or ())
        found = fragments_of_files(
            part, pa.array(labels, FRAGMENTS.field("labels").type), pa.array(splits, pa.string())
        )
        return items.with_rows(found, pa.array(without, pa.int64())) if without else found

    parts = map(labelled, listing.in_batches(files))
    if not tabled:
        return _Labelled(fragments=listing.spilled(parts, FRAGMENTS), names=names, multilabel=naming.multilabel)
    there = listing.spilled(parts, FRAGMENTS)
    rows.check(uri, files["path"].to_pylist())
    missing = [rows.missing_file(*row) for row in rows.rows_without_file()]
    absent = pa.table({"path": [path for path, _, _ in missing], "size": [0] * len(missing)}, schema=listing.LISTING)
    gone = fragments(absent, [label for _, label, _ in missing], [split for _, _, split in missing], [])
    return _Labelled(fragments=pa.concat_tables([there, gone]), names=names, multilabel=naming.multilabel)


def _joined(uri: str, files: pa.Table, naming: Naming) -> _Labelled:
    """The same with large tables, which are not in memory."""
    joined = join_files(uri, files, naming, is_document)
    return _Labelled(
        fragments=pa.concat_tables([joined.files, joined.gone]),
        names=joined.names,
        multilabel=joined.multilabel,
        gone=joined.gone.num_rows,
        example=joined.gone["path"][0].as_py() if joined.gone.num_rows else "",
    )


# ---------------------------------------------------------------- reading


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    """The items of some files, in order."""
    read_files = _fetch if storage.is_remote(source.uri) else _load
    for batch in listing.in_batches(fragments):
        rows = batch.to_pylist()
        contents = read_files(source.uri, [row["path"] for row in rows if row["size"] <= items.MAX_FILE_BYTES])
        for row in rows:
            path, names = row["path"], row["labels"]
            key, where = source.prefix + path, address_of(source.uri, path)
            item = Item(key, where, b"", names, split=row["split"])
            if row["size"] > items.MAX_FILE_BYTES:
                yield item._replace(refused=too_large(row["size"]))
                continue
            data = next(contents)
            if isinstance(data, FileNotFoundError):
                yield item._replace(refused=Refused("missing file"))
            elif isinstance(data, Exception):
                yield item._replace(refused=Refused("unreadable", str(data)))
            elif names is None and source.need_labels and not matches(path) and not is_image_data(data):
                yield item._replace(refused=Refused("not an image"))  # more helpful than "no label"
            elif row["row"] == items.NO_ROW and source.need_labels:
                yield item._replace(refused=Refused("no row"))
            else:
                yield item._replace(image=data)


def _load(folder: str, paths: list[str]) -> Iterator[bytes | Exception]:
    for path in paths:
        try:
            if os.path.isabs(path) or ".." in path.split("/"):  # from a label table
                raise FileNotFoundError(f"{path} is outside the source")
            name = os.path.join(folder, path)
            with storage.open_regular(name) as file:
                yield file.read()
        except (OSError, ValueError, UserError) as error:  # ValueError: a NUL in a name from a label table
            yield error


def _fetch(folder: str, paths: list[str]) -> Iterator[bytes | Exception]:
    """Contents of objects in a store. A missing object is returned as an exception and becomes a reject. An outage
    raises StorageError: images must not become rejects because a server was busy."""
    return storage.read_many(f"{folder}/{path}" for path in paths)
