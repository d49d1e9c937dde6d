"""Recognises the format of a source and reads it: the list of formats and the functions `discover` and `read`."""

import itertools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import cast

import pyarrow as pa

from pipeline import storage
from pipeline.data.sources import arrow, cifar, folder, parallel_listing, parquet, tar, tfrecord, urls, zip
from pipeline.data.sources.archives import included
from pipeline.data.sources.items import Downloads, Item, ScanOptions, Source, SourceFormat
from pipeline.data.sources.large_tables import LargeTable, open_label_table
from pipeline.data.sources.listing import list_source
from pipeline.data.sources.naming import TABLE_FILE
from pipeline.data.sources.parallel_listing import ParallelListing
from pipeline.data.sources.tables import Columns, LabelTable, read_label_table
from pipeline.errors import UserError, nearest, plural

# One module per format; a new format is a module with NAME, matches, scan and read, and an entry here. The format that
# the most files match is chosen. In a tie the earlier format wins, so images win over archives next to them.
FORMATS: list[ModuleType] = [folder, cifar, tar, zip, parquet, arrow, tfrecord, urls]

# Containers that no format reads, parts of archives, and files that may be something else beside images without extensions.
UNSUPPORTED = re.compile(
    r"(?i)\.(7z|rar|z\d\d|lzma|tar\.(lz4?|lz4|z)|h5|hdf5|lmdb|mdb|mat|npz|npy|rec|beton|mds)$|-idx\d-ubyte(\.gz)?$"
    r"|\.(zip|7z|rar|tar|tgz|gz|bz2|xz)\.?(\d{2,3}|part[-_.]?[a-z0-9]+)$"
)
DOUBTFUL = re.compile(
    r"(?i)(?<!csv|tsv|txt|son)\.(gz|bz2|xz|zst|lz4|lz|z|ace|cab|arj|dmg|iso|img|idx|pkl|pickle|pt|pth|dcm|nii)$"
)
logger = logging.getLogger(__name__)
SNIFFED_FILES = 1000  # number of files whose names decide the format
SNIFFED_ITEMS = 256  # number of items that decide whether an unscanned archive is multi-label


def formats() -> dict[str, SourceFormat]:
    """The formats by name."""
    return {module.NAME: cast(SourceFormat, module) for module in FORMATS}


def key_prefixes(uris: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """What the keys of each source begin with: nothing for a single source, else its name.

    known: prefixes of the sources that a dataset has; each of them keeps its own, and a new source always has one."""
    bases = [os.path.splitext(uri.rpartition("/")[2])[0] for uri in uris]
    if not known:
        several = [base + (f"-{i}" if bases.count(base) > 1 else "") + "/" for i, base in enumerate(bases)]
        return several if len(uris) > 1 else [""] * len(uris)
    found = dict(known)
    for i, uri in enumerate(uris):
        names = itertools.chain([f"{bases[i]}/"], (f"{bases[i]}-{n}/" for n in itertools.count(2)))
        if uri not in found:
            found[uri] = next(name for name in names if name not in found.values())
    return [found[uri] for uri in uris]


def discover(
    uris: Sequence[str],
    *,
    format: str = "auto",
    labels: str | None = None,
    include: tuple[str, ...] = (),
    need_names: bool = True,
    unit_bytes: int = 1 << 30,
    columns: Columns | None = None,
    class_level: int | None = None,
    unlabelled: bool = False,
    downloads: Downloads | None = None,
    prefixes: Sequence[str] | None = None,
    large: ParallelListing | None = None,
) -> list[Source]:
    """Scans the sources: their formats, fragments and label names. Archives are scanned by Ray tasks.

    labels: URI of a label table for all sources. include: globs over keys. need_names: False avoids opening archives of
    at most `unit_bytes` bytes. columns: the columns that the user named. class_level: the level of the class folders; 1
    is the first below the source. unlabelled: whether to accept images without labels. prefixes: what the keys of each
    source begin with (default: `key_prefixes`). downloads: for lists of URLs. large: lists large sources in parallel.
    Raises UserError for a source that is missing, empty, unreadable or ambiguous.
    """
    if format != "auto" and format not in formats():
        raise UserError(f"--format {format}: unknown{nearest(format, formats())}; one of auto, {', '.join(formats())}")
    uris = [storage.normalise(uri) for uri in uris]
    prefixes = prefixes or key_prefixes(uris)
    columns = columns or Columns()
    table = open_label_table(labels, columns, need_labels=not unlabelled) if labels else LabelTable()
    sources = []
    for i, uri in enumerate(uris):
        files = list_source(uri) if large is None else parallel_listing.list_source(uri, large)
        if not files.num_rows:
            raise UserError(f"{uri}: no such file or folder, or nothing in it{storage.nearest_folder(uri)}")
        found = _recognise(uri, files, downloads) if format == "auto" else formats()[format]
        if isinstance(table, LargeTable) and found.NAME != folder.NAME:
            logger.warning(
                "%s: its %d rows are read into the memory of every process, because the names of images in archives are "
                "known only when they are read; labels in the archives take no memory", table.uri, table.rows,
            )  # fmt: skip
            table = read_label_table(table.uri, columns, need_labels=not unlabelled)
        options = ScanOptions(
            table=table,
            columns=columns,
            class_level=class_level,
            unlabelled=unlabelled,
            include=include,
            need_names=need_names,
            unit_bytes=unit_bytes,
            prefix=prefixes[i],
            downloads=downloads or Downloads(),
        )
        if format == "auto":
            _warn_about_others(uri, files, found)
        sources.append(_with_multilabel(found.scan(uri, files, options)))
    return sources


def discover_unlabelled(uri: str, files: pa.Table) -> list[Source]:
    """Scans the images without labels among some files, each with the format of its name; files without an extension are
    taken for images. files: schema LISTING, sorted by path. Raises UserError for files that cannot be read."""
    paths = files["path"].to_pylist()
    kinds: list[str | None] = []
    for path in paths:
        names = (name for name, found in formats().items() if name != urls.NAME and found.matches(path))
        plain = folder.NAME if "." not in path.rpartition("/")[2] else None
        kinds.append(None if TABLE_FILE.fullmatch(path) else next(names, plain))
    options = ScanOptions(unlabelled=True, need_names=False)
    return [
        _with_multilabel(formats()[name].scan(uri, files.filter(pa.array([k == name for k in kinds])), options))
        for name in dict.fromkeys(kinds)
        if name is not None
    ]


def _with_multilabel(source: Source) -> Source:
    """Reads a few samples of a source whose labels were not scanned, to see whether images have several labels."""
    if source.names is not None:
        return source
    some = itertools.islice(read(source, source.fragments.slice(0, 1)), SNIFFED_ITEMS)
    several = any(item.labels is not None and len(item.labels) > 1 for item in some)
    return replace(source, multilabel=source.multilabel or several)


def _recognise(uri: str, files: pa.Table, downloads: Downloads | None) -> SourceFormat:
    """The format that matches most of the first SNIFFED_FILES file names; class folders if no format matches.

    Other sources have tables, too, so only the content of a table shows that it is a list of URLs."""
    paths = files["path"][:SNIFFED_FILES].to_pylist()
    names = [path or uri.partition("?")[0] for path in paths]
    counts = {name: sum(map(found.matches, names)) for name, found in formats().items() if name != urls.NAME}
    best = max(counts, key=lambda name: counts[name])  # the first of them in a tie
    if (not counts[best] or best == parquet.NAME) and urls.is_list(uri, paths, downloads or Downloads()):
        return formats()[urls.NAME]
    if not counts[best]:
        _refuse_unsupported(uri, names)
    if files["path"][0].as_py() == "" and (best == folder.NAME or not counts[best]):
        archives = ", ".join(name for name in formats() if name not in (folder.NAME, urls.NAME))
        raise UserError(
            f"{uri}: a single file that is not an archive ({archives}) and not a list of URLs (a table with a column of "
            "http:// or https:// addresses; --url-column names it); give a folder, an archive or a list"
        )
    return formats()[best if counts[best] else folder.NAME]


def _refuse_unsupported(uri: str, names: list[str]) -> None:
    """Raises UserError for archives and containers that no format reads."""
    packed = [name for name in names if UNSUPPORTED.search(name)]
    doubtful = [name for name in names if DOUBTFUL.search(name)]
    if packed or 2 * len(doubtful) > len(names):
        name = (packed or doubtful)[0].removeprefix(f"{uri.rpartition('/')[0]}/")
        raise UserError(f"{uri}: {name} has an unsupported format; unpack it, or pack the images as .tar or .zip")


def _warn_about_others(uri: str, files: pa.Table, chosen: SourceFormat) -> None:
    """Warns about files of other formats: a source is read as one format only."""
    names = files["path"][:SNIFFED_FILES].to_pylist()
    mine = {os.path.splitext(name)[0] for name in names if chosen.matches(name)}
    for name, other in formats().items():
        if name == urls.NAME:
            continue
        # img2dataset writes a table of the same name next to every archive; label tables are read as labels
        beside = [
            path
            for path in names
            if other.matches(path)
            and not chosen.matches(path)
            and os.path.splitext(path)[0] not in mine
            and not TABLE_FILE.fullmatch(path)
        ]
        if beside:
            logger.warning(
                "%s: read as %s; ignored %s of format %s, such as %s: give a separate --source for other formats",
                uri, chosen.NAME, plural(len(beside), "file"), name, beside[0],
            )  # fmt: skip


def read(source: Source, fragments: pa.Table, include: tuple[str, ...] = ()) -> Iterator[Item]:
    """The items of some fragments, in order. An unreadable input does not raise an exception: its Item has `refused`
    set.

    include: globs over keys. Raises StorageError if the store fails.
    """
    return included(formats()[source.kind].read(source, fragments), include)
