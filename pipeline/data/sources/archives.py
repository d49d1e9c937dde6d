"""Code shared by the formats that hold many images in one file: a task scans
each file, and workers read it by fragment."""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import workqueue
from pipeline.data.sources.columns import captions_error, look_like_captions
from pipeline.data.sources.items import FRAGMENTS, Item, ScanOptions, Source, is_included
from pipeline.data.sources.layout import (
    WORDNET,
    Layout,
    file_names_have_splits,
    find_layout,
    layout_of_source,
    splits_of_files,
)
from pipeline.data.sources.listing import address_of
from pipeline.data.sources.naming import Naming, find_tables, lifted, read_tables, with_layout
from pipeline.data.sources.tables import LabelTable, file_hash, read_label_table
from pipeline.errors import UserError, nearest, plural

logger = logging.getLogger(__name__)
MAX_IMAGE_KEYS = 1 << 14  # hashes of image names of an archive, which show whether a table is about them
ARCHIVE_SUFFIX = (
    r"(?i)\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst|zip|parquet|arrow|feather|(tfrecords?|tfrec|record)(\.gz)?)$"
)

Fragment = tuple[str, int, int, int, list[str] | None]


@dataclass(kw_only=True, slots=True)
class FileScan:
    """The contents of one archive, as its scan found them."""

    fragments: list[Fragment]
    """Rows of schema FRAGMENTS, without the split and the row."""
    first_rows: list[int] = field(default_factory=list)
    """The number of the first row of each fragment, in lists of URLs."""
    names: Iterable[str] = ()
    """Label names, except those that folders give."""
    ordered_names: tuple[str, ...] = ()
    """Label names in index order, if the file states the order."""
    multilabel: bool = False
    first_members: list[tuple[str, ...]] = field(default_factory=list)
    """Names of the first members of the archive, or of each archive inside it:
    equal names mean that the numbering repeats."""
    problem: str = ""
    """Why the archive could not be read to its end."""
    splits: Iterable[str] = ()
    """The splits that the rows or members belong to; with "" if some belong to none."""
    folders: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    """Folders of the members that have no other label, with the number of images in each folder."""
    wordnet: Iterable[str] = ()
    """WordNet ids at the beginning of the names of those members."""
    splits_in_names: Counter[str | None] = field(default_factory=Counter)
    """The splits that the image file names contain; None for names without one."""
    tables: list[tuple[str, bytes]] = field(default_factory=list)
    """Label tables in the archive: (name, contents)."""
    scattered: bool = False
    """Whether the members of a sample are not next to each other."""
    texts: set[str] = field(default_factory=set)
    """Labels that may be captions."""
    text_samples: int = 0
    """Number of samples that have one of `texts`."""
    text_column: str = "txt"
    """The column, or the extension of the members, that holds `texts`."""
    stamp: str = ""
    """Changes with the content of a list of URLs."""
    fields: set[str] = field(default_factory=set)
    """Names of the fields or columns that were searched for a label."""
    image_keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """The smallest `tables.file_hash` of the images, at most MAX_IMAGE_KEYS."""
    ignored: tuple[int, str] = (0, "")
    """Number of hidden and system files among the members, and the name of one."""
    nested: str = ""
    """An archive in the archive that is not read, if there are no images."""

    def numbered_fragments(self) -> Iterable[tuple[Fragment, int]]:
        """Each fragment, and the number of its first row."""
        return zip(self.fragments, self.first_rows or [0] * len(self.fragments), strict=True)


ScanFile = Callable[[str, str, int, ScanOptions], FileScan]
"""(URI, path relative to the source, size in bytes, options) -> contents of the file. Runs in a Ray task."""


def scan_archives(
    name: str, uri: str, files: pa.Table, options: ScanOptions, matches: Callable[[str], bool], scan_file: ScanFile
) -> Source:
    """Scans the files of format `name`. In a folder, label tables next to the archives (labels.csv, train.csv) are read
    as well; other files (an index, a README) are ignored. Raises UserError for files that cannot be used."""
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
        (scan_file, address_of(uri, path) if path else uri, path, size, options)
        for path, size in zip(files["path"].to_pylist(), files["size"].to_pylist(), strict=True)
    ]
    found: list[FileScan] = workqueue.map_tasks(_scan, jobs)
    by_file = splits_of_files(files["path"].to_pylist())
    rows = [(*row, by_file.get(row[0]), first) for scan in found for row, first in scan.numbered_fragments()]
    if not rows:
        raise UserError(f"{uri}: its {name} files have no rows")
    _refuse_nested(uri, found)
    if ignored := sum(scan.ignored[0] for scan in found):
        example = next(scan.ignored[1] for scan in found if scan.ignored[0])
        logger.info("%s: ignored %s in archives, such as %s", uri, plural(ignored, "hidden or system file"), example)
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
    return Source(
        uri=uri,
        kind=name,
        fragments=fragments,
        names=frozenset(names) if names or options.need_names else None,
        ordered_names=ordered.pop() if len(ordered) == 1 else None,
        multilabel=naming.multilabel or any(scan.multilabel for scan in found),
        naming=naming,
        by_archive=len(set(first_members)) < len(first_members) or len(set(by_file.values())) > 1,
        scattered=any(scan.scattered for scan in found),
        problem=next((scan.problem for scan in found if scan.problem), ""),
        hint=hint or _hint(found),
        prefix=options.prefix,
        splits=_named(by_file, _splits_inside(found, table, naming), files.num_rows),
        columns=options.columns,
        stamp=" ".join(scan.stamp for scan in found).strip(),
    )


def _splits_inside(found: Sequence[FileScan], table: LabelTable, naming: Naming) -> set[str]:
    """The splits that tables, members and rows name; "" stands for images without one. table: the table beside the
    archives."""
    inside = {s for scan in found for s in scan.splits} | table.named_splits
    inside |= {split for part in naming.tables.values() for split in part.named_splits}
    if any(part.of_splits and not _lists_all(part, found) for part in (table, *naming.tables.values())):
        inside.add("")  # test.txt beside class folders
    folders = (Counter[tuple[str, ...]](scan.folders) for scan in found)
    inside |= {split for path in sum(folders, Counter()) if (split := naming.layout.split("/".join((*path, ""))))}
    if naming.layout.split_in_file_name:
        inside |= {split for scan in found for split in scan.splits_in_names if split}
    return inside


def _named(by_file: Mapping[str, str], inside: set[str], files: int) -> tuple[str, ...]:
    """The splits of a source, with "" if there is one split and some images may have none. by_file: the splits of the
    archives that have one. inside: those of members and rows. files: number of archives."""
    named = {*by_file.values(), *inside} - {""}
    without = 0 < len(by_file) < files or ("" in inside and len(by_file) < files)
    return tuple(sorted(named | {""} if len(named) == 1 and without else named))


def _lists_all(table: LabelTable, found: Sequence[FileScan]) -> bool:
    """Whether a table has rows for all images that are known by name."""
    hashes = np.concatenate([scan.image_keys for scan in found])
    return bool(np.isin(hashes, np.fromiter(map(file_hash, table.keys), np.uint64)).all())


def _refuse_nested(uri: str, found: Sequence[FileScan]) -> None:
    """Raises UserError if the archives have archives in place of images, except tars in a tar, which are read."""
    if all(scan.nested for scan in found):
        raise UserError(
            f"{uri}: has archives instead of images in it, such as {found[0].nested}; unpack it, and give the archives in it, or "
            "the folder that has them, with --source"
        )


def _chosen(paths: list[str], options: ScanOptions) -> list[str]:
    """The archives whose names match --include. If no archive matches, the globs
    apply to members, and all archives are kept."""
    if not options.include:
        return paths
    ends = ("", "#0", "/0")
    keys = {path: [path + end for end in ends] + [f"{archive_stem(path)}/0"] for path in paths}
    chosen = [p for p in paths if any(is_included(options.prefix + key, options.include) for key in keys[p])]
    return chosen or paths


def archive_stem(path: str) -> str:
    """The path of an archive without its extension."""
    return re.sub(ARCHIVE_SUFFIX, "", path)


def member_filter(path: str, options: ScanOptions) -> Callable[[str], bool]:
    """A predicate on the member names of the archive `path`: whether the key, with or
    without the archive's name in front, matches --include."""
    before = (options.prefix, f"{options.prefix}{archive_stem(path)}/")
    return lambda name: any(is_included(prefix + name, options.include) for prefix in before)


def _table_beside(uri: str, others: list[str], options: ScanOptions) -> tuple[LabelTable, str]:
    """(the label table next to the archives, "") or (an empty table, a hint that
    names a file that may be a label table)."""
    found = find_tables(others)

    def read(path: str, need_labels: bool) -> LabelTable:
        return read_label_table(address_of(uri, path), options.columns, need_labels=need_labels)

    tables = read_tables(found, read, not options.unlabelled)
    if tables:
        return tables[min(tables, key=len)], ""
    other = next((path for path in others if path.lower().endswith((".csv", ".tsv", ".txt", ".jsonl"))), "")
    return LabelTable(), f"{other} may be a label table; pass it with --labels" if other else ""


def _naming(uri: str, found: Sequence[FileScan], options: ScanOptions) -> Naming:
    """The labels and splits that tables and folders give to the members of all archives."""
    contents = {name: data for scan in found for name, data in scan.tables}

    def read(name: str, need_labels: bool) -> LabelTable:
        return read_label_table(f"{uri}: {name}", options.columns, need_labels=need_labels, data=contents[name])

    tables = {} if options.table else read_tables(find_tables(contents), read, not options.unlabelled)
    folders: Counter[tuple[str, ...]] = Counter()
    for scan in found:
        folders.update(scan.folders)
    within = {"/".join(inside[:n]) for inside in folders for n in range(1, len(inside) + 1)}
    tables = lifted(tables, within.__contains__) if within else tables
    hashes = np.concatenate([scan.image_keys for scan in found])
    for folder, table in list(tables.items()):
        if table.of_splits and len(hashes) and not _lists_images(table, hashes):  # train.txt may be something else
            logger.warning("%s: %s names none of the images; the table is ignored", uri, tables.pop(folder).uri)

    def layout_with(classes: bool) -> Layout:
        return layout_of_source(uri, folders, options.class_level, classes_wanted=classes and not options.unlabelled)

    labelled = bool(options.table.labels) or ("" in tables and tables[""].has_labels)
    naming = with_layout(Naming(table=options.table, tables=tables), folders, layout_with, not labelled)
    layout = naming.layout
    if layout.split_level is None and file_names_have_splits(sum((scan.splits_in_names for scan in found), Counter())):
        return dataclasses.replace(naming, layout=dataclasses.replace(layout, split_in_file_name=True))
    return naming


def _lists_images(table: LabelTable, hashes: np.ndarray) -> bool:
    """Whether rows of a table may be images. hashes: `file_hash` of some images of each archive."""
    rows = np.fromiter(map(file_hash, table.keys), np.uint64)
    return bool(np.isin(rows, hashes).any()) or (len(hashes) >= MAX_IMAGE_KEYS and len(rows) < len(hashes))


def _names_of_folders(found: Sequence[FileScan], naming: Naming) -> set[str]:
    """Class names from folders in the archives; WordNet ids from file names where folders give no class."""
    if naming.table.labels and not naming.table.of_splits:
        return set()
    folders = {folder for scan in found for folder in scan.folders}
    labels = [naming.of("/".join((*folder, "")))[0] for folder in folders]
    wordnet = {name for scan in found for name in scan.wordnet}
    if wordnet and naming.layout.one_class:
        return wordnet
    return {name for label in labels for name in label or ()} | (wordnet if None in labels else set())


def _labelled_by_archive(uri: str, rows: list[tuple], options: ScanOptions) -> tuple[list[tuple], set[str]]:
    """Fragments labelled by the name (ant.zip, bee.zip) or the folder (label=ant/1.tar) of their archive, for archives
    that contain no labels. Raises UserError if it is unclear whether the names are classes."""
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
            return rows, set()  # the archives are numbered
        levels = [*layout.class_levels.values(), layout.class_level]
        level = next((found for found in levels if found is not None), 0)
        raise UserError(
            f"{uri}: no labels in the archives; --class-level {1 + level} uses their names as "
            f"classes ({', '.join(sorted(names)[:3])}), --labels FILE reads labels from a table, --unlabelled accepts "
            "images without labels"
        )
    found = {path: [label] if label else None for path, label in labels.items()}
    return [(*row[:4], row[4] or found[row[0]], *row[5:]) for row in rows], names


def _check_labels(uri: str, found: Sequence[FileScan], names: set[str], options: ScanOptions) -> None:
    """Raises UserError if the labels are captions, or if no known or named field holds labels."""
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
    if not fields:
        return ""
    return f"none of the fields {', '.join(fields)} is a known label field; name one with --label-column"


def _scan(job: tuple[ScanFile, str, str, int, ScanOptions]) -> FileScan:
    scan_file, uri, path, size, options = job
    return scan_file(uri, path, size, options)


def whole_file(path: str, size: int) -> list[Fragment]:
    """A file as one fragment."""
    return [(path, size, 0, -1, None)]


def names_wanted(options: ScanOptions) -> bool:
    """Whether the labels in the archives are needed; False if the user gave a table."""
    return options.need_names and (not options.table.labels or bool(options.table.of_splits))


def read_archives(
    source: Source, fragments: pa.Table, read_fragment: Callable[[str, str, dict[str, Any], Source], Iterator[Item]]
) -> Iterator[Item]:
    """The items of some fragments. `read_fragment` takes the URI of the file, its
    name in keys, the fragment and the source."""
    for fragment in fragments.to_pylist():
        uri = address_of(source.uri, fragment["path"]) if fragment["path"] else source.uri
        name = fragment["path"] or source.uri.rpartition("/")[2]
        prefix = source.prefix
        if source.by_archive:
            archive, label = archive_stem(name), (fragment["labels"] or [""])[0]
            prefix += f"{archive if label in ('', archive) or '/' in archive else label}/"
        for item in read_fragment(uri, name, fragment, source):
            own = item.key.startswith((f"{name}#", f"{name}/"))  # rows of columnar files are named by their file
            yield item._replace(
                key=(source.prefix if own else prefix) + item.key, split=item.split or fragment["split"]
            )


def included(items: Iterator[Item], include: tuple[str, ...]) -> Iterator[Item]:
    """The items whose keys match one of the globs; all items if there are no globs."""
    return (item for item in items if is_included(item.key, include)) if include else items
