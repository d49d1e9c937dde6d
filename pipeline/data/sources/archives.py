"""What formats with many images in one file share: every file is scanned by a task of its own, then read fragment by fragment."""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline import storage, workqueue
from pipeline.data.sources.columns import captions_error, look_like_captions
from pipeline.data.sources.items import FRAGMENTS, Item, ScanOptions, Source, is_included
from pipeline.data.sources.layout import WORDNET, find_layout, in_names_say_splits, layout_of_source, splits_of_files
from pipeline.data.sources.naming import Naming, find_tables, read_tables
from pipeline.data.sources.tables import LabelTable, read_label_table
from pipeline.errors import UserError, nearest

logger = logging.getLogger(__name__)
ENDING = r"(?i)\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst|zip|parquet|arrow|feather|tfrecords?(\.gz)?)$"

Fragment = tuple[str, int, int, int, list[str] | None]


@dataclass(kw_only=True, slots=True)
class FileScan:
    """What one archive holds."""

    fragments: list[Fragment]
    """Rows of schema FRAGMENTS, without the split."""
    names: Iterable[str] = ()
    """Its label names, but for those of folders."""
    ordered_names: tuple[str, ...] = ()
    """Label names in index order, where the file states it."""
    multilabel: bool = False
    first_members: list[tuple[str, ...]] = field(default_factory=list)
    """Of the archive, or of each archive in it: the names of the first members, to recognise repeated numbering."""
    problem: str = ""
    """Why it could not be read to its end."""
    splits: Iterable[str] = ()
    """The splits that its rows or members are in."""
    folders: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    """Folders of members that have no other label, with the number of images in each."""
    wordnet: Iterable[str] = ()
    """WordNet ids at the beginning of their names."""
    in_names: set[str | None] = field(default_factory=set)
    """The splits that the names of its images say, None when one says none."""
    tables: list[tuple[str, bytes]] = field(default_factory=list)
    """Label tables in it: name and contents."""
    apart: bool = False
    """Whether members of one sample lie apart."""
    texts: set[str] = field(default_factory=set)
    """Labels that may be captions, of so many samples:"""
    text_samples: int = 0
    text_column: str = "txt"
    """Column, or ending of the members, that holds them."""
    fields: set[str] = field(default_factory=set)
    """Names of fields or columns in which a label was looked for."""


ScanFile = Callable[[str, str, int, ScanOptions], FileScan]
"""(URI, path relative to the source, bytes, options) -> what the file holds. Runs in a Ray task."""


def scan_archives(
    name: str, uri: str, files: pa.Table, options: ScanOptions, matches: Callable[[str], bool], scan_file: ScanFile
) -> Source:
    """Scans the files of format `name`. In a folder, label tables beside the archives (labels.csv, train.csv) are read, other
    files (an index, a read-me) are ignored."""
    table, hint = options.table, ""
    if files["path"][0].as_py():
        paths = files["path"].to_pylist()
        others = [path for path in paths if not matches(path)]
        chosen = set(_chosen([path for path in paths if matches(path)], options))
        files = files.filter(pa.array([path in chosen for path in paths], pa.bool_()))
        if not table:
            table, hint = _table_beside(uri, others, options)
    if not files.num_rows:
        raise UserError(f"{uri}: no {name} files in it")
    options = dataclasses.replace(options, table=table)
    jobs = [
        (scan_file, storage.join(uri, path) if path else uri, path, size, options)
        for path, size in zip(files["path"].to_pylist(), files["size"].to_pylist(), strict=True)
    ]
    found: list[FileScan] = workqueue.map_tasks(_scan, jobs)
    by_file = splits_of_files(files["path"].to_pylist())
    rows = [(*row, by_file.get(row[0])) for scan in found for row in scan.fragments]
    if not rows:
        raise UserError(f"{uri}: its {name} files have no rows")
    naming = _naming(uri, found, options)
    names = {label for scan in found for label in scan.names}
    names |= naming.names() | _names_of_folders(found, naming)
    if not names and len(jobs) > 1 and options.need_names and not options.unlabelled:
        rows, names = _labelled_by_archive(uri, rows, options)
    _check_labels(uri, found, names, options)
    columns = list(zip(*rows, strict=True))
    fragments = pa.table([pa.array(c, f.type) for c, f in zip(columns, FRAGMENTS, strict=True)], schema=FRAGMENTS)
    ordered = {scan.ordered_names for scan in found if scan.ordered_names}
    first_members = [names for scan in found for names in scan.first_members if names]
    inside = {s for scan in found for s in scan.splits} | set(table.splits.values())
    inside |= {split for part in naming.tables.values() for split in part.splits.values()}
    folders = (Counter[tuple[str, ...]](scan.folders) for scan in found)
    inside |= {split for path in sum(folders, Counter()) if (split := naming.layout.split("/".join((*path, ""))))}
    if naming.layout.in_names:
        inside |= {split for scan in found for split in scan.in_names if split}
    return Source(
        uri=uri,
        kind=name,
        fragments=fragments,
        names=frozenset(names) if names or options.need_names else None,
        ordered_names=ordered.pop() if len(ordered) == 1 else None,
        multilabel=naming.multilabel or any(scan.multilabel for scan in found),
        naming=naming,
        by_archive=len(set(first_members)) < len(first_members) or len(set(by_file.values())) > 1,
        apart=any(scan.apart for scan in found),
        problem=next((scan.problem for scan in found if scan.problem), ""),
        hint=hint or _hint(found),
        prefix=options.prefix,
        splits=tuple(sorted({*by_file.values(), *inside})),
        columns=options.columns,
    )


def _chosen(paths: list[str], options: ScanOptions) -> list[str]:
    """The archives whose names match --include; all when none does, since the globs are about members then."""
    if not options.include:
        return paths
    ends = ("", "#0", "/0")
    keys = {path: [path + end for end in ends] + [f"{archive_stem(path)}/0"] for path in paths}
    chosen = [p for p in paths if any(is_included(options.prefix + key, options.include) for key in keys[p])]
    return chosen or paths


def archive_stem(path: str) -> str:
    """The path of an archive without the end of its name."""
    return re.sub(ENDING, "", path)


def member_filter(path: str, options: ScanOptions) -> Callable[[str], bool]:
    """Whether a member of the archive `path` may be an input: its key, which may begin with the archive's name, matches
    --include."""
    before = (options.prefix, f"{options.prefix}{archive_stem(path)}/")
    return lambda name: any(is_included(prefix + name, options.include) for prefix in before)


def _table_beside(uri: str, others: list[str], options: ScanOptions) -> tuple[LabelTable, str]:
    """The label table that lies beside the archives, and else the first file that may be one under another name."""
    found = find_tables(others)

    def read(path: str) -> LabelTable:
        return read_label_table(storage.join(uri, path), options.columns, need_labels=not options.unlabelled)

    tables = read_tables(found, read, not options.unlabelled)
    if tables:
        return tables[min(tables, key=len)], ""
    other = next((path for path in others if path.lower().endswith((".csv", ".tsv", ".txt", ".jsonl"))), "")
    return LabelTable(), f"{other} may be a label table: name it with --labels" if other else ""


def _naming(uri: str, found: Sequence[FileScan], options: ScanOptions) -> Naming:
    """What tables and folders say about the members of all archives."""
    contents = {name: data for scan in found for name, data in scan.tables}

    def read(name: str) -> LabelTable:
        where = f"{uri}: {name}"
        return read_label_table(where, options.columns, need_labels=not options.unlabelled, data=contents[name])

    tables = {} if options.table else read_tables(find_tables(contents), read, not options.unlabelled)
    folders: Counter[tuple[str, ...]] = Counter()
    for scan in found:
        folders.update(scan.folders)
    named = options.unlabelled or bool(options.table.labels) or "" in tables
    layout = layout_of_source(uri, folders, options.class_level, classes_wanted=not named)
    if layout.split_level is None and in_names_say_splits(set().union(*(scan.in_names for scan in found))):
        layout = dataclasses.replace(layout, in_names=True)
    return Naming(table=options.table, tables=tables, layout=layout)


def _names_of_folders(found: Sequence[FileScan], naming: Naming) -> set[str]:
    """The classes that folders in archives name, and WordNet ids at the beginning of file names where no folder does."""
    if naming.table.labels:
        return set()
    folders = {folder for scan in found for folder in scan.folders}
    labels = [naming.of("/".join((*folder, "")))[0] for folder in folders]
    wordnet = {name for scan in found for name in scan.wordnet}
    if wordnet and naming.layout.one_class:
        return wordnet
    return {name for label in labels for name in label or ()} | (wordnet if None in labels else set())


def _labelled_by_archive(uri: str, rows: list[tuple], options: ScanOptions) -> tuple[list[tuple], set[str]]:
    """Fragments with the class that archives without labels in them have for a name (ant.zip, bee.zip) or a folder
    (label=ant/1.tar). Raises UserError where such names may be classes and may as well not be."""
    stems = {row[0]: archive_stem(row[0]) for row in rows}
    level = None if options.class_level is None else options.class_level - 1
    try:
        layout = find_layout(Counter(tuple(stem.split("/")) for stem in stems.values()), level)
    except UserError:
        return rows, set()
    labels = {path: layout.label(f"{stem}/") for path, stem in stems.items()}
    if len({label.partition("=")[0] for label in labels.values() if label}) == 1:  # species=ant, a partition
        labels = {path: label and label.partition("=")[2] for path, label in labels.items()}
    names = {label for label in labels.values() if label}
    sure = level is not None or any("=" in path for path in stems) or all(map(WORDNET.match, names))
    if len(names) < 2:
        return rows, set()
    if not sure:
        if any(re.search(r"\d", name) for name in names):
            return rows, set()  # they are numbered
        raise UserError(
            f"{uri}: no labels in the archives; --class-level {1 + (layout.class_level or 0)} makes classes of their names "
            f"({', '.join(sorted(names)[:3])}), --unlabelled takes the images without labels, --labels FILE names them"
        )
    found = {path: [label] if label else None for path, label in labels.items()}
    return [(*row[:4], row[4] or found[row[0]], row[5]) for row in rows], names


def _check_labels(uri: str, found: Sequence[FileScan], names: set[str], options: ScanOptions) -> None:
    """Raises UserError when the labels are captions, or lie in no field that is known or named."""
    if options.unlabelled or options.table.labels or not options.need_names:
        return
    texts, samples = {text for scan in found for text in scan.texts}, sum(scan.text_samples for scan in found)
    if look_like_captions(texts, samples):
        flag = next(scan.text_column for scan in found if scan.texts)
        raise captions_error(uri, texts, samples, f"--label-column {flag}")
    fields = sorted({name for scan in found for name in scan.fields})
    wanted = options.columns.label
    if wanted and fields and wanted not in (*fields, "cls", "txt"):
        raise UserError(
            f"--label-column {wanted}: {uri} has no such field{nearest(wanted, fields)}; there are: {', '.join(fields)}"
        )


def _hint(found: Sequence[FileScan]) -> str:
    fields = sorted({name for scan in found for name in scan.fields})
    return f"no field is known to be a label among {', '.join(fields)}; --label-column names one" if fields else ""


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
            archive = re.sub(ENDING, "", name)
            prefix += f"{fragment['labels'][0] if fragment['labels'] else archive}/"
        for item in read_fragment(uri, name, fragment, source):
            yield item._replace(key=prefix + item.key, split=item.split or fragment["split"])


def included(items: Iterator[Item], include: tuple[str, ...]) -> Iterator[Item]:
    """The items whose keys match one of the globs; all when there are none."""
    return (item for item in items if is_included(item.key, include)) if include else items
