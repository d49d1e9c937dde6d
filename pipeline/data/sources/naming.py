"""The label and the split of every image in a source, from label tables and folder names."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pipeline.data.sources.columns import NoLabelColumn
from pipeline.data.sources.layout import Layout
from pipeline.data.sources.tables import LabelTable, clean_path
from pipeline.data.sources.words import SPLITS
from pipeline.errors import StorageError, UserError, nearest

_SPLIT_WORDS = "|".join(sorted(SPLITS, key=len, reverse=True))
TABLE_FILE = re.compile(  # tables that are detected by name; each applies to its own folder
    r"(?i)(?:(?P<folder>.*)/)?(?:(?:labels|metadata)\.(?:csv|tsv|jsonl|parquet)|_classes\.csv|val_annotations\.txt"
    rf"|loc_(?P<kaggle>{_SPLIT_WORDS})_solution\.csv|(?P<split>{_SPLIT_WORDS})(?:[-_](?:labels?|metadata|annotations?|list|set))?\.(?:csv|tsv|txt|lst|jsonl|json))"
)
MAX_COMPARED = 1000  # file names that are searched for a similar name
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """The label and the split of every path of a source. The table for the whole source comes first, then the tables of
    folders, then folder names. An image that is missing from a table with labels has no label."""

    table: LabelTable = field(default_factory=LabelTable)
    tables: dict[str, LabelTable] = field(default_factory=dict)
    """Tables by folder."""
    layout: Layout = field(default_factory=Layout)

    @property
    def multilabel(self) -> bool:
        return any(found.multilabel for found in (self.table, *self.tables.values()))

    @property
    def by_folder(self) -> bool:
        """Whether no table has labels."""
        return not self.table.has_labels and not any(found.has_labels for found in self.tables.values())

    def by_folder_of_table(self) -> dict[str, LabelTable]:
        """The tables that apply, by folder."""
        return {"": self.table} if self.table else self.tables

    def table_of(self, path: str) -> tuple[LabelTable, str, str] | None:
        """(table, folder of the table, path in that folder) for a path; None if no table applies."""
        if self.table:
            return self.table, "", path
        for folder in sorted(self.tables, key=len, reverse=True):
            if not folder or path.startswith(f"{folder}/"):
                return self.tables[folder], folder, path[len(folder) + 1 :] if folder else path
        return None

    def row(self, path: str) -> tuple[LabelTable, str, str | None] | None:
        """(table, folder of the table, row) for a path; None if no table applies."""
        found = self.table_of(path)
        return None if found is None else (found[0], found[1], found[0].find(found[2]))

    def of(self, path: str) -> tuple[list[str] | None, str | None]:
        """(label names, split) of a path."""
        return self.said_by(self.row(path), path)

    def applies(self, table: LabelTable, row: str | None, path: str) -> bool:
        """Whether the labels of a table hold for a path. A table for the test set leaves the folders of the training set
        as they are."""
        return table.has_labels and (row is not None or self.applies_to(table, self.layout, path))

    @staticmethod
    def applies_to(table: LabelTable, layout: Layout, path: str) -> bool:
        """Whether a table is about a path that has no row in it."""
        split = layout.split(path) if table.of_splits else None
        return split is None or split.lower() in table.of_splits

    def said_by(
        self, found: tuple[LabelTable, str, str | None] | None, path: str
    ) -> tuple[list[str] | None, str | None]:
        """(label names, split) of a path. found: what `row` returns for it."""
        if found is None:
            label = self.layout.label(path)
            return None if label is None else [label], self.layout.split(path)
        table, _, row = found
        split = (table.splits.get(row) if row is not None else None) or self.layout.split(path)
        if self.applies(table, row, path):
            return None if row is None else table.labels.get(row), split
        label = self.layout.label(path)
        return None if label is None else [label], split

    def names(self) -> set[str]:
        """All label names in the tables."""
        return {
            name for found in (self.table, *self.tables.values()) for names in found.labels.values() for name in names
        }


def with_layout(
    naming: Naming, folders: Iterable[tuple[str, ...]], find: Callable[[bool], Layout], classes_wanted: bool
) -> Naming:
    """The naming with the layout that `find(whether classes are taken from folders)` returns.

    classes_wanted: whether folders name classes where no table does. Beside a table that is about some splits, as in
    train/<class>/ with a table for val/, they do so for the other splits if those have several class folders."""
    partial = [table for table in naming.by_folder_of_table().values() if table.of_splits]
    if classes_wanted or not partial:
        return replace(naming, layout=find(classes_wanted))
    try:
        layout = find(True)
        others = [path for inside in folders if layout.split(path := "/".join((*inside, "")))]
        names = {layout.label(path) for path in others if not any(naming.applies_to(t, layout, path) for t in partial)}
        if len(names - {None}) > 1:
            return replace(naming, layout=layout)
    except UserError:  # it is unclear which folders are classes
        pass
    whole = {folder: replace(table, of_splits=frozenset()) for folder, table in naming.tables.items()}
    table = replace(naming.table, of_splits=frozenset())
    return replace(naming, table=table, tables=whole, layout=find(False))


def lifted(tables: dict[str, LabelTable], has_images: Callable[[str], bool]) -> dict[str, LabelTable]:
    """The tables by folder; a table in a folder without images, such as meta/train.txt or annotations/labels.csv, applies to
    the nearest folder above that has images. has_images: whether there are images in a folder or below it."""
    found: dict[str, LabelTable] = {}
    for folder, table in sorted(tables.items()):
        place = folder
        while place and not has_images(place):
            place = place.rpartition("/")[0]
        found[folder if place in found or place in tables else place] = table
    return found


def find_tables(paths: Iterable[str]) -> list[tuple[str, str, str | None]]:
    """(path, folder, split in the file name) of the files that are named like label tables."""
    found = [(path, match) for path in paths if (match := TABLE_FILE.fullmatch(path))]
    return [(path, match["folder"] or "", match["split"] or match["kaggle"]) for path, match in found]


def read_tables(
    found: Iterable[tuple[str, str, str | None]], read: Callable[[str, bool], LabelTable], need_labels: bool
) -> dict[str, LabelTable]:
    """Label tables by folder; `read` takes a path and whether labels are needed, and returns the table.

    train.csv and test.csv in one folder become one table with splits; they may be lists of files alone. A table without labels or splits is ignored with
    a warning. Raises UserError for a table that cannot be read, or whose label column the user must name.
    """
    tables: dict[str, LabelTable] = {}
    by_split: dict[str, dict[str, LabelTable]] = {}
    doubtful: dict[str, NoLabelColumn] = {}
    for path, folder, split in found:
        if folder in tables:
            continue
        try:
            table = read(path, need_labels)
        except NoLabelColumn as error:
            if split is not None and not error.others:
                by_split.setdefault(folder, {})[split] = read(path, False)
                continue
            if "perhaps" in str(error) and need_labels:  # an unknown column may hold labels
                if split is None:
                    raise
                doubtful.setdefault(folder, error)
            logger.warning("%s; the table is ignored", error)
        except StorageError:
            raise
        except UserError as error:
            if split is None:
                raise
            logger.warning("%s; the file is ignored", error)  # train.txt may be something other than a table
        else:
            if split is not None:
                by_split.setdefault(folder, {})[split] = table
            elif table:
                tables[folder] = table
    for folder, doubt in doubtful.items():
        if folder not in tables and folder not in by_split:
            raise doubt
    return {folder: join_splits(parts) for folder, parts in by_split.items()} | tables


def join_splits(parts: dict[str, LabelTable]) -> LabelTable:
    """Joins the tables of several splits. If two splits have the same file names, the split is put before each name.
    Raises UserError for tables that are not in memory."""
    if large := next((table for table in parts.values() if not table.in_memory), None):
        raise UserError(
            f"{large.uri}: too large for one table for each split; write one table with the columns file_name, label and "
            "split, and pass it with --labels"
        )
    both = parts.keys() - {"trainval"}
    if "trainval" in parts and len(both) > 1:  # the training and the validation set together
        together = {key for split in both for key in parts[split].keys}
        parts = {split: parts[split] for split in parts if split in both or not together.issuperset(parts[split].keys)}
    keys = [key for table in parts.values() for key in table.keys]
    prefixes = {split: f"{split}/" if len(set(keys)) < len(keys) else "" for split in parts}
    prefixed = [(prefixes[split], split, table) for split, table in parts.items()]
    labels = {prefix + key: names for prefix, _, table in prefixed for key, names in table.labels.items()}
    return LabelTable(
        labels=labels,
        splits={prefix + key: split for prefix, split, table in prefixed for key in table.keys},
        multilabel=any(table.multilabel for table in parts.values()),
        unlabelled=frozenset(prefix + key for prefix, _, table in prefixed for key in table.unlabelled) - labels.keys(),
        uri=next(table.uri for table in parts.values()),
        of_splits=frozenset(split.lower() for split in parts),
    )


class RowMatcher:
    """Matches rows of the tables with files; a row without a file is a missing input."""

    def __init__(self, naming: Naming) -> None:
        self.naming = naming
        self.files: dict[tuple[str, str], str] = {}  # (folder, row) -> file

    def add(self, path: str) -> tuple[LabelTable, str, str | None] | None:
        """Records the row of a file and returns what `Naming.row` does. Raises UserError if the row matches two files."""
        found = self.naming.row(path)
        if found is None or found[2] is None:
            return found
        table, folder, row = found[0], found[1], found[2]
        other = self.files.setdefault((folder, row), path)
        if other != path:
            raise UserError(
                f"{table.uri}: the row {row} matches several files, {other} and {path}; write full paths in the table, "
                "or select the files with --include"
            )
        return found

    def rows_without_file(self) -> Iterator[tuple[str, str]]:
        """(folder of the table, row) of the rows without a file."""
        for folder, table in self.naming.by_folder_of_table().items():
            yield from ((folder, row) for row in table.keys if (folder, row) not in self.files)

    def missing_file(self, folder: str, row: str) -> tuple[str, list[str] | None, str | None]:
        """(path, label names, split) of a row without a file."""
        table, path = self.naming.by_folder_of_table()[folder], f"{folder}/{row}" if folder else row
        return path, table.labels.get(row), table.splits.get(row) or self.naming.layout.split(path)

    def check(self, uri: str, paths: Sequence[str]) -> None:
        """Raises UserError if no row of a table matches a file in `paths`; warns about rows without a file."""
        for folder, table in self.naming.by_folder_of_table().items():
            gone = [row for row in table.keys if (folder, row) not in self.files]
            if gone:
                check_rows(uri, table.uri, folder, len(list(table.keys)), len(gone), gone[0], paths)


def check_rows(uri: str, table: str, folder: str, rows: int, gone: int, example: str, paths: Sequence[str]) -> None:
    """Warns that `gone` of the rows of a table have no file, such as `example`. Raises UserError if it is all of them.

    paths: files of the source, of which some are compared with the example."""
    inside = [clean_path(path) for path in paths[:MAX_COMPARED] if path.startswith(folder)]
    names = dict.fromkeys([*inside, *(path.rpartition("/")[2] for path in inside)])
    folded = {name.casefold(): name for name in reversed(names)}
    close = nearest(example, inside) or nearest(example, names) or nearest(folded.get(example.casefold(), ""), names)
    if gone == rows:
        raise UserError(
            f"{uri}: the label table {table} names none of the files; the table has {example!r}{close}, the source has "
            f"{next(iter(inside or paths), '')!r}"
        )
    logger.warning("%s: %d of %d rows of %s have no file, such as %r%s", uri, gone, rows, table, example, close)
