"""What formats with many images in one file share: every file is scanned by a task of its own, then read fragment by fragment."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline import storage, workqueue
from pipeline.data.sources.items import FRAGMENTS, Item, ScanOptions, Source, is_included
from pipeline.data.sources.layout import splits_of_files
from pipeline.errors import UserError

Fragment = tuple[str, int, int, int, list[str] | None]


@dataclass(kw_only=True, slots=True)
class FileScan:
    """What one archive holds."""

    fragments: list[Fragment]
    """Rows of schema FRAGMENTS, without the split."""
    names: Iterable[str] = ()
    """Its label names."""
    ordered_names: tuple[str, ...] = ()
    """Label names in index order, where the file states it."""
    multilabel: bool = False
    first_members: list[tuple[str, ...]] = field(default_factory=list)
    """Of the archive, or of each archive in it: the names of the first members, to recognise repeated numbering."""
    problem: str = ""
    """Why it could not be read to its end."""
    splits: Iterable[str] = ()
    """The splits that its rows or members are in."""


ScanFile = Callable[[str, str, int, ScanOptions], FileScan]
"""(URI, path relative to the source, bytes, options) -> what the file holds. Runs in a Ray task."""


def scan_archives(
    name: str, uri: str, files: pa.Table, options: ScanOptions, matches: Callable[[str], bool], scan_file: ScanFile
) -> Source:
    """Scans the files of format `name`. In a folder, other files beside the archives (an index, a read-me) are ignored."""
    if files["path"][0].as_py():
        files = files.filter(pa.array([matches(path) for path in files["path"].to_pylist()], pa.bool_()))
    if not files.num_rows:
        raise UserError(f"{uri}: no {name} files in it")
    jobs = [
        (scan_file, storage.join(uri, path) if path else uri, path, size, options)
        for path, size in zip(files["path"].to_pylist(), files["size"].to_pylist(), strict=True)
    ]
    found: list[FileScan] = workqueue.map_tasks(_scan, jobs)
    by_file = splits_of_files(files["path"].to_pylist())
    rows = [(*row, by_file.get(row[0])) for scan in found for row in scan.fragments]
    if not rows:
        raise UserError(f"{uri}: its {name} files have no rows")
    columns = list(zip(*rows, strict=True))
    fragments = pa.table([pa.array(c, f.type) for c, f in zip(columns, FRAGMENTS, strict=True)], schema=FRAGMENTS)
    names = {name for scan in found for name in scan.names} | {
        n for labels in options.table.labels.values() for n in labels
    }
    ordered = {scan.ordered_names for scan in found if scan.ordered_names}
    first_members = [names for scan in found for names in scan.first_members if names]
    return Source(
        uri=uri,
        kind=name,
        fragments=fragments,
        names=frozenset(names) if names or options.need_names else None,
        ordered_names=ordered.pop() if len(ordered) == 1 else None,
        multilabel=options.table.multilabel or any(scan.multilabel for scan in found),
        table=options.table,
        by_archive=len(set(first_members)) < len(first_members),
        problem=next((scan.problem for scan in found if scan.problem), ""),
        prefix=options.prefix,
        splits=tuple(
            sorted({*by_file.values(), *options.table.splits.values(), *(s for x in found for s in x.splits)})
        ),
        columns=options.columns,
    )


def _scan(job: tuple[ScanFile, str, str, int, ScanOptions]) -> FileScan:
    scan_file, uri, path, size, options = job
    return scan_file(uri, path, size, options)


def whole(path: str, size: int) -> list[Fragment]:
    """A file as one fragment."""
    return [(path, size, 0, -1, None)]


def names_wanted(options: ScanOptions) -> bool:
    """Whether the labels in the archives matter: not when the user gave a table."""
    return options.need_names and not options.table.labels


def read_archives(
    source: Source, fragments: pa.Table, read_fragment: Callable[[str, str, dict[str, Any], Source], Iterator[Item]]
) -> Iterator[Item]:
    """The items of some fragments; `read_fragment` gets the file's URI, its name in keys, the fragment and the source."""
    for fragment in fragments.to_pylist():
        uri = storage.join(source.uri, fragment["path"]) if fragment["path"] else source.uri
        name = fragment["path"] or source.uri.rpartition("/")[2]
        prefix = source.prefix
        if source.by_archive:
            archive = re.sub(r"(?i)\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz)$", "", name)
            prefix += f"{fragment['labels'][0] if fragment['labels'] else archive}/"
        for item in read_fragment(uri, name, fragment, source):
            yield item._replace(key=prefix + item.key, split=item.split or fragment["split"])


def included(items: Iterator[Item], include: tuple[str, ...]) -> Iterator[Item]:
    """The items whose keys match one of the globs; all when there are none."""
    return (item for item in items if is_included(item.key, include)) if include else items
