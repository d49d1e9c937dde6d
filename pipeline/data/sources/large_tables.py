"""Label tables with more rows than fit in memory: Parquet, CSV, TSV, text and JSON lines.

`table_chunks` divides a table into chunks. A first pass over the chunks collects the distinct values of each column, which decide what the columns mean, by the same
functions as for small tables. `LargeTable.labelled_batches` then reads the rows of a chunk, and `label_join` joins them with files.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import workqueue
from pipeline.data.sources.columns import (
    SYNSET,
    Columns,
    as_text,
    captions_error,
    column_labels,
    is_flag,
    is_missing,
    is_one,
    look_like_captions,
    name_in_object,
    named_column,
    named_one_hot,
    no_label_column,
    unnamed_object,
)
from pipeline.data.sources.rows import parse_list
from pipeline.data.sources.split_columns import is_likely, split_column, split_name, split_of_flag
from pipeline.data.sources.table_chunks import Chunk, ChunkReader, open_chunks
from pipeline.data.sources.tables import LabelTable, file_column, key_of, no_key, read_label_table
from pipeline.data.sources.words import LABEL_COLUMNS, SPLIT_COLUMNS, SPLITS
from pipeline.errors import StorageError, UserError

MAX_VALUES = 1_000_000  # distinct values of a column of labels or splits


# ---------------------------------------------------------------- what the columns mean


@dataclass(kw_only=True)
class Values:
    """The distinct values of a column."""

    cells: set[Hashable] | None = field(default_factory=set)
    """None: more than MAX_VALUES."""
    parts: set[Hashable] = field(default_factory=set)
    """Elements of cells that are lists."""
    uneven: bool = False
    """Whether a list has more or fewer elements than one."""

    @property
    def some_cells(self) -> Iterable[Any]:
        """The cells, with a text for all lists, and for values of which there are too many."""
        return [*(self.cells or ()), *([""] if not self.cells else []), *(["[]"] if self.has_lists else [])]

    @property
    def has_lists(self) -> bool:
        return bool(self.parts) or self.uneven

    def add(self, values: Iterable[Any], column: str, plain: bool) -> None:
        if self.cells is None:
            return
        for value in values:
            cell = cell_of(value, column, plain)
            if isinstance(cell, list):
                self.parts.update(map(hashable, parts_of(cell)))
                self.uneven |= len(cell) != 1
            else:
                self.cells.add(cell)
        self._limit()

    def merge(self, other: "Values") -> None:
        if self.cells is None or other.cells is None:
            self.cells, self.parts = None, set()
            return
        self.cells |= other.cells
        self.parts |= other.parts
        self.uneven |= other.uneven
        self._limit()

    def _limit(self) -> None:
        if self.cells is not None and len(self.cells) + len(self.parts) > MAX_VALUES:
            self.cells, self.parts = None, set()


def cell_of(value: Any, column: str, plain: bool = False) -> Any:
    """A cell as a hashable value or a list. All missing numbers are None, since NaN differs from itself. plain: lists are
    text, as in a column of splits."""
    if isinstance(value, bytes):
        value = as_text(value)
    if plain:  # 1.0 is another split than 1, but the same label
        return Other(str(value)) if isinstance(value, float) and not is_missing(value) else hashable(value)
    if column.lower() == "predictionstring":  # a synset and coordinates, which differ in every row
        match = SYNSET.search(str(value))
        return match[0] if match else None
    if isinstance(value, str):
        return name_in_object(parse_list(value)) if value[:1] in ("[", "(", "{") else value
    if is_missing(value):
        return None
    value = name_in_object(value)
    return value if isinstance(value, list) else hashable(value)


def parts_of(cell: list[Any] | tuple[Any, ...]) -> Iterator[Any]:
    """The elements of a cell that is a list, also of lists in it."""
    for part in cell:
        if isinstance(part, list | tuple):
            yield from parts_of(part)
        else:
            yield part


def hashable(value: Any) -> Hashable:
    """A value that is equal only to values of the same label: True is not 1, and all missing numbers are None."""
    if isinstance(value, float) and value != value:
        return None
    return value if isinstance(value, str | float | bytes | None) or type(value) is int else Other(str(value))


@dataclass(frozen=True, slots=True)
class Other:
    """A value of another type than text or a number, such as True."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(kw_only=True)
class Profile:
    """What a pass over a chunk, or over all chunks, has found."""

    rows: int = 0
    values: dict[str, Values] = field(default_factory=dict)
    empty: int | None = None
    """Number of the first row without a file name, from 1."""
    lines: int = 0
    open_cell: tuple[bool, bool] = (False, False)
    """Result of `Reader.quoting`."""
    error: str = ""


def profile_chunk(chunk: Chunk, about: tuple[ChunkReader, str, list[str], list[str]]) -> Profile:
    """The Profile of a chunk. about: the reader, the column of file names, the columns whose values are collected, and
    those of them in which a list is text."""
    reader, file, columns, plain = about
    found = Profile(values={name: Values() for name in columns})
    found.lines, found.open_cell = reader.quoting(chunk)
    try:
        for batch in reader.batches(chunk, [file, *columns]):
            keys = batch[file]
            if found.empty is None:
                missing = (i for i, value in enumerate(keys) if key_of(value) is None)
                found.empty = next((found.rows + i + 1 for i in missing), None)
            found.rows += len(keys)
            for name in columns:
                found.values[name].add(batch[name], name, name in plain)
    except StorageError:
        raise
    except UserError as error:  # it may come from a boundary of chunks in a quoted cell
        found.error = str(error)
    return found


def profile_table(
    reader: ChunkReader, chunks: list[Chunk], file: str, columns: list[str], plain: list[str]
) -> tuple[Profile, list[Chunk]]:
    """The Profile of a table, and its chunks with the numbers of their rows. The arguments are those of `profile_chunk`.
    Raises UserError for unreadable rows."""
    found: dict[str, Profile] = {}
    total = Profile(values={name: Values() for name in columns})
    units = {f"chunk-{i:06d}": chunk for i, chunk in enumerate(chunks)}
    for outcome in workqueue.run(units, profile_chunk, context=(reader, file, columns, plain)):
        if outcome.error:
            raise outcome.error
        for name, values in outcome.summary.values.items():
            total.values[name].merge(values)
        found[outcome.name] = dataclasses.replace(outcome.summary, values={})
    skip = reader.layout.skip if reader.layout else 0
    inside, lines, merged, numbered = False, 0, list[Chunk](), list[Chunk]()
    for name, chunk in units.items():
        if inside or (merged and lines <= skip):  # the chunk starts in a quoted cell, or has the header
            merged[-1] = dataclasses.replace(merged[-1], stop=chunk.stop)
        else:
            merged.append(chunk)
        inside = found[name].open_cell[inside]
        lines += found[name].lines
    if len(merged) < len(chunks):
        return profile_table(reader, merged, file, columns, plain)
    for name, chunk in units.items():
        about = found[name]
        if about.error:
            raise UserError(about.error)
        if about.empty is not None:
            raise no_key(reader.uri, total.rows + about.empty, file)
        numbered.append(dataclasses.replace(chunk, first=total.rows))
        total.rows += about.rows
    if not total.rows:
        raise UserError(f"{reader.uri}: the label table has no rows")
    return total, numbered


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class LargeTable(LabelTable):
    """A label table that stays in its file. Its rows are read in chunks, in any process."""

    reader: ChunkReader
    chunks: list[Chunk] = field(default_factory=list)
    rows: int = 0
    file: str = ""
    """The column of file names."""
    label: str | None = None
    names: dict[Hashable, list[str] | None] = field(default_factory=dict)
    """{value of the label column: label names}."""
    part_names: dict[Hashable, list[str]] = field(default_factory=dict)
    """{element of a list in the label column: label names}."""
    one_hot: list[str] = field(default_factory=list)
    split: str | None = None
    split_names: dict[Hashable, str | None] = field(default_factory=dict)

    @property
    def in_memory(self) -> bool:
        return False

    def __bool__(self) -> bool:
        return self.has_labels or self.split is not None

    @property
    def keys(self) -> Iterable[str]:
        raise TypeError("the rows of a large table are not in memory")

    def __contains__(self, key: str) -> bool:
        raise TypeError("the rows of a large table are not in memory")

    def labelled_batches(self, chunk: Chunk) -> Iterator[tuple[list[str], list[list[str] | None], list[str | None]]]:
        """(file names, label names, splits) of rows of a chunk."""
        columns = [self.file, *([self.label] if self.label else []), *self.one_hot]
        columns += [self.split] if self.split and self.split not in columns else []
        for batch in self.reader.batches(chunk, columns):
            keys = [_encodable(key_of(value) or "") for value in batch[self.file]]
            labels: list[list[str] | None] = [None] * len(keys)
            if self.label:
                labels = [self._labels(cell_of(value, self.label)) for value in batch[self.label]]
            elif self.one_hot:
                flags = zip(*(batch[name] for name in self.one_hot), strict=True)
                labels = [[n for n, value in zip(self.one_hot, row, strict=True) if is_one(value)] for row in flags]
            splits: list[str | None] = [None] * len(keys)
            if self.split:
                splits = [self.split_names[cell_of(value, self.split, plain=True)] for value in batch[self.split]]
            yield keys, labels, splits

    def _labels(self, cell: Any) -> list[str] | None:
        if isinstance(cell, list):
            return [name for part in parts_of(cell) for name in self.part_names[hashable(part)]]
        found = self.names[cell]
        return None if found is None else list(found)


def open_label_table(uri: str, columns: Columns | None = None, need_labels: bool = True) -> LabelTable:
    """The label table at `uri`: read at once (`read_label_table`), or a LargeTable. Raises UserError."""
    columns = columns or Columns()
    found = open_chunks(uri, columns)
    if found is None:
        return read_label_table(uri, columns, need_labels=need_labels)
    reader, chunks = found
    file = file_column(uri, reader.names, columns)
    others = [name for name in reader.names if name != file]
    first = _first_rows(reader, chunks[0], others)
    plain = [name for name in _split_columns(others, columns, first) if name != columns.label]
    profile, chunks = profile_table(reader, chunks, file, _deciding(others, columns, plain), plain)

    def values(name: str) -> Iterable[Any]:
        return profile.values[name].some_cells if name in profile.values else first.get(name, ())

    try:
        split = split_column(others, columns.split, values, plain, columns.label)
    except UserError as error:
        raise UserError(f"{uri}: {error}") from error
    split_names = {cell: split_name(cell, split) for cell in _distinct(uri, profile, split)} if split else {}
    if len(set(split_names.values())) < 2 and not columns.split:
        split_names = dict.fromkeys(split_names)
    others = [name for name in others if name != split]
    one_hot = named_one_hot(columns.label, others)
    label = None if one_hot else named_column(others, LABEL_COLUMNS, columns.label, "--label-column")
    needed = need_labels and not split
    names, part_names = dict[Hashable, list[str] | None](), dict[Hashable, list[str]]()
    multilabel = False
    if label:
        names, part_names, multilabel = _label_names(uri, profile, label)
        if needed and not columns.label and not multilabel:
            distinct = {name for found in (*names.values(), *part_names.values()) for name in found or ()}
            if look_like_captions(distinct, profile.rows):
                raise captions_error(uri, distinct, profile.rows, f"--label-column {label!r}")
    elif not one_hot:
        one_hot = _one_hot_columns(reader, chunks, profile, others)
    has_lists = label is not None and profile.values[label].has_lists
    has_labels = bool(one_hot) or has_lists or any(found is not None for found in names.values())
    if not has_labels and needed:
        unknown = [name for name in others if name != label]
        texts = profile_table(reader, chunks, file, unknown, unknown)[0].values
        too_many = range(MAX_VALUES + 1)
        raise no_label_column(uri, unknown, {name: found.cells or too_many for name, found in texts.items()})
    return LargeTable(
        uri=uri,
        multilabel=multilabel and has_labels,
        whole_has_labels=has_labels,
        reader=reader,
        chunks=chunks,
        rows=profile.rows,
        file=file,
        label=label if has_labels else None,
        names=names,
        part_names=part_names,
        one_hot=one_hot,
        split=split if any(split_names.values()) else None,
        split_names=split_names,
    )


def _deciding(names: Sequence[str], columns: Columns, splits: Sequence[str]) -> list[str]:
    """The columns whose values decide what is a label or a split: all of them, unless the name of a column says that it
    is the label."""
    others = [name for name in names if name != columns.split]
    if named_one_hot(columns.label, others):
        label = []
    elif found := named_column(others, LABEL_COLUMNS, columns.label, "--label-column"):
        label = [found]
    else:
        return list(names)
    return list(dict.fromkeys([*label, *splits]))


def _split_columns(names: Sequence[str], columns: Columns, first: Mapping[str, Sequence[Any]]) -> list[str]:
    """The columns that may have the splits, by their names or by the values of the first rows."""
    named = named_column(names, SPLIT_COLUMNS, columns.split, "--split-column")
    likely = [name for name in names if is_likely(name) or split_of_flag(name) or _are_splits(first.get(name, ()))]
    return list(dict.fromkeys([*([named] if named else []), *likely]))


def _first_rows(reader: ChunkReader, chunk: Chunk, names: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    try:
        return next(reader.batches(chunk, names), {})
    except StorageError:
        raise
    except UserError:  # `profile_table` reports it, unless it comes from the end of the chunk in a quoted cell
        return {}


def _are_splits(values: Sequence[Any]) -> bool:
    texts = {as_text(value).strip().lower() for value in values if not is_missing(value)}
    return bool(texts) and texts <= SPLITS


def _distinct(uri: str, profile: Profile, column: str) -> set[Hashable]:
    cells = profile.values[column].cells
    if cells is None:
        raise UserError(
            f"{uri}: column {column} has more than {MAX_VALUES:,} different values, which are no classes or splits; name "
            "another column with --label-column or --split-column, or write several labels of an image as a list"
        )
    return cells


def _one_hot_columns(reader: ChunkReader, chunks: list[Chunk], profile: Profile, names: Sequence[str]) -> list[str]:
    """What `one_hot_columns` returns for the rows of all chunks."""
    flags = []
    for name in names:
        found = profile.values.get(name, Values())
        if found.cells and not found.has_lists and all(map(is_flag, found.cells)):
            flags.append(name)
    if len(flags) == len(names) > 1:
        return flags
    if len(flags) < 3:
        return []
    units = {f"chunk-{i:06d}": chunk for i, chunk in enumerate(chunks)}
    for outcome in workqueue.run(units, one_in_each_row, context=(reader, flags)):
        if outcome.error:
            raise outcome.error
        if not outcome.summary:
            return []
    return flags


def one_in_each_row(chunk: Chunk, about: tuple[ChunkReader, list[str]]) -> bool:
    """Whether exactly one of some columns is 1 in each row of a chunk."""
    reader, names = about
    return all(
        sum(map(is_one, row)) == 1
        for batch in reader.batches(chunk, names)
        for row in zip(*(batch[name] for name in names), strict=True)
    )


def _label_names(
    uri: str, profile: Profile, label: str
) -> tuple[dict[Hashable, list[str] | None], dict[Hashable, list[str]], bool]:
    """({cell: label names}, {element of a list in a cell: label names}, whether the table is multi-label)."""
    cells, parts = list(_distinct(uri, profile, label)), list(profile.values[label].parts)
    if unnamed := [cell for cell in (*cells, *parts) if isinstance(cell, Other) and cell.text.startswith("{")]:
        raise UserError(f"{uri}: {unnamed_object(label, min(map(str, unnamed)))}")
    some_lists: list[Any] = [[part] for part in parts] + ([[]] if profile.values[label].uneven else [])
    try:
        found, multilabel = column_labels([*cells, *some_lists], label)
    except UserError as error:
        raise UserError(f"{uri}: {error}") from error
    names = dict(zip(cells, found, strict=False))
    of_parts = {part: labels or [] for part, labels in zip(parts, found[len(cells) :], strict=False)}
    return names, of_parts, multilabel


def _encodable(name: str) -> str:
    """A file name with the escapes of listings in place of characters that UTF-8 does not have."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()
