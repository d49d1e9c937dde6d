"""Reads table files (CSV, TSV, text, JSON, JSON Lines, Parquet) into rows: dictionaries of column name and value."""

import ast
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.codecs import is_image_name
from pipeline.data.sources.parquet_batches import read_batches
from pipeline.data.sources.words import FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS, SPLITS
from pipeline.errors import UserError, plural

INDEX = re.compile(r"\d+")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?')
PATH_AND_WORDS = re.compile(r"(.+?\.[A-Za-z0-9]{2,5})\s+(\S.*)")
QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".list", ".jsonl", ".ndjson", ".json", ".parquet", ".parq", ".pq")
MAX_TABLE_BYTES = 8 << 30  # of a compressed table after decompression
MAX_RATIO = 16  # of its size after to that before
MIN_ROWS, MAX_ROWS_PER_BYTE = 200_000, 2  # of a Parquet table


def read_rows(uri: str, named: Sequence[str | None] = (), data: bytes | None = None) -> list[dict[Any, Any]]:
    """The rows of a table; the extension of `uri` selects the reader.

    named: columns that the user named; a first line with one of these names is a header. data: the contents, if they
    are not stored at `uri`. Raises UserError for a table that cannot be read, has no rows, or has rows that are not
    objects.
    """
    name = uri.lower().removesuffix(".gz")
    reader = next((read for ends, read in _READERS.items() if name.endswith(ends)), None)
    if reader is None:
        raise UserError(f"{uri}: unsupported label table; supported: {', '.join(TABLE_SUFFIXES)}")
    try:
        rows = reader(read_data(uri) if data is None else data, uri, [column for column in named if column])
    except (ValueError, csv.Error, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot read the label table ({error})") from error
    if not rows or not isinstance(rows, list):
        raise UserError(f"{uri}: the label table has no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{uri}: row {number} of the label table must be an object with a file name and a label, not "
                f"{row!r:.80}"
            )
    return rows


def read_data(uri: str) -> bytes:
    """The bytes of a small file, decompressed if it is gzipped. Raises UserError if the file is missing or damaged."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    if not data.startswith(b"\x1f\x8b"):
        return data
    limit = min(MAX_TABLE_BYTES, max(16 << 20, MAX_RATIO * len(data)))
    try:
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{uri}: not a gzipped file, or damaged ({error})") from error
    if len(unpacked) > limit:
        raise UserError(f"{uri}: {len(data):,} bytes unpack to more than {limit:,}; unpack the table if it is right")
    return unpacked


def decode_text(data: bytes, uri: str) -> str:
    """Decodes UTF-8, with or without a byte-order mark, or UTF-16 with one. Raises UserError for other encodings."""
    try:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return data.decode("utf-16")
        if b"\0" in data[:1024]:
            raise UserError(f"{uri}: not UTF-8 text (it has NUL bytes, as UTF-16 does); save it as UTF-8")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{uri}: not UTF-8 text ({error}); save it as UTF-8") from error


# ---------------------------------------------------------------- delimited text


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLayout:
    """How the lines of a text table are divided into columns."""

    columns: list[str]
    delimiter: str = ""
    """Empty for lists of a path, which may contain blanks, and a label."""
    header: bool = False
    """Whether the first record has the names of the columns."""
    label_first: bool = False
    """Whether the label comes before the path, in lists."""
    skip: int = 0
    """Number of lines before the first record: comments, Excel's "sep=;", or a number of rows."""
    ambiguous: bool = False
    """Whether several columns are running numbers, so that any of them may be the label."""


def text_layout(lines: Sequence[str], uri: str, named: Sequence[str]) -> TextLayout:
    """The layout of CSV, TSV or plain text, with or without a header. lines: those that are not blank."""
    skip, stated = _preamble(lines, named)
    lines = lines[skip:]
    head = lines[0] if lines else ""
    delimiter = stated or max(",;\t|", key=head.count)  # a comma if there are none of these characters
    if not stated and not head.count(delimiter) and not uri.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        found = _table_with_blanks(lines, named) or _list_of_paths(lines)
        return replace(found, skip=found.skip + skip)
    first = next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])
    if _is_header(first, named):
        with_breaks = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter, skipinitialspace=True)
        return TextLayout(columns=next(with_breaks, []), delimiter=delimiter, header=True, skip=skip)
    cells = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    return replace(_layout_without_header(cells, delimiter), skip=skip)


def _preamble(lines: Sequence[str], named: Sequence[str]) -> tuple[int, str]:
    """(number of lines before the table, the delimiter that Excel's first line states or an empty text)."""
    count, delimiter = 0, ""
    for line in lines:
        if match := SEPARATOR_LINE.fullmatch(line.strip()):
            delimiter = match[1]
        elif not line.startswith("#") or _has_known_names(re.split(r"[,;\t|]", line.lstrip("# ")), named):
            break
        count += 1
    return (count, delimiter) if count < len(lines) else (0, "")


def _table_with_blanks(lines: Sequence[str], named: Sequence[str]) -> TextLayout | None:
    """The layout of columns that are separated by blanks; None for lists of a path and a label.

    With a header, as in CelebA (which has the number of rows before it and no name for the column of files), or with
    columns of numbers, of which the user names one."""
    skip = 1 if len(lines) > 2 and INDEX.fullmatch(lines[0].strip()) else 0
    head, rows = lines[skip].lstrip("# ").split() if lines else [], [line.split() for line in lines[skip + 1 :]]
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        return None
    width = widths.pop()
    if len(head) == width - 1 and skip and not any(map(is_image_name, head)):
        return TextLayout(columns=["file_name", *head], delimiter=" ", header=True, skip=skip)
    known = (
        {*LABEL_COLUMNS, *SPLIT_COLUMNS, *named}
        if width == 2
        else {*FILE_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS, *named}
    )
    if len(head) == width > 1 and not skip and _are_names(head, known):
        return TextLayout(columns=head, delimiter=" ", header=True)
    numbers = all(map(NUMBER.fullmatch, (cell for row in (head, *rows) for cell in row[1:])))
    if not skip and len(head) == width > 2 and numbers:
        return TextLayout(columns=["file_name", *(f"column {i}" for i in range(2, width + 1))], delimiter=" ")
    return None


def _list_of_paths(lines: Sequence[str]) -> TextLayout:
    """The layout of Caffe's lists: a path and a label; or the label first; perhaps below a line of names."""
    columns = ["file_name", "label"]
    first = [cell.lower() for cell in lines[0].split()] if lines else []
    if len(first) == 2 and first[0] in FILE_COLUMNS and first[1] in LABEL_COLUMNS:
        return TextLayout(columns=columns, skip=1)
    if len(lines) > 1 and INDEX.fullmatch(lines[0].strip()) and all(len(line.split()) > 1 for line in lines[1:]):
        return replace(_list_of_paths(lines[1:]), skip=1)  # the number of rows
    label_first = all(is_image_name(line) for line in lines) and all(len(line.split()) > 1 for line in lines)
    return TextLayout(columns=columns, label_first=label_first)


def _has_known_names(cells: Sequence[str], named: Sequence[str]) -> bool:
    return _are_names(cells, {*FILE_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS, *named})


def _are_names(cells: Sequence[str], known: Set[str]) -> bool:
    """Whether the cells are names of columns, of which one is known."""
    known = {name.lower() for name in known}
    return any(cell.strip().lower() in known for cell in cells) and not any(map(is_image_name, cells))


def _is_header(first: Sequence[str], named: Sequence[str]) -> bool:
    known = {*FILE_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS, *(column.lower() for column in named)}
    return any(cell.strip().lower() in known for cell in first) or not any(is_image_name(cell) for cell in first)


def _layout_without_header(rows: list[list[str]], delimiter: str) -> TextLayout:
    """The column of image files becomes file_name; the first other column that is not a running number (MXNet's lists
    begin with one) becomes label."""
    width = max(map(len, rows))
    columns = [[row[i] if i < len(row) else "" for row in rows] for i in range(width)]
    file = max(range(width), key=lambda i: sum(bool(is_image_name(cell)) for cell in columns[i]))
    others = [i for i in range(width) if i != file]
    splits = [i for i in others if all(cell.strip().lower() in SPLITS for cell in columns[i])]
    split = splits[0] if splits and len(others) > 1 else None  # as in tables of AutoML: TRAIN,path,label
    others = [i for i in others if i != split]
    counted = [i for i in others if len({*columns[i]}) == len(rows) and all(map(INDEX.fullmatch, columns[i]))]
    label = next((i for i in others if i not in counted), others[0] if others else None)
    names = {i: f"column {i + 1}" for i in range(width)} | {file: "file_name"}
    if label is not None:
        names[label] = "label"
    if split is not None:
        names[split] = "split"
    return TextLayout(
        columns=[names[i] for i in range(width)], delimiter=delimiter, ambiguous=len(counted) == len(others) > 1
    )


def rows_of_text(lines: Iterable[str], layout: TextLayout) -> Iterator[dict[str, Any]]:
    """The rows of lines of text. A header, if there is one, is not among the lines."""
    if not layout.delimiter:
        for line in lines:
            if line.strip():
                cells = line.split(None, 1)[::-1] if layout.label_first else _path_and_label(line.strip())
                yield dict(zip(layout.columns, map(str.strip, cells), strict=False))
        return
    missing = None if layout.header else ""
    lines = (line.strip() + "\n" for line in lines) if layout.delimiter == " " else lines
    taken: list[str] = []  # the lines of the row
    for cells in csv.reader(_remember(lines, taken), delimiter=layout.delimiter, skipinitialspace=True):
        if cells:
            if len(taken) > 1:
                _refuse_rows_in_cells(cells, taken, layout.delimiter)
            yield dict.fromkeys(layout.columns, missing) | dict(zip(layout.columns, cells, strict=False))
        taken.clear()


def _remember(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _refuse_rows_in_cells(cells: Sequence[str], lines: Sequence[str], delimiter: str) -> None:
    """Raises csv.Error for a cell that has other rows in it, because it begins with a quotation mark that is part of the
    text, as in "3/4 bolt. Then text follows the next quotation mark, there is none, or the cell has lines with names of
    images. Other cells of several lines are texts such as captions. lines: those of the row."""
    try:
        list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))
        parts = [line.split(delimiter) for cell in cells for line in cell.split("\n")[1:]]
        if not any(len(some) > 1 and any(is_image_name(part.strip()) for part in some) for some in parts):
            return
    except csv.Error:
        pass
    raise csv.Error(
        f"the row {delimiter.join(cells).partition(chr(10))[0]!r:.80} has an opening quotation mark, and the rows up "
        'to the next quotation mark are in its cell; write a label with quotation marks as "3/4"" bolt"'
    )


def _path_and_label(line: str) -> list[str]:
    """[path] or [path, label] of a line. A label may have several words if it has letters and follows an extension of
    images; a path may have blanks anywhere."""
    match = PATH_AND_WORDS.fullmatch(line)
    if match and is_image_name(match[1]) and not is_image_name(match[2]) and re.search(r"[^\W\d_]", match[2]):
        return [match[1], match[2]]
    cells = line.rsplit(None, 1)
    return [line] if len(cells) == 2 and ("/" in cells[1] or is_image_name(cells[1])) else cells


def _read_delimited(data: bytes, uri: str, named: Sequence[str]) -> list[Any]:
    """Rows of CSV, TSV or plain text, with or without a header."""
    lines = [line for line in decode_text(data, uri).splitlines() if line.strip()]
    layout = text_layout(lines, uri, named)
    rows = list(
        rows_of_text([line + "\n" for line in lines[layout.skip :]], layout)
    )  # quoted cells may have line breaks
    return rows[1:] if layout.header else rows


# ---------------------------------------------------------------- JSON and Parquet


def _read_json_lines(data: bytes, uri: str, named: Sequence[str]) -> list[Any]:
    return [json.loads(line) for line in decode_text(data, uri).splitlines() if line.strip()]


def _read_json(data: bytes, uri: str, named: Sequence[str]) -> Any:
    text = decode_text(data, uri)
    try:
        value = json.loads(text)
    except ValueError:
        if "\n" in text.strip():  # JSON Lines in a file with another extension
            return _read_json_lines(data, uri, named)
        raise
    return _rows_of_object(value) if isinstance(value, dict) else _rows_of_list(value)


def _rows_of_list(value: Any) -> Any:
    """Rows of a JSON list: objects, file names, or [file, label] and [file, index, label]; other values unchanged."""
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(row, list) and 1 < len(row) < 4 and isinstance(row[0], str) for row in value):
        return [{"file": row[0], "label": row[-1]} for row in value]
    if all(isinstance(row, str) and (is_image_name(row) or "/" in row) for row in value):
        return [{"file": row} for row in value]
    return value


def _rows_of_object(value: dict[str, Any]) -> Any:
    """Rows of a JSON object: {file: label}, {"labels": [[file, label], ...]}, COCO's {"images", "annotations",
    "categories"}, {class: [files]}, a table by columns, or an object that contains a list of rows."""
    lists = [part for part in value.values() if isinstance(part, list)]
    if value and all(name.lower() in SPLITS and isinstance(part, list | dict) for name, part in value.items()):
        return _rows_of_splits(value)
    if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        return _rows_of_coco(value)
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    if len(lists) == len(value) and value:
        if set(value) == {"labels"} and all(isinstance(row, list) and len(row) == 2 for row in value["labels"]):
            return [{"file": file, "label": label} for file, label in value["labels"]]
        known = {*FILE_COLUMNS, *LABEL_COLUMNS}
        if {name.lower() for name in value} & known and len(set(map(len, lists))) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
        if all(isinstance(file, str) and (is_image_name(file) or "/" in file) for files in lists for file in files):
            return [{"file": file, "label": name} for name, files in value.items() for file in files]
    rows = next((part for part in lists if part and all(isinstance(row, dict) for row in part)), None)
    if rows is not None and not any(
        isinstance(part, str | int) and is_image_name(name) for name, part in value.items()
    ):
        return rows
    if value and all(isinstance(part, dict) for part in value.values()):
        if all(is_image_name(name) for name in value):  # {file: {label: ..., ...}}
            return [{"file": name, **part} for name, part in value.items()]
        if all({*FILE_COLUMNS} & {name.lower() for name in part} for part in value.values()):  # VGG's annotator
            return [_flat(part) for part in value.values()]
        keys = next(iter(value.values())).keys()  # {column: {row number: value}}
        if all(part.keys() == keys for part in value.values()):
            return [{name: part[key] for name, part in value.items()} for key in keys]
    return [{"file": name, "label": label} for name, label in value.items()]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the fields of the objects in it, except those that it has itself."""
    inside = {name: part for value in row.values() if isinstance(value, dict) for name, part in value.items()}
    return inside | {name: value for name, value in row.items() if not isinstance(value, dict)}


def _rows_of_splits(value: dict[str, Any]) -> Any:
    """Rows of a JSON object with a list or an object for each split; the object unchanged if that has no rows."""
    rows: list[Any] = []
    for split, part in value.items():
        some = _rows_of_list(part) if isinstance(part, list) else _rows_of_object(part)
        if not isinstance(some, list) or not all(isinstance(row, dict) for row in some):
            return value
        rows += [{**row, "split": split} for row in some]
    return rows


def _rows_of_coco(value: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO's layout, which iNaturalist also uses: one row per annotation."""
    files = {image.get("id"): image.get("file_name") for image in value["images"]}
    names = {part.get("id"): part.get("name", part.get("id")) for part in value.get("categories") or ()}
    rows = []
    for annotation in value["annotations"]:
        category = annotation.get("category_id")
        rows.append({"file_name": files.get(annotation.get("image_id")), "label": names.get(category, category)})
    return [row for row in rows if row["file_name"]]


def _read_parquet(data: bytes, uri: str, named: Sequence[str]) -> list[Any]:
    file = pq.ParquetFile(io.BytesIO(data))
    rows, limit = file.metadata.num_rows, max(MIN_ROWS, MAX_ROWS_PER_BYTE * len(data))
    if rows > limit:  # names of files do not repeat, so they do not compress so well
        raise UserError(f"{uri}: {len(data):,} bytes have {plural(rows, 'row')}, more than the limit of {limit:,}")
    return [row for batch in read_batches(uri, file, file.schema_arrow.names) for row in batch.to_pylist()]


_READERS: dict[tuple[str, ...], Callable[[bytes, str, Sequence[str]], Any]] = {
    (".csv", ".tsv", ".txt", ".lst", ".list"): _read_delimited,
    (".jsonl", ".ndjson"): _read_json_lines,
    (".json",): _read_json,
    (".parquet", ".parq", ".pq"): _read_parquet,
}


def parse_list(value: Any) -> Any:
    """Parses a list that was written as text; returns other values unchanged."""
    if not isinstance(value, str) or not (value.startswith(("[", "(", "{")) and value.endswith(("]", ")", "}"))):
        return value
    if value.startswith("[") and re.search(r"['\"]\s+['\"]", value) and "," not in value:  # texts as numpy prints them
        return [a or b for a, b in QUOTED.findall(value)]
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        numbers = value[1:-1].split()  # an array as numpy prints it
        return numbers if value.startswith("[") and numbers and all(map(INDEX.fullmatch, numbers)) else value
    return list(parsed) if isinstance(parsed, list | tuple | set) else value
